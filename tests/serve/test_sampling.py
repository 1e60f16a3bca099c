"""Each option against its definition, written out; draws against exact probabilities; rows on their own."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.serve import sampling
from equipoise.serve.request import RequestError, Sampling
from equipoise.serve.sampling import Row, _descending, _penalise, choose, logprobs_of, uniform

# The upper 0.1 % point of chi-square, by degrees of freedom.
CHI2 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}
LOGITS = [2.0, 1.5, 1.5, 0.0, -0.5, -1.0, -3.0, 0.7]


def draws(logits, number, prompt=(0,), **options):
    """How often each token is chosen under `number` seeds."""
    rows = [Row(Sampling(**options, seed=seed), prompt, len(prompt)) for seed in range(number)]
    return Counter(choose(torch.tensor(logits).expand(number, -1), rows))


def probabilities(logits, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """By brute force, in floating-point numbers of Python."""
    scaled = [logit / temperature for logit in logits]
    order = sorted(scaled, reverse=True)
    if top_k is not None:
        scaled = [x if x >= order[min(top_k, len(order)) - 1] else -math.inf for x in scaled]
    if top_p < 1.0:
        total, reached = sum(map(math.exp, scaled)), 0.0
        for last in sorted(scaled, reverse=True):
            reached += math.exp(last) / total
            if reached >= top_p:
                break
        scaled = [x if x >= last else -math.inf for x in scaled]
    scaled = [x if math.exp(x) >= min_p * math.exp(max(scaled)) else -math.inf for x in scaled]
    total = sum(map(math.exp, scaled))
    return [math.exp(x) / total for x in scaled]


OPTIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 2},  # two are tied for the second place: three stay
    {"top_k": 100},
    {"top_p": 0.3},
    {"top_p": 0.6},
    {"top_p": 0.95},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_probabilities(options):
    number = 4000
    expected = probabilities(LOGITS, **options)
    got = draws(LOGITS, number, **options)
    possible = [id for id, p in enumerate(expected) if p > 0]
    assert set(got) <= set(possible)
    chi2 = sum((got[id] - number * expected[id]) ** 2 / (number * expected[id]) for id in possible)
    assert chi2 < CHI2.get(len(possible) - 1, 1e-9)


def test_a_wide_nucleus():
    """300 tokens alike, and as many that are hardly possible: ties of the last one that is needed stay."""
    logits = torch.cat((torch.zeros(300), torch.full((300,), -20.0)))
    rows = [Row(Sampling(top_p=0.99, seed=seed), (0,), 1) for seed in range(2000)]
    chosen = set(choose(logits.expand(2000, -1), rows))
    assert max(chosen) < 300
    assert len(chosen) > 256


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-5])
def test_cold_takes_the_likeliest(temperature):
    assert draws([0.0, 1.0, 0.99], 200, temperature=temperature) == {1: 200}


def test_a_token_that_cannot_be_is_never_drawn(monkeypatch):
    for point in (0.0, 0.5, 1 - 2**-53):
        monkeypatch.setattr(sampling, "uniform", lambda seed, position, point=point: point)
        assert set(draws([-math.inf, 0.0, -math.inf, 0.0, -math.inf], 1)) <= {1, 3}
    monkeypatch.undo()
    assert set(draws([-math.inf, 0.0, -math.inf, 0.0, -math.inf], 500)) == {1, 3}


# ---------------------------------------------------------------------------------------------- penalties


@pytest.mark.parametrize(
    ("options", "expected"),
    [  # prompt 0, 1; answer 1, 2, 2
        ({"presence_penalty": 0.5}, [1.0, 0.5, 0.5, -1.0]),
        ({"frequency_penalty": 0.25}, [1.0, 0.75, 0.5, -1.0]),
        ({"repetition_penalty": 2.0}, [0.5, 0.5, 0.5, -1.0]),
        ({"logit_bias": {3: 3.0, 0: -1.0}}, [0.0, 1.0, 1.0, 2.0]),
        # 1 / 2 = 0.5; minus 0.5 + times * 0.25; 3 has a bias
        (
            {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 2.0, "logit_bias": {3: 0.5}},
            [0.5, -0.25, -0.5, -0.5],
        ),
    ],
    ids=str,
)
def test_penalties_by_hand(options, expected):
    logits = torch.tensor([1.0, 1.0, 1.0, -1.0])
    _penalise(logits, Row(Sampling(**options), [0, 1, 1, 2, 2], 2))
    assert logits.tolist() == expected


def test_repetition_makes_unlikely_ones_unlikelier():
    logits = torch.tensor([[-1.0, -1.5, 2.0, 1.9]])
    row = Row(Sampling(temperature=0.0, repetition_penalty=2.0), [0, 2], 1)
    before = logits.clone()
    assert choose(logits, [row]) == [3]  # 2.0 / 2 = 1
    assert torch.equal(logits, before)  # they are not changed


# ---------------------------------------------------------------------------------------------- draws


@st.composite
def many_rows(draw):
    number = draw(st.integers(1, 6))
    rows = []
    for _ in range(number):
        sampling = Sampling(
            temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
            top_k=draw(st.sampled_from([None, 1, 3])),
            top_p=draw(st.sampled_from([0.4, 1.0])),
            min_p=draw(st.sampled_from([0.0, 0.3])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.5])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.5])),
            seed=draw(st.integers(0, 3)),
        )
        rows.append(Row(sampling, draw(st.lists(st.integers(0, 10), min_size=1, max_size=5)), 1))
    return rows


@given(many_rows(), st.integers(0, 1000))
def test_a_row_does_not_depend_on_others(rows, seed):
    logits = torch.randn(len(rows), 11, generator=torch.Generator().manual_seed(seed)) * 3
    together = choose(logits, rows)
    assert together == [choose(logits[n : n + 1], [row])[0] for n, row in enumerate(rows)]
    order = list(range(len(rows)))[::-1]
    assert choose(logits[order], [rows[n] for n in order]) == together[::-1]


@given(st.lists(st.lists(st.sampled_from([-3.0, -math.inf, 0.0, 0.5, 7.0]), min_size=5, max_size=5), min_size=1))
def test_sorted_by_numpy_as_by_torch(values):
    values = torch.tensor(values)
    assert torch.equal(_descending(values), values.sort(dim=-1, descending=True).values)


def test_numbers_follow_from_seed_and_position():
    numbers = {(seed, at): uniform(seed, at) for seed in (0, 1, -1, 2**64 - 1) for at in range(50)}
    assert all(0 <= number < 1 for number in numbers.values())
    assert numbers[-1, 3] == numbers[2**64 - 1, 3]  # seeds are counted modulo 2^64
    assert len(set(numbers.values())) == 150
    assert uniform(7, 11) == uniform(7, 11)


def test_numbers_are_uniform_and_those_of_philox():
    at_positions = np.array([uniform(5, at) for at in range(4000)])
    of_seeds = np.array([uniform(seed, 0) for seed in range(4000)])
    for numbers in (at_positions, of_seeds):
        counts = np.histogram(numbers, bins=8, range=(0, 1))[0]
        assert ((counts - 500) ** 2 / 500).sum() < CHI2[7]
    assert abs(np.corrcoef(at_positions[:-1], at_positions[1:])[0, 1]) < 0.05
    for seed, at in ((0, 0), (5, 1), (2**63, 400)):
        assert uniform(seed, at) == np.random.Generator(np.random.Philox(key=seed, counter=at)).random()


def test_logprobs_by_hand():
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)], [1.0, 1.0, -100.0]])
    first, second = logprobs_of(logits, [0, 1], [2, 0])
    assert (first.id, second.id, second.top) == (0, 1, ())
    assert [id for id, _ in first.top] == [2, 1]
    values = [first.logprob, *(value for _, value in first.top), second.logprob]
    np.testing.assert_allclose(values, np.log([1 / 8, 5 / 8, 2 / 8, 1 / 2]), rtol=1e-6)


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected a number from 0 to 100, got -0.1"),
        ({"temperature": math.nan}, "temperature: expected a number from 0 to 100, got nan"),
        ({"top_k": 0}, "top_k: expected at least 1, or none for all tokens, got 0"),
        ({"top_p": 0.0}, r"top_p: expected a probability in \(0, 1\], got 0.0"),
        ({"min_p": 1.5}, "min_p: expected a number from 0 to 1, got 1.5"),
        ({"presence_penalty": 3.0}, "presence_penalty: expected a number from -2 to 2, got 3.0"),
        ({"frequency_penalty": -3.0}, "frequency_penalty: expected a number from -2 to 2, got -3.0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty: expected a factor in \(0, 10\], got 0.0"),
        ({"logit_bias": {1: math.inf}}, "logit_bias: expected a number from -100 to 100, got inf"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(RequestError, match=message) as error:
        Sampling(**options)
    assert error.value.param == next(iter(options))
