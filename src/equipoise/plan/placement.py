"""Places the experts of each layer: least fan-out among placements that are as balanced as load alone makes them.

1. How many copies of whom: to the largest load per copy, one by one (packing.py).
2. A start: longest first, each copy to the lightest rank that does not hold the expert; what an earlier placement has
   stays where it can.
3. Swaps of two slots (swaps.py): balance counts much at first, then less and less, and the last arrangement is kept
   that on the windows seen, and should loads drift on (drift.py), is hardly less balanced than the start.
4. Ranks onto nodes by the same search; then, as names of ranks are free, those that keep most tokens on their rank and
   node from the layer before (labels.py). An earlier placement fixes the names instead.

Each layer is planned on its own, in a few hundredths of a second for 256 experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from equipoise.plan.cluster import Cluster
from equipoise.plan.drift import drift_covariance
from equipoise.plan.labels import renamed
from equipoise.plan.packing import copies_of
from equipoise.plan.rank_load import even_parts
from equipoise.plan.swaps import Descent, Packing
from equipoise.plan.traffic import Traffic, pairs_of_ids
from equipoise.types import Placement

REACH = 2.0  # standard deviations of the windows seen, for those to come
# of balance against ranks per token, the strictest first
WEIGHTS = (16.0, 8.0, 5.0, 3.2, 2.0, 1.3, 0.8, 0.5, 0.3, 0.15)


@dataclass(frozen=True)
class Aim:
    """What to weigh.

    slack: how full the fullest rank may be on the windows seen, relative to what load alone reaches: 1.02 allows 2 %
    more, for less fan-out. move_price: ranks per token that a slot must save to be moved away from
    where an earlier placement has it.
    """

    slack: float = 1.02
    move_price: float = 0.002

    def __post_init__(self) -> None:
        if not self.slack >= 1:
            raise ValueError(f"slack: expected 1 or more, got {self.slack}; 1 allows no less balance than load alone")
        if not self.move_price >= 0:
            raise ValueError(f"move_price: expected 0 or more ranks per token, got {self.move_price}")


def plan_layers(
    layers: Sequence[Traffic],
    cluster: Cluster,
    earlier: Mapping[str, Placement] | None = None,
    aim: Aim = Aim(),
) -> dict[str, Placement]:
    """A placement by layer, in the order of the layers, which is that of the model.

    Raises ValueError for fewer slots than experts, for replicas that would need a rank to hold an expert twice, and
    for an earlier placement that lacks a layer or has other numbers of ranks or experts.
    """
    placements: dict[str, Placement] = {}
    before: Traffic | None = None
    for layer in layers:
        old = None if earlier is None else _earlier(layer, cluster, earlier)
        slots_RS = _slots(layer, cluster, old, aim)
        if old is None:
            slots_RS = _named(layer, slots_RS, before, placements, cluster)
        placements[layer.layer] = Placement(tuple(tuple(sorted(rank)) for rank in slots_RS.tolist()))
        before = layer
    return placements


def _earlier(layer: Traffic, cluster: Cluster, earlier: Mapping[str, Placement]) -> Placement:
    if layer.layer not in earlier:
        raise ValueError(
            f"earlier placement: expected layer {layer.layer}, got {', '.join(earlier) or 'none'}; "
            "it is of another model, plan without it"
        )
    old = earlier[layer.layer]
    for what, expected, got in (
        ("ranks", cluster.num_ranks, old.num_ranks),
        ("experts", layer.num_experts, old.num_experts),
    ):
        if got != expected:
            raise ValueError(
                f"earlier placement: layer {layer.layer}: expected {expected} {what}, got {got}; "
                "plan without it, or for its sizes"
            )
    return old


def _slots(layer: Traffic, cluster: Cluster, old: Placement | None, aim: Aim) -> np.ndarray:
    """int64 (R, S/R): the experts of each rank; ranks have no names yet, unless an earlier placement gave them."""
    load_E = layer.load_WE.sum(axis=0).astype(np.float64)
    try:
        copies_E = copies_of(load_E, cluster.num_slots, most=cluster.num_ranks)
    except ValueError as error:
        raise ValueError(f"layer {layer.layer}: {error}") from error
    held_RE = None if old is None else holdings(old)
    reference_RS = start(load_E / copies_E, copies_E, cluster)
    begin_RS = reference_RS if held_RE is None else start(load_E / copies_E, copies_E, cluster, held_RE)
    drift_EE = REACH**2 * drift_covariance(layer.load_WE, layer.pairs_EE, layer.num_pair_tokens)
    packing = _packing(layer, drift_EE, reference_RS, copies_E)
    if held_RE is not None:
        packing = replace(packing, there_PI=held_RE, price=aim.move_price)
    return _least_fan_out(Descent(packing, begin_RS), reference_RS, layer, drift_EE, aim)


def _packing(layer: Traffic, drift_EE: np.ndarray, reference_RS: np.ndarray, copies_E: np.ndarray) -> Packing:
    """Copies share their expert's load evenly; a token takes two experts on one rank wherever both have a copy there.

    So of the tokens that chose both i and j, a rank with a copy of both gets 1 / min(copies): all, if one of them has
    no other copy. Load is in units of the reference's fullest rank in the same window: beyond 1 it is felt.
    """
    load_WE = layer.load_WE / layer.load_WE.sum(axis=1, keepdims=True) / copies_E
    fullest_W = load_WE[:, reference_RS].sum(axis=2).max(axis=1)
    drift_EE = (drift_EE / copies_E / copies_E[:, None] / fullest_W.mean() ** 2).astype(np.float32)
    load_WE = (load_WE / fullest_W[:, None]).astype(np.float32)
    if layer.pairs_EE is None or not layer.num_pair_tokens:
        return Packing(np.zeros(layer.num_experts, dtype=np.float32), None, load_WE, drift_EE)
    share_E = (np.diag(layer.pairs_EE) / layer.num_pair_tokens / copies_E).astype(np.float32)
    together_EE = np.minimum(copies_E[:, None], copies_E) * layer.num_pair_tokens
    return Packing(share_E, (layer.pairs_EE / together_EE).astype(np.float32), load_WE, drift_EE)


def _least_fan_out(
    descent: Descent, reference_RS: np.ndarray, layer: Traffic, drift_EE: np.ndarray, aim: Aim
) -> np.ndarray:
    """The last arrangement, as balance counts less and less, that is balanced enough; the last step is a half one.

    The reference, where none is: the start from load alone. With an earlier placement that would move most slots, so
    then it is the first one.
    """
    limit = aim.slack * _fullest(reference_RS, layer, drift_EE)

    def enough(found: Descent) -> bool:
        return bool((_fullest(found.items_PS, layer, drift_EE) <= limit).all())

    best: Descent | None = None
    good, bad = WEIGHTS[0], None
    for number, weight in enumerate(WEIGHTS):
        descent.run(weight)
        balanced = enough(descent)
        if balanced or (number == 0 and descent.packing.there_PI is not None):
            best, good = descent.copy(), weight
        if not balanced and number > 1:
            bad = weight
            break
    if best is None:
        return reference_RS
    if bad is not None:
        between = best.copy()
        between.run((good * bad) ** 0.5)
        if enough(between):
            best = between
    return best.items_PS


def _fullest(slots_RS: np.ndarray, layer: Traffic, drift_EE: np.ndarray) -> np.ndarray:
    """Share of the load on the fullest rank: mean over the windows seen; and where each drifts as far as it may.

    As if copies had equal parts. Levelled ones (levels.py) make up for what is left, on the day; looked for here, the
    search would use it up beforehand, and traffic that is not as seen would find nothing left.
    """
    part_RE = even_parts(_held(slots_RS, layer.num_experts))
    share_WE = layer.load_WE / layer.load_WE.sum(axis=1, keepdims=True)
    load_WR = share_WE @ part_RE.T
    drift_R = np.sqrt(((part_RE @ drift_EE) * part_RE).sum(axis=1).clip(min=0))
    return np.array([load_WR.max(axis=1).mean(), (load_WR.mean(axis=0) + drift_R).max()])


def start(load_E: np.ndarray, copies_E: np.ndarray, cluster: Cluster, held_RE: np.ndarray | None = None) -> np.ndarray:
    """int64 (R, S/R): longest first, the copies of an expert to the lightest ranks that have room.

    load_E: of one copy. held_RE: bool, what ranks hold already: it stays, the most loaded experts first, as far as
    there are copies and room.
    """
    ranks: list[list[int]] = [[] for _ in range(cluster.num_ranks)]
    load_R = np.zeros(cluster.num_ranks)
    full_R = np.zeros(cluster.num_ranks, dtype=bool)
    missing_E = copies_E.copy()

    def place(expert: int, chosen_r: np.ndarray) -> None:
        for rank in chosen_r.tolist():
            ranks[rank].append(expert)
            full_R[rank] = len(ranks[rank]) == cluster.slots_per_rank
        load_R[chosen_r] += load_E[expert]
        missing_E[expert] -= len(chosen_r)

    order_E = np.argsort(-load_E, kind="stable").tolist()
    if held_RE is not None:
        for expert in order_E:
            stays_r = np.flatnonzero(held_RE[:, expert] & ~full_R)
            place(expert, stays_r[np.argsort(load_R[stays_r], kind="stable")][: missing_E[expert]])
    for expert in order_E:
        holds_r = [rank for rank in range(cluster.num_ranks) if expert in ranks[rank]] if held_RE is not None else []
        key_R = np.where(full_R, np.inf, load_R)
        key_R[holds_r] = np.inf
        lightest_r = np.argsort(key_R, kind="stable")[: missing_E[expert]]
        place(expert, lightest_r[np.isfinite(key_R[lightest_r])])
    for expert in np.flatnonzero(missing_E).tolist():
        for _ in range(missing_E[expert]):
            _make_room(ranks, expert, cluster.slots_per_rank)
    return np.array(ranks, dtype=np.int64)


def _make_room(ranks: list[list[int]], expert: int, room: int) -> None:
    """All ranks with room hold the expert already: another one moves there from a rank that does not."""
    open_rank = next(rank for rank in ranks if len(rank) < room)
    for rank in ranks:
        movable = [other for other in rank if other not in open_rank]
        if expert not in rank and movable:  # it has more experts than the open one, so there is one to move
            rank.remove(movable[-1])
            rank.append(expert)
            open_rank.append(movable[-1])
            return


def holdings(placement: Placement) -> np.ndarray:
    """bool (R, E): which rank holds which expert."""
    held_RE = np.zeros((placement.num_ranks, placement.num_experts), dtype=bool)
    for rank, experts in enumerate(placement.slots):
        held_RE[rank, list(experts)] = True
    return held_RE


# ------------------------------------------------------------------------------------------------ which rank is which


def _named(
    layer: Traffic, slots_RS: np.ndarray, before: Traffic | None, placed: Mapping[str, Placement], cluster: Cluster
) -> np.ndarray:
    """The same ranks in another order: those of a node together, and each where most tokens of the layer before are."""
    if cluster.num_nodes > 1:
        slots_RS = _on_nodes(layer, slots_RS, cluster)
    if before is None or before.ids_TK is None or layer.ids_TK is None or len(before.ids_TK) != len(layer.ids_TK):
        return slots_RS
    stride = -(-len(layer.ids_TK) // layer.num_pair_tokens)
    hops_EE = pairs_of_ids(before.ids_TK[::stride], before.num_experts, layer.ids_TK[::stride], layer.num_experts)
    from_RE, to_RE = even_parts(holdings(placed[before.layer])), even_parts(_held(slots_RS, layer.num_experts))
    return np.asarray(slots_RS[renamed(from_RE @ hops_EE @ to_RE.T, cluster.num_nodes)])


def _on_nodes(layer: Traffic, slots_RS: np.ndarray, cluster: Cluster) -> np.ndarray:
    """Ranks in the order of nodes: the search of swaps.py, with ranks for items and nodes for packs."""
    held_RE = _held(slots_RS, layer.num_experts)
    part_RE = even_parts(held_RE)
    load_WR = (layer.load_WE / layer.load_WE.sum(axis=1, keepdims=True) @ part_RE.T * cluster.num_nodes).astype(
        np.float32
    )
    pairs_RR = None
    share_R = np.zeros(cluster.num_ranks, dtype=np.float32)
    if layer.pairs_EE is not None and layer.num_pair_tokens:
        pairs_RR = (part_RE @ layer.pairs_EE @ part_RE.T / layer.num_pair_tokens).astype(np.float32)
        share_R = np.diag(pairs_RR).copy()
    unknown_RR = np.zeros((cluster.num_ranks, cluster.num_ranks), dtype=np.float32)
    descent = Descent(
        Packing(share_R, pairs_RR, load_WR, unknown_RR), np.arange(cluster.num_ranks).reshape(cluster.num_nodes, -1)
    )
    descent.run(WEIGHTS[-1])
    return np.asarray(slots_RS[descent.items_PS.reshape(-1)])


def _held(slots_RS: np.ndarray, num_experts: int) -> np.ndarray:
    held_RE = np.zeros((len(slots_RS), num_experts), dtype=bool)
    held_RE[np.arange(len(slots_RS))[:, None], slots_RS] = True
    return held_RE
