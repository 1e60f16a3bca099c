"""Tables for hash routing: distinct experts, determinism, balance on Zipf frequencies, a plain twin of the greedy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from equipoise.routing.hash_tables import balanced_table, random_table


def zipf(vocab_size: int) -> Tensor:
    """fp64 shares of token ids by rank: p_r = (1/r) / sum 1/r. For 50,000 ids the first has 8.77 %."""
    weights = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    return weights / weights.sum()


def max_violation(table_VK: Tensor, frequencies_V: Tensor, num_experts: int) -> float:
    """Largest load over the mean, minus 1."""
    k = table_VK.shape[1]
    loads = torch.bincount(table_VK.flatten(), frequencies_V.repeat_interleave(k), minlength=num_experts)
    return (loads.max() / loads.mean() - 1).item()


def greedy_by_hand(frequencies: list[float], num_experts: int, k: int) -> list[list[int]]:
    """The definition: look at all loads, each time."""
    loads, table = [0] * num_experts, [[] for _ in frequencies]
    by_frequency = sorted(range(len(frequencies)), key=lambda token: (-frequencies[token], token))
    for token in by_frequency:
        if frequencies[token] == 0:
            break
        lightest = sorted(range(num_experts), key=lambda expert: (loads[expert], expert))
        table[token] = lightest[:k]
        for expert in table[token]:
            loads[expert] += frequencies[token]
    lightest = sorted(range(num_experts), key=lambda expert: (loads[expert], expert))
    turn = 0
    for token in by_frequency:
        while frequencies[token] == 0 and len(table[token]) < k:
            table[token].append(lightest[turn % num_experts])
            turn += 1
    return table


def test_hand_worked():
    # 5 -> 0; 4 -> 1 (load 0); 3 -> 2 (load 0); 2 -> 2 (3 is least of 5, 4, 3); 1 -> 1 (4 is least of 5, 4, 5)
    assert balanced_table(torch.tensor([5, 4, 3, 2, 1]), 3, 1).tolist() == [[0], [1], [2], [2], [1]]
    # k = 2: 9 -> 0, 1 (loads 9 9 0); 2 -> 2, 0 (11 9 2); 1 -> 2, 1
    assert balanced_table(torch.tensor([1, 9, 2]), 3, 2).tolist() == [[2, 1], [0, 1], [2, 0]]


@given(
    counts=st.lists(st.integers(0, 5), max_size=25),
    num_experts=st.integers(1, 6),
    data=st.data(),
)
def test_balanced_is_the_greedy_of_its_definition(counts, num_experts, data):
    k = data.draw(st.integers(1, num_experts))
    table = balanced_table(torch.tensor(counts, dtype=torch.int64), num_experts, k)
    assert table.dtype == torch.int64
    assert table.shape == (len(counts), k)
    assert table.tolist() == greedy_by_hand(counts, num_experts, k)


@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (4, 1), (8, 3), (8, 8), (64, 6)])
@pytest.mark.parametrize("kind", ["random", "balanced"])
def test_experts_of_an_id_are_distinct_and_exist(kind, num_experts, k):
    table = random_table(999, num_experts, k, seed=1) if kind == "random" else balanced_table(zipf(999), num_experts, k)
    assert table.shape == (999, k)
    assert table.dtype == torch.int64
    assert table.min() >= 0
    assert table.max() < num_experts
    assert (table.sort(1).values.diff(dim=1) > 0).all()


def test_random_is_the_same_for_the_same_seed_and_leaves_other_generators_alone():
    before = torch.get_rng_state()
    first, again, other = (random_table(500, 16, 2, seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_gives_every_ordered_choice_equally_often():
    # 4 experts, k = 2: 12 ordered pairs, 60,000 ids, 5,000 each with a standard deviation of sqrt(5000 * 11/12) = 68
    table = random_table(60_000, 4, 2, seed=0)
    pairs = torch.bincount(table[:, 0] * 4 + table[:, 1], minlength=16).view(4, 4)
    assert pairs.diagonal().tolist() == [0, 0, 0, 0]
    off_diagonal = pairs[~torch.eye(4, dtype=torch.bool)]
    assert (off_diagonal - 5000).abs().max() < 5 * 68


def test_random_does_not_repeat_itself_from_chunk_to_chunk():
    table = random_table(3 * 2**14, 2**8, 1, seed=0)  # 2**14 rows per chunk
    parts = table.view(3, -1)
    assert not torch.equal(parts[0], parts[1])
    assert not torch.equal(parts[1], parts[2])


@pytest.mark.parametrize(
    # lower bound p1 E - 1: -0.30 and 4.62. Random, 20 seeds: mean 0.64 and 5.49, from 0.32 to 1.36 and 5.1 to 6.4
    ("num_experts", "random_low", "random_high", "greedy"),
    [(8, 0.3, 1.4, 0.0), (64, 5.0, 6.5, 0.08774 * 64 - 1)],
)
def test_max_violation_on_zipf_frequencies(num_experts, random_low, random_high, greedy):
    frequencies = zipf(50_000)
    bound = frequencies[0].item() * num_experts - 1
    for seed in range(3):
        drawn = max_violation(random_table(50_000, num_experts, 1, seed), frequencies, num_experts)
        assert max(bound, random_low) < drawn < random_high
    found = max_violation(balanced_table(frequencies, num_experts, 1), frequencies, num_experts)
    assert found == pytest.approx(greedy, abs=1e-3)
    assert found >= bound - 1e-12


def test_more_experts_per_id_lower_the_bound():
    # k distinct experts share the first id: p1 E / k - 1 = 0.08774 * 64 / 2 - 1
    found = max_violation(balanced_table(zipf(50_000), 64, 2), zipf(50_000), 64)
    assert found == pytest.approx(0.08774 * 32 - 1, abs=1e-3)


def test_ids_that_were_never_seen_are_spread():
    frequencies = torch.cat([torch.tensor([7.0, 1.0]), torch.zeros(1000)])
    unseen = balanced_table(frequencies, 8, 2)[2:]
    assert torch.bincount(unseen.flatten()).tolist() == [250] * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int32, torch.uint8])
def test_any_real_dtype(dtype):
    assert balanced_table(torch.tensor([1, 3, 2], dtype=dtype), 2, 1).tolist() == [[1], [0], [1]]


def test_no_token_ids():
    assert random_table(0, 4, 2, seed=0).shape == (0, 2)
    assert balanced_table(torch.empty(0), 4, 2).shape == (0, 2)


def test_tables_are_made_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        tables = random_table(5, 4, 2, seed=0), balanced_table(torch.ones(5, device="cpu"), 4, 2)
    assert [table.device.type for table in tables] == ["cpu", "cpu"]


@pytest.mark.parametrize("k", [0, 5])
def test_k_must_be_possible(k):
    message = rf"k: expected 1 to num_experts=4 distinct experts per token id, got {k}; lower k or add experts"
    with pytest.raises(ValueError, match=message):
        random_table(10, 4, k, seed=0)
    with pytest.raises(ValueError, match=message):
        balanced_table(torch.ones(10), 4, k)


def test_sizes_and_frequencies_must_make_sense():
    with pytest.raises(ValueError, match=r"vocab_size: expected at least 0, got -1; pass the number of token ids"):
        random_table(-1, 4, 1, seed=0)
    with pytest.raises(ValueError, match=r"frequencies_V: expected one number per token id, got shape \(2, 3\)"):
        balanced_table(torch.ones(2, 3), 4, 1)
    for bad in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=rf"frequencies_V: expected finite numbers of at least 0, got {bad}; pass"):
            balanced_table(torch.tensor([1.0, bad]), 4, 1)
