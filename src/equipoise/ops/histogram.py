"""Quantiles from a histogram: bounded memory, adds up over micro-batches and ranks, no sorting.

Bins are spaced evenly in sign(x) log(1 + |x| / EPS): fine near zero, where scores crowd, and wide enough for
the logits of a saturated router. A quantile is off by at most its bin, about 3.4 % of its distance from zero plus EPS.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from equipoise.ops.count import accumulate_counts

NUM_BINS = 1024
EPS = 1e-5
LIMIT = 256.0  # margins of logits stay well inside; what lies beyond counts in the last bin
_SPAN = math.log1p(LIMIT / EPS)


def symlog_bins(values: Tensor) -> Tensor:
    """int64 bin of each value, same shape."""
    position = values.sign() * torch.log1p(values.abs() / EPS) / _SPAN  # [-1, 1]
    return ((position + 1) * (NUM_BINS / 2)).long().clamp_(0, NUM_BINS - 1)


def accumulate_values(histogram_EC: Tensor, values_TE: Tensor) -> None:
    """Add each column's values to its row of histogram_EC (E, NUM_BINS), int64; nothing in a recomputed forward."""
    offsets_E = NUM_BINS * torch.arange(values_TE.shape[1], device=values_TE.device)
    accumulate_counts(histogram_EC.view(-1), (symlog_bins(values_TE) + offsets_E).view(-1))


def _edges(device: torch.device) -> Tensor:
    position = torch.linspace(-1, 1, NUM_BINS + 1, dtype=torch.float64, device=device)
    return position.sign() * torch.expm1(position.abs() * _SPAN) * EPS


def upper_quantile(histogram_EC: Tensor, rank: Tensor) -> Tensor:
    """fp32 (E,): the value that `rank` of each row's entries lie above, interpolated within its bin.

    histogram_EC: int64 counts (E, NUM_BINS). rank: scalar tensor, 0 <= rank <= entries of a row.
    """
    above_EC = histogram_EC.flip(1).cumsum(1).flip(1).double()  # entries in this bin or a higher one
    index_E = ((above_EC > rank).sum(1) - 1).clamp_min(0)
    in_bin_E = histogram_EC.gather(1, index_E[:, None])[:, 0].double()
    over_E = above_EC.gather(1, index_E[:, None])[:, 0] - rank  # this bin's entries that lie below the rank
    fraction_E = (over_E / in_bin_E.clamp_min(1)).clamp(0, 1)
    edges = _edges(histogram_EC.device)
    return torch.lerp(edges[index_E], edges[index_E + 1], fraction_E).float()
