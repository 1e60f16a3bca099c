"""The drops of a fair router: against exact fractions, the normal approximation, and a simulated router."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.layer.capacity import Capacity
from equipoise.layer.drop_rate import expected_drop_rate, factor_for
from equipoise.routing.hash_tables import random_table


def by_enumeration(factor: float, num_tokens: int, k: int, num_experts: int) -> float:
    """The definition, in fractions: every load there can be, its chance, what it loses."""
    limit = Capacity(factor).limit(num_tokens, num_tokens * k, num_experts)
    p = Fraction(k, num_experts)
    excess = sum(
        (load - limit) * math.comb(num_tokens, load) * p**load * (1 - p) ** (num_tokens - load)
        for load in range(limit + 1, num_tokens + 1)
    )
    return float(excess * num_experts / Fraction(num_tokens * k))


def by_the_normal(factor: float, mu: float, share: float = 0.0) -> float:
    """E[max(Normal(mu, mu (1 - share)) - factor mu, 0)] / mu."""
    sigma = math.sqrt(mu * (1 - share))
    a = (factor - 1) * mu / sigma
    density, above = math.exp(-a * a / 2) / math.sqrt(2 * math.pi), math.erfc(a / math.sqrt(2)) / 2
    return sigma * (density - a * above) / mu


def test_hand_worked():
    # 2 tokens, 2 experts, k=1, capacity 1: loads (2,0), (1,1), (0,2) with 1/4, 1/2, 1/4. One of two is lost in half of
    # the cases: 1/4
    assert expected_drop_rate(1.0, 2, 1, 2) == pytest.approx(0.25, rel=1e-14)
    # 3 tokens, 3 experts, k=1, capacity ceil(0.5) = 1: E[max(load-1, 0)] = 1 * 3 * 1/9 * 2/3 + 2 * 1/27 = 8/27
    assert expected_drop_rate(0.5, 3, 1, 3) == pytest.approx(8 / 27, rel=1e-14)


@given(
    factor=st.sampled_from([0.05, 0.3, 0.9, 1.0, 1.1, 1.5, 3.0]),
    num_tokens=st.integers(1, 120),
    num_experts=st.integers(1, 70),
    data=st.data(),
)
def test_equals_the_enumeration_in_fractions(factor, num_tokens, num_experts, data):
    k = data.draw(st.integers(1, num_experts))
    expected = by_enumeration(factor, num_tokens, k, num_experts)
    assert expected_drop_rate(factor, num_tokens, k, num_experts) == pytest.approx(expected, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize(
    # Percent, by the normal approximation with variance mu, which is for small k/E. Here k/E is 1/64. The tolerance is
    # what the approximation is off by: at most 0.16 points at factor 1, 0.15 in the tail, which it makes too light.
    ("mu", "factor", "percent", "tolerance"),
    [
        (16, 1.0, 10.0, 0.16),
        (16, 1.25, 2.1, 0.15),
        (16, 1.5, 0.2, 0.11),
        (64, 1.0, 5.0, 0.06),
        (64, 1.25, 0.11, 0.02),
        (64, 1.5, 0.0001, 0.0002),
        (256, 1.0, 2.5, 0.03),
        (256, 1.25, 0.0, 1e-4),
        (1024, 1.0, 1.2, 0.04),
    ],
)
def test_the_table_of_the_normal_approximation(mu, factor, percent, tolerance):
    assert 100 * expected_drop_rate(factor, 64 * mu, 1, 64) == pytest.approx(percent, abs=tolerance)
    assert percent == pytest.approx(100 * by_the_normal(factor, mu), rel=0.07, abs=1e-4)


@pytest.mark.parametrize(("num_tokens", "k", "num_experts"), [(10**6, 2, 8), (10**8, 8, 256)])
@pytest.mark.parametrize("sigmas", [-2.0, 0.0, 1.0, 3.0])
def test_many_tokens_come_to_the_normal_distribution(num_tokens, k, num_experts, sigmas):
    mu, share = num_tokens * k / num_experts, k / num_experts
    factor = round(mu + sigmas * math.sqrt(mu)) / mu  # a whole capacity
    expected = by_the_normal(factor, mu, share)
    assert expected_drop_rate(factor, num_tokens, k, num_experts) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_a_simulated_fair_router_drops_as_much(factor):
    T, k, E, batches = 256, 2, 16, 1000
    limit = Capacity(factor).limit(T, T * k, E)
    loads = (torch.bincount(random_table(T, E, k, seed).flatten(), minlength=E) for seed in range(batches))
    rates = [(load - limit).clamp_min(0).sum().item() / (T * k) for load in loads]
    measured = torch.tensor(rates, dtype=torch.float64)
    error = measured.std().item() / math.sqrt(batches)
    expected = expected_drop_rate(factor, T, k, E)
    assert error < 0.05 * expected
    assert measured.mean().item() == pytest.approx(expected, abs=4 * error)


@given(
    num_tokens=st.integers(0, 3000),
    num_experts=st.integers(1, 64),
    factors=st.tuples(st.floats(0.01, 4), st.floats(0.01, 4)).map(sorted),
    data=st.data(),
)
def test_a_larger_factor_never_drops_more(num_tokens, num_experts, factors, data):
    k = data.draw(st.integers(1, num_experts))
    more, less = (expected_drop_rate(factor, num_tokens, k, num_experts) for factor in factors)
    assert 0 <= less <= more * (1 + 1e-11) < 1


def test_when_every_expert_gets_every_token_a_factor_of_1_loses_nothing():
    assert expected_drop_rate(1.0, 1000, 8, 8) == 0.0
    assert expected_drop_rate(1.0, 7, 1, 1) == 0.0
    # capacity ceil(0.75 * 1000) = 750 of 1000
    assert expected_drop_rate(0.75, 1000, 8, 8) == 0.25


@pytest.mark.parametrize("factor", [0.01, 1.0, 5.0])
def test_no_tokens_and_one_token_drop_nothing(factor):
    assert expected_drop_rate(factor, 0, 2, 8) == 0.0
    assert expected_drop_rate(factor, 1, 2, 8) == 0.0  # the capacity is at least 1


def test_far_tails_are_zero_and_a_tiny_factor_loses_nearly_all():
    assert expected_drop_rate(3.0, 10**6, 1, 8) == 0.0  # chances below the smallest float
    # capacity 1,250 of a fair load of 125,000
    assert expected_drop_rate(0.01, 10**6, 1, 8) == pytest.approx(0.99, rel=1e-12)


@given(
    drop_rate=st.sampled_from([0.3, 0.1, 0.01, 1e-3, 1e-6]),
    num_tokens=st.integers(0, 3000),
    num_experts=st.integers(1, 64),
    data=st.data(),
)
def test_the_factor_is_enough_and_the_next_smaller_one_is_not(drop_rate, num_tokens, num_experts, data):
    k = data.draw(st.integers(1, num_experts))
    factor = factor_for(drop_rate, num_tokens, k, num_experts)
    assert factor == round(factor, 2)
    assert expected_drop_rate(factor, num_tokens, k, num_experts) <= drop_rate
    if factor > 0.01:
        assert expected_drop_rate(round(factor - 0.01, 2), num_tokens, k, num_experts) > drop_rate


def test_factors_that_people_ask_for():
    # mu = 512: 0.1 % takes 1.07; 5 % are lost at 1.0 with mu = 64, so 1 % takes more
    assert factor_for(0.001, 4096, 8, 64) == 1.07
    assert 1.0 < factor_for(0.01, 4096, 1, 64) < 1.25
    assert factor_for(0.5, 0, 1, 8) == 0.01  # no tokens, no drops


@pytest.mark.parametrize("drop_rate", [0.0, 1.0, -0.1, float("nan")])
def test_a_drop_rate_is_a_share(drop_rate):
    with pytest.raises(
        ValueError, match=r"drop_rate: expected a share between 0 and 1, got .*; for no drops at all use"
    ):
        factor_for(drop_rate, 100, 1, 8)


@pytest.mark.parametrize("function", [expected_drop_rate, factor_for])
def test_sizes_must_make_sense(function):
    with pytest.raises(ValueError, match=r"num_tokens: expected at least 0, got -1; pass the tokens of one forward"):
        function(0.5, -1, 1, 8)
    for k in (0, 9):
        with pytest.raises(
            ValueError, match=rf"k: expected 1 to num_experts=8, got {k}; a token's experts are distinct"
        ):
            function(0.5, 10, k, 8)


def test_a_factor_is_above_0():
    with pytest.raises(ValueError, match=r"Capacity\.factor: expected more than 0, got 0"):
        expected_drop_rate(0, 10, 1, 8)
