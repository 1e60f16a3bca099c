"""What one step of simulated ranks takes: dispatch, experts and combine in each layer, and the bytes on each link.

The ranks go through a step together, as collectives make them. In each layer
- a token's row goes once to each other rank that holds one of its experts, and a sum comes back;
- an exchange takes alpha + bytes / beta: a rank's experts begin when its last row is there, and each sender's flows
  all end together;
- a rank computes its experts one after another, and what was spilled on it in its shared expert;
- results go back when a rank is done, and the next layer begins when all have all results.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from equipoise.plan.fleet.scenario import Machines, ModelShape

Array = np.ndarray
ALIKE = 12  # measured steps that one is taken from


@dataclass(frozen=True, eq=False)
class Step:
    """seconds: of the whole. expert_s: of the busiest rank's experts, summed over layers; link_s: of exchanges, as far
    as they take longer than that. sent_R: bytes that each rank sends, and as many that it gets. busy_R: seconds that
    each rank computes. copies: rows sent to other ranks, one way."""

    seconds: float
    expert_s: float
    link_s: float
    sent_R: Array
    busy_R: Array
    copies: int


@dataclass(frozen=True, eq=False)
class Done:
    """A step, with what became of its assignments. no_room: those that fit nowhere and were spilled or dropped."""

    step: Step
    tokens: int
    assignments: int
    moved: int
    no_room: int


def step(
    model: ModelShape, machines: Machines, holder_LER: Array, ids_LTK: Array, fits_LTK: Array, home_T: Array
) -> Step:
    """A step of tokens whose queries are on the ranks home_T.

    holder_LER: int64 (L, E, R), the rank that computes expert e for the tokens of rank r. fits_LTK: False where an
    assignment goes to no expert; with overflow "shared" the token's own rank computes it, once per assignment.
    """
    layers, tokens, _ = ids_LTK.shape
    _, experts, ranks = holder_LER.shape
    layer_L11 = np.arange(layers)[:, None, None]
    rank_LTK = holder_LER[layer_L11, ids_LTK, home_T[None, :, None]]
    at_home_TR = home_T[:, None] == np.arange(ranks)
    to_LTR = np.zeros((layers, tokens, ranks), dtype=bool)
    layer_N, token_N, _ = np.nonzero(fits_LTK)
    to_LTR[layer_N, token_N, rank_LTK[fits_LTK]] = True  # once, whatever the number of its experts there
    to_LTR &= ~at_home_TR
    in_LR = to_LTR.sum(axis=1)
    out_LR = to_LTR.sum(axis=2) @ at_home_TR
    keys_LTK = (layer_L11 * ranks + rank_LTK) * experts + ids_LTK
    rows_LRE = np.bincount(keys_LTK[fits_LTK], minlength=layers * ranks * experts).reshape(layers, ranks, experts)
    busy_LR = _work(machines, model.row_flops, rows_LRE)
    if model.overflow == "shared" and not fits_LTK.all():
        spilled_LR = (~fits_LTK).sum(axis=2) @ at_home_TR
        busy_LR = busy_LR + _work(machines, model.row_flops, spilled_LR[:, :, None])
    layer_L = _layer_seconds(machines, model.row_bytes, in_LR, out_LR, busy_LR)
    expert_s = float(busy_LR.max(axis=1).sum())
    return Step(
        seconds=machines.step_s + float(layer_L.sum()) + layers * machines.rest_s,
        expert_s=expert_s,
        link_s=float(layer_L.sum()) - expert_s,
        sent_R=(in_LR + out_LR).sum(axis=0) * model.row_bytes,
        busy_R=busy_LR.sum(axis=0),
        copies=int(in_LR.sum()),
    )


def varied(spread: tuple[tuple[float, float], ...], seconds: float, rng: np.random.Generator) -> float:
    """How many times as long as its costs a step of so many seconds takes: as one of the ALIKE nearest measured ones.

    spread: as in `Machines`; without one 1, and nothing is drawn.
    """
    if not spread:
        return 1.0
    first = bisect_left(spread, (seconds,)) - ALIKE // 2
    first = max(min(first, len(spread) - ALIKE), 0)
    alike = spread[first : first + ALIKE]
    return alike[int(rng.integers(len(alike)))][1]


def _work(machines: Machines, row_flops: int, rows_LRE: Array) -> Array:
    """Seconds (L, R) of experts with so many rows; one without takes nothing."""
    cost = machines.expert
    seconds_LR: Array = (rows_LRE > 0).sum(axis=2) * cost.start_s + rows_LRE.sum(axis=2) * (row_flops / cost.rate)
    return seconds_LR


def _layer_seconds(machines: Machines, row_bytes: int, in_LR: Array, out_LR: Array, busy_LR: Array) -> Array:
    """Seconds (L,) from the first row sent to the last result back. in_LR, out_LR: rows that ranks get and send."""
    ranks = in_LR.shape[1]
    if ranks == 1:
        return np.asarray(busy_LR[:, 0])
    cost, cores = machines.exchange(ranks), machines.cores
    row_s = row_bytes / cost.rate
    most_out_L1 = out_LR.max(axis=1, keepdims=True)
    there_LR = cost.start_s + np.maximum(in_LR, most_out_L1) * row_s
    done_LR = there_LR + busy_LR
    if (
        cores is not None and cores < ranks
    ):  # they share: no rank is done before its work, nor the last before all of it
        all_done_L = there_LR.min(axis=1) + busy_LR.sum(axis=1) / cores
        done_LR = done_LR + np.maximum(all_done_L - done_LR.max(axis=1), 0)[:, None]
    # back: rank r sends what it got; a rank gets as many results as it sent rows, the first when the first is done
    last_sender_L = (done_LR + in_LR * row_s).max(axis=1)
    last_receiver_L = done_LR.min(axis=1) + most_out_L1[:, 0] * row_s
    counts_s = cost.start_s if machines.counts_first else 0.0
    return np.asarray(counts_s + np.maximum(last_sender_L, last_receiver_L) + cost.start_s)
