"""What a placement is worth on some traffic: balance, fan-out, hops that stay, and what it costs to get there.

Where the choices are known, all of it is counted, with the rule of replicas.py. Where only counts are, ranks are as
full as rank_load.py estimates, and the fan-out is the lower bound of swaps.py from pairs; hops are not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from equipoise.plan.placement import holdings
from equipoise.plan.rank_load import fixed_parts, rank_loads
from equipoise.plan.replicas import homes, ranks_of_choices
from equipoise.plan.traffic import Traffic
from equipoise.types import Placement

PIECE = 8192  # tokens at once: what is held per token and rank would not fit otherwise


@dataclass(frozen=True)
class Score:
    """One layer. None: not known from this traffic.

    balance: load of the fullest rank over the mean rank's, mean over the windows; 1 is best, the number of ranks worst.
    fan_out: distinct ranks per token, its own among them: what dispatch sends. node_fan_out: distinct nodes.
    rank_hops, node_hops: of all pairs of an expert of this layer and one of the layer before that a token goes to,
    the share on one rank, on one node. moved: slots that hold an expert which an earlier placement had elsewhere.
    """

    layer: str
    balance: float
    fan_out: float | None
    node_fan_out: float | None
    rank_hops: float | None
    node_hops: float | None
    moved: int | None


def score_layers(
    placements: Mapping[str, Placement],
    layers: Sequence[Traffic],
    num_nodes: int = 1,
    earlier: Mapping[str, Placement] | None = None,
) -> list[Score]:
    """A score for each layer of the traffic. Tokens lie on ranks as `homes` says.

    Raises ValueError where a placement is missing or has another number of experts than the traffic, or nodes do not
    divide its ranks.
    """
    scores: list[Score] = []
    before: Traffic | None = None
    for layer in layers:
        placement = _checked(placements, layer, num_nodes)
        moved = None if earlier is None else num_moved(earlier[layer.layer], placement)
        if layer.ids_TK is None:
            scores.append(_from_counts(layer, placement, num_nodes, moved))
        else:
            last = None if before is None else placements[before.layer]
            scores.append(_from_choices(layer, placement, num_nodes, moved, (before, last)))
        before = layer
    return scores


def num_moved(earlier: Placement, later: Placement) -> int:
    """Slots of the later placement whose expert was not on that rank: what must be sent over the network."""
    return int((holdings(later) & ~holdings(earlier)).sum())


def _checked(placements: Mapping[str, Placement], layer: Traffic, num_nodes: int) -> Placement:
    if layer.layer not in placements:
        raise ValueError(f"placement: expected layer {layer.layer}, got {', '.join(placements) or 'none'}")
    placement = placements[layer.layer]
    if placement.num_experts != layer.num_experts:
        raise ValueError(
            f"placement of layer {layer.layer}: expected {layer.num_experts} experts, as its traffic has, got "
            f"{placement.num_experts}"
        )
    if num_nodes < 1 or placement.num_ranks % num_nodes:
        raise ValueError(f"nodes: expected a divisor of {placement.num_ranks} ranks, got {num_nodes}")
    return placement


# ------------------------------------------------------------------------------------------------------ from choices


def _from_choices(
    layer: Traffic,
    placement: Placement,
    num_nodes: int,
    moved: int | None,
    last: tuple[Traffic | None, Placement | None],
) -> Score:
    balances, hits, stays, first = [], np.zeros(2), np.zeros(3), 0
    before, before_placement = last
    before_windows = before.windows if before is not None else []
    linked = before_placement is not None and [len(part) for part in before_windows] == [
        len(part) for part in layer.windows
    ]
    for number, ids_TK in enumerate(layer.windows):
        load_R = np.zeros(placement.num_ranks)
        homes_T = homes(len(ids_TK), placement.num_ranks)
        for piece in (slice(at, at + PIECE) for at in range(0, len(ids_TK), PIECE)):
            goes_TR = _goes(placement, ids_TK[piece], homes_T[piece])
            load_R += goes_TR.sum(axis=0)
            hits += [(goes_TR > 0).sum(), (_by_node(goes_TR, num_nodes) > 0).sum()]
            if linked and before_placement is not None:
                came_TR = _goes(before_placement, before_windows[number][piece], homes_T[piece])
                stays += [
                    (came_TR * goes_TR).sum(),
                    (_by_node(came_TR, num_nodes) * _by_node(goes_TR, num_nodes)).sum(),
                    (came_TR.sum(axis=1) * goes_TR.sum(axis=1)).sum(),
                ]
        balances.append(load_R.max() / load_R.mean())
        first += int((ids_TK >= 0).any(axis=1).sum())
    rank_hops, node_hops = (stays[:2] / stays[2]).tolist() if stays[2] else (None, None)
    fan_out, node_fan_out = (hits / first).tolist()
    return Score(layer.layer, float(np.mean(balances)), fan_out, node_fan_out, rank_hops, node_hops, moved)


def _goes(placement: Placement, ids_TK: np.ndarray, homes_T: np.ndarray) -> np.ndarray:
    """int64 (T, R): how many of a token's experts are computed on each rank."""
    ranks_TK = ranks_of_choices(placement, ids_TK, homes_T)
    T, width = len(ids_TK), placement.num_ranks + 1
    places_TK = np.arange(T)[:, None] * width + np.where(ranks_TK < 0, placement.num_ranks, ranks_TK)
    counted: np.ndarray = np.bincount(places_TK.reshape(-1), minlength=T * width).reshape(T, width)[:, :-1]
    return counted


def _by_node(goes_TR: np.ndarray, num_nodes: int) -> np.ndarray:
    summed: np.ndarray = goes_TR.reshape(len(goes_TR), num_nodes, -1).sum(axis=2)
    return summed


# ------------------------------------------------------------------------------------------------------- from counts


def _from_counts(layer: Traffic, placement: Placement, num_nodes: int, moved: int | None) -> Score:
    held_RE = holdings(placement)
    load_WR = rank_loads(fixed_parts(held_RE, layer.pairs_EE), layer.load_WE)
    balance = float((load_WR.max(axis=1) / load_WR.mean(axis=1)).mean())
    fan_outs: tuple[float | None, float | None] = (None, None)
    if layer.pairs_EE is not None and layer.num_pair_tokens:
        node_NE = np.asarray(held_RE.reshape(num_nodes, -1, layer.num_experts).any(axis=1))
        fan_outs = _hit_packs(held_RE, layer), _hit_packs(node_NE, layer)
    return Score(layer.layer, balance, *fan_outs, None, None, moved)


def _hit_packs(held_PE: np.ndarray, layer: Traffic) -> float:
    """Sum over packs of n^2 / q, per token: see swaps.py."""
    assert layer.pairs_EE is not None
    copies_E = held_PE.sum(axis=0)
    pairs_EE = layer.pairs_EE / np.minimum(copies_E[:, None], copies_E)
    n_P = held_PE @ np.diag(pairs_EE)
    q_P = np.einsum("pe,ef,pf->p", held_PE.astype(np.float64), pairs_EE, held_PE.astype(np.float64))
    hit = q_P > 0
    return float((n_P[hit] ** 2 / q_P[hit]).sum() / layer.num_pair_tokens)
