"""Choosing the next token of each row of logits: pure functions of the row, its history and one random number.

A row's choice does not depend on the other rows. The random number follows from seed and position, so that a sequence
that is computed again continues as it would have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equipoise.serve.request import Logprob, Sampling

_COLDEST = 1e-5  # below, the likeliest is taken: dividing by so little leaves nothing else
_FIRST_LOOK = 256  # likeliest tokens among which the nucleus usually is


@dataclass(frozen=True)
class Row:
    """What the choice depends on besides the logits. tokens: so far, the prompt's num_prompt first."""

    sampling: Sampling
    tokens: Sequence[int]
    num_prompt: int


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that follows from both (Philox, Salmon et al. 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position)).random())


def choose(logits_NV: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row. logits_NV: any float type; they are not changed."""
    logits_NV = logits_NV.float()
    if any(row.sampling.changes_logits for row in rows):
        logits_NV = logits_NV.clone()
        for logits_V, row in zip(logits_NV, rows, strict=True):
            _penalise(logits_V, row)
    chosen: list[int] = logits_NV.argmax(-1).tolist()
    drawn = [n for n, row in enumerate(rows) if row.sampling.temperature >= _COLDEST]
    if drawn:
        for n, id in zip(drawn, _draw(logits_NV[drawn], [rows[n] for n in drawn]), strict=True):
            chosen[n] = id
    return chosen


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
    temperature_N1 = torch.tensor([[row.sampling.temperature] for row in rows], device=logits_NV.device)
    scaled_NV = logits_NV / temperature_N1
    for scaled_V, row in zip(scaled_NV, rows, strict=True):
        if row.sampling.filters:
            _filter(scaled_V, row.sampling)
    upto_NV = scaled_NV.softmax(-1).cumsum(-1, dtype=torch.float64)
    points = [[uniform(row.sampling.seed, len(row.tokens) - row.num_prompt)] for row in rows]
    points_N1 = torch.tensor(points, dtype=torch.float64, device=logits_NV.device) * upto_NV[:, -1:]
    ids_N = torch.searchsorted(upto_NV, points_N1, right=True)[:, 0]
    beyond_N = ids_N >= logits_NV.shape[1]  # a point that rounding has put on the end
    return torch.where(beyond_N, scaled_NV.argmax(-1), ids_N).tolist()


def _filter(scaled_V: Tensor, sampling: Sampling) -> None:
    """Put -inf in place of the tokens that are left out. The likeliest always stays; ties with the last kept do too."""
    if sampling.top_k is not None and sampling.top_k < len(scaled_V):
        scaled_V[scaled_V < scaled_V.topk(sampling.top_k).values[-1]] = -torch.inf
    if sampling.top_p < 1.0:
        scaled_V[scaled_V < _nucleus_end(scaled_V, sampling.top_p)] = -torch.inf
    if sampling.min_p > 0.0:
        scaled_V[scaled_V < scaled_V.max() + float(np.log(sampling.min_p))] = -torch.inf


def _nucleus_end(scaled_V: Tensor, top_p: float) -> Tensor:
    """The smallest logit among the fewest whose probability reaches top_p (arXiv 1904.09751, section 3.1)."""
    total = scaled_V.logsumexp(-1)
    for size in (_FIRST_LOOK, len(scaled_V)):
        values_k = scaled_V.topk(min(size, len(scaled_V))).values
        upto_k = (values_k - total).exp().cumsum(-1)
        inside = int((upto_k < top_p).sum())  # so many are not enough
        if inside < len(values_k):
            return values_k[inside]
    return values_k[-1]


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
