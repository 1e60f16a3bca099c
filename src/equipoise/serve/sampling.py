"""Choosing the next token of each row of logits: pure functions of the row, its history and one random number.

A row's choice does not depend on the other rows. The random number follows from seed and position, so that a sequence
that is computed again continues as it would have.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from equipoise.serve.request import Logprob, Sampling

_COLDEST = 1e-5  # below, the likeliest is taken: dividing by so little leaves nothing else


class Row(NamedTuple):
    """What the choice depends on besides the logits. tokens: so far, the prompt's num_prompt first."""

    sampling: Sampling
    tokens: Sequence[int]
    num_prompt: int


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that follows from both (Philox, Salmon et al. 2011)."""
    raw = np.random.Philox(key=seed % 2**64, counter=position).random_raw()
    return float(raw >> 11) * 2.0**-53  # the leading 53 bits: as many as a float holds


def choose(logits_NV: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row. logits_NV: any float type; they are not changed."""
    logits_NV = logits_NV.float()
    if any(row.sampling.changes_logits for row in rows):
        logits_NV = logits_NV.clone()
        for logits_V, row in zip(logits_NV, rows, strict=True):
            _penalise(logits_V, row)
    chosen = likeliest(logits_NV)
    drawn = [n for n, row in enumerate(rows) if row.sampling.temperature >= _COLDEST]
    if drawn:
        for n, id in zip(drawn, _draw(logits_NV[drawn], [rows[n] for n in drawn]), strict=True):
            chosen[n] = id
    return chosen


def likeliest(logits_NV: Tensor) -> list[int]:
    """Of each row; the first where several are. On a CPU numpy is several times faster than torch."""
    largest = logits_NV.numpy().argmax(-1) if logits_NV.device.type == "cpu" else logits_NV.argmax(-1)
    ids: list[int] = largest.tolist()
    return ids


def all_finite(logits_NV: Tensor) -> list[bool]:
    """Whether a row has neither NaN nor infinity. On a CPU numpy is ten times faster than torch."""
    finite = np.isfinite(logits_NV.numpy()) if logits_NV.device.type == "cpu" else logits_NV.isfinite()
    rows: list[bool] = finite.all(-1).tolist()
    return rows


def _penalise(logits_V: Tensor, row: Row) -> None:
    """In place."""
    sampling = row.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.tokens)), device=logits_V.device)
        values = logits_V[seen]
        factor = sampling.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / factor, values * factor)
    if sampling.presence_penalty or sampling.frequency_penalty:
        times = Counter(row.tokens[row.num_prompt :])
        _add(logits_V, {id: -sampling.presence_penalty - n * sampling.frequency_penalty for id, n in times.items()})
    _add(logits_V, sampling.logit_bias)


def _add(logits_V: Tensor, values: Mapping[int, float]) -> None:
    if values:
        ids = torch.tensor(list(values), device=logits_V.device)
        logits_V[ids] += torch.tensor(list(values.values()), dtype=logits_V.dtype, device=logits_V.device)


def _draw(logits_NV: Tensor, rows: Sequence[Row]) -> list[int]:
    """By inverting the cumulative distribution at one random number per row."""
    scaled_NV = logits_NV / _column([row.sampling.temperature for row in rows], logits_NV)
    filtered = [n for n, row in enumerate(rows) if row.sampling.filters]
    if filtered:
        scaled_NV[filtered] = _filtered(scaled_NV[filtered], [rows[n].sampling for n in filtered])
    upto_NV = scaled_NV.softmax(-1).cumsum(-1, dtype=torch.float64)
    points = [uniform(row.sampling.seed, len(row.tokens) - row.num_prompt) for row in rows]
    ids_N = torch.searchsorted(upto_NV, _column(points, upto_NV) * upto_NV[:, -1:], right=True)[:, 0]
    beyond_N = ids_N >= logits_NV.shape[1]  # a point that rounding has put on the end
    return torch.where(beyond_N, scaled_NV.argmax(-1), ids_N).tolist()


def _filtered(scaled_NV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """-inf in place of the tokens that are left out. The likeliest always stays; ties with the last kept do too."""
    num_ids = scaled_NV.shape[1]
    sorted_NV = _descending(scaled_NV)
    kth_N1 = torch.tensor([[min(each.top_k or num_ids, num_ids) - 1] for each in samplings], device=scaled_NV.device)
    least_N1 = sorted_NV.gather(1, kth_N1)
    if any(each.top_p < 1.0 for each in samplings):
        top_p_N1 = _column([each.top_p for each in samplings], scaled_NV)
        least_N1 = torch.where(top_p_N1 < 1.0, _nucleus_end(sorted_NV, least_N1, top_p_N1), least_N1)
    below_best = [math.log(each.min_p) if each.min_p else -math.inf for each in samplings]
    least_N1 = least_N1.maximum(sorted_NV[:, :1] + _column(below_best, scaled_NV))
    return scaled_NV.masked_fill(scaled_NV < least_N1, -torch.inf)


def _nucleus_end(sorted_NV: Tensor, least_N1: Tensor, top_p_N1: Tensor) -> Tensor:
    """The smallest among the fewest logits whose probability reaches top_p (arXiv 1904.09751, section 3.1), of those
    that are not below `least_N1` already."""
    probs_NV = sorted_NV.masked_fill(sorted_NV < least_N1, -torch.inf).softmax(-1)
    upto_NV = probs_NV.cumsum(-1, dtype=torch.float64)
    not_enough_N1 = (upto_NV < top_p_N1).sum(-1, keepdim=True).clamp(max=sorted_NV.shape[1] - 1)
    return sorted_NV.gather(1, not_enough_N1).maximum(least_N1)


def _descending(values_NV: Tensor) -> Tensor:
    """Each row sorted. On a CPU numpy's sort is tens of times faster than torch's, or its topk."""
    if values_NV.device.type != "cpu":
        return values_NV.sort(dim=-1, descending=True).values
    return -torch.from_numpy(np.sort(-values_NV.numpy(), axis=-1))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def logprobs_of(logits_NV: Tensor, ids: Sequence[int], num_top: Sequence[int]) -> list[Logprob]:
    """ln p of the tokens that were chosen, and of the num_top likeliest of each row."""
    logp_NV = logits_NV.float().log_softmax(-1)
    index_N1 = torch.tensor(ids, device=logits_NV.device)[:, None]
    chosen = logp_NV.gather(1, index_N1)[:, 0].tolist()
    most = max(num_top, default=0)
    values, tops = (each.tolist() for each in logp_NV.topk(most)) if most else ([()] * len(ids), [()] * len(ids))
    return [
        Logprob(id, logprob, tuple(zip(top[:number], value[:number], strict=True)))
        for id, logprob, top, value, number in zip(ids, chosen, tops, values, num_top, strict=True)
    ]
