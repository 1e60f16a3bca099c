"""Histogram quantiles against exact sorting."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.ops.count import count_assignments
from equipoise.ops.histogram import EPS, LIMIT, NUM_BINS, symlog_bins, upper_quantile

# Edges lie evenly in log(1 + |x| / EPS), 2 log(1 + LIMIT / EPS) / NUM_BINS apart; a value's bin is thus at most this
# factor of |x| + EPS wide. 1 % more for values that fp32 logarithms put into the neighbouring bin.
WIDTH = 1.01 * math.expm1(2 * math.log1p(LIMIT / EPS) / NUM_BINS)


def histogram(values_ET: torch.Tensor) -> torch.Tensor:
    return torch.stack([count_assignments(symlog_bins(row), NUM_BINS) for row in values_ET])


def test_the_width_is_what_the_docstring_says():
    assert pytest.approx(0.034, abs=1e-3) == WIDTH


@given(
    values=st.lists(st.floats(-7.75, 7.75, width=32), min_size=1, max_size=60),
    spread=st.sampled_from([1.0, 1e-2, 1e-4]),
    data=st.data(),
)
def test_quantile_is_within_one_bin_of_the_exact_one(values, spread, data):
    row = torch.tensor(values, dtype=torch.float32) * spread
    rank = data.draw(st.integers(0, len(values) - 1))
    quantile = upper_quantile(histogram(row[None]), torch.tensor(rank)).item()
    exact = row.sort(descending=True).values[rank].item()  # `rank` entries lie above it
    assert abs(quantile - exact) <= WIDTH * (abs(exact) + EPS)


def test_values_spread_over_one_bin_are_interpolated():
    row = torch.linspace(4.02, 4.11, 81)
    (index,) = symlog_bins(row).unique().tolist()
    low, high = (lower_edge(edge) for edge in (index, index + 1))
    for rank in (0, 20, 60, 80):
        quantile = upper_quantile(histogram(row[None]), torch.tensor(rank)).item()
        assert quantile == pytest.approx(high - rank / 81 * (high - low), abs=1e-4)


def lower_edge(index: int) -> float:
    """The lower edge of a bin in the upper half, from the module's docstring."""
    return EPS * math.expm1((2 * index / NUM_BINS - 1) * math.log1p(LIMIT / EPS))


@given(scale=st.floats(1e-4, 1.0), seed=st.integers(0, 1000))
def test_many_values_are_interpolated_within_a_bin(scale, seed):
    row = torch.randn(4096, generator=torch.Generator().manual_seed(seed)) * scale
    for rank in (512, 2048, 3584):
        quantile = upper_quantile(histogram(row[None]), torch.tensor(rank)).item()
        assert abs((row > quantile).sum().item() - rank) <= 16 + 0.01 * 4096


def test_histograms_of_parts_add_up():
    row = torch.randn(1, 300)
    parts = histogram(row[:, :100]) + histogram(row[:, 100:])
    assert torch.equal(upper_quantile(parts, torch.tensor(75)), upper_quantile(histogram(row), torch.tensor(75)))


def test_values_beyond_the_limit_count_in_the_last_bins():
    assert symlog_bins(torch.tensor([-1000.0, 0.0, 1000.0])).tolist() == [0, NUM_BINS // 2, NUM_BINS - 1]
