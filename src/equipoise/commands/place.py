"""`equipoise place`: which rank should hold which experts, planned on one part of the traffic, scored on the rest."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from equipoise.commands.shown import Json, wide_console

if TYPE_CHECKING:
    from equipoise.plan import Cluster, Score, Traffic
    from equipoise.types import Placement

MAX_LAYERS_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Where experts may be."""

    ranks: int
    """Ranks that share the experts of each layer."""
    nodes: int = 1
    """Nodes that the ranks are on, equally many on each, in order."""
    replicas: int | None = None
    """Slots of a layer on all ranks together: each expert has one, hot ones have more. A multiple of ranks. Default: as
    few as hold all experts."""
    slots_per_rank: int | None = None
    """The same, by rank: what a rank has memory for."""

    def cluster(self, layers: Sequence[Traffic]) -> Cluster:
        """For the layer with the most experts. Raises ValueError for slots that are given twice."""
        from equipoise.plan import Cluster

        if self.replicas is not None and self.slots_per_rank is not None:
            raise ValueError("replicas, slots-per-rank: expected one of the two, got both; they say the same")
        if self.slots_per_rank is not None:
            return Cluster(self.ranks, max(self.ranks, 1) * self.slots_per_rank, self.nodes)
        fewest = -(-max(layer.num_experts for layer in layers) // max(self.ranks, 1)) * self.ranks
        return Cluster(self.ranks, fewest if self.replicas is None else self.replicas, self.nodes)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the traffic is read."""

    num_experts: int | None = None
    """Experts of each layer. Needed for recorded ids."""
    ignore_ids: tuple[int, ...] = ()
    """Ids in the file that mark slots without an expert."""
    text: int = 0
    """Batches of the run's validation text to route, instead of reading what the run recorded. Needs the checkpoint,
    and the text on this machine."""
    since: int = 0
    """Leave out what the run recorded before this step; routers that still learn are another model."""
    windows: int = 16
    """Of how many windows of time the traffic is made up, half of them to score on."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a placement is to be like."""

    slack: float = 1.02
    """1.05 allows a fullest rank 5 % above what load alone reaches, for fewer ranks per token."""
    move_price: float = 0.002
    """With --from: ranks per token that a slot must save to be moved."""
    earlier: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """An earlier placement.json: what it has stays where it can."""


def place(
    traffic: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    slots: Annotated[Slots, tyro.conf.OmitArgPrefixes],
    reading: Annotated[Reading, tyro.conf.OmitArgPrefixes] = Reading(),
    wish: Annotated[Wish, tyro.conf.OmitArgPrefixes] = Wish(),
    out: Path | None = None,
    json_: Json = False,
) -> int:
    """Which rank should hold which experts: balanced, with few ranks per token, and replicas for hot experts.

    Plans on the first half of the traffic and scores on the second, beside consecutive experts without replicas
    ("even") and a planner that knows load alone ("EPLB"). All of them choose between replicas by the same rule. The
    table: balance, the load of the fullest rank over the mean; ranks and nodes per token, what dispatch has to send;
    hops, the share of steps from layer to layer that stay on a rank or node; moved, slots to be copied.

    The traffic is a run folder (load of each flush, and who was chosen with whom if the run recorded it), or a file of
    recorded expert ids, as `equipoise diagnose` reads: .npz with `indices` (tokens, layers, k), and others. From load
    alone only balance can be planned. For a run with a checkpoint, --text 64 routes 64 batches of its validation text
    and knows all of it.

    For example: equipoise place runs/demo --ranks 16 --nodes 4 --replicas 96 --text 64 --out placement.json

    Args:
        traffic: The run folder, or the file.
        slots: Where experts may be.
        reading: How the traffic is read.
        wish: What a placement is to be like.
        out: Write the placement here, as JSON that a trainer or server applies.
        json_: Placement and scores as one JSON object, and nothing else.
    """
    from equipoise.plan import Aim, plan_layers, write_placements
    from equipoise.plan.placement_file import read_placements

    halves = _halves(traffic, reading)
    cluster = slots.cluster(halves.fit)
    earlier = None if wish.earlier is None else read_placements(wish.earlier)
    started = time.perf_counter()
    planned = plan_layers(halves.fit, cluster, earlier, Aim(wish.slack, wish.move_price))
    seconds = time.perf_counter() - started
    scores = _scores(halves, cluster, planned, earlier)
    slot_bytes = _slot_bytes(traffic)
    if out is not None:
        write_placements(out, planned, cluster.num_nodes)
    if json_:
        print(json.dumps(_fields(halves, cluster, planned, scores) | {"seconds": seconds, "slot_bytes": slot_bytes}))
        return 0
    _print(scores, slot_bytes)
    size = f"{cluster.num_ranks} ranks on {cluster.num_nodes} nodes, {cluster.slots_per_rank} slots each"
    print(f"\n{size}; planned in {seconds:.2f} s on {halves.planned_on}, scored on {halves.scored_on}")
    for note in halves.notes:
        print(note)
    if out is not None:
        print(f"placement  {out}")
    return 0


# ---------------------------------------------------------------------------------------------------- the traffic


@dataclass(frozen=True, eq=False)
class _Halves:
    """fit: to plan on. held_out: what came later, to score on. planned_on, scored_on: in words. notes: what lacks."""

    fit: list[Traffic]
    held_out: list[Traffic]
    planned_on: str
    scored_on: str
    notes: tuple[str, ...] = ()


def _halves(path: Path, reading: Reading) -> _Halves:
    if reading.windows < 2:
        raise ValueError(f"windows: expected 2 or more, half to plan on and half to score on, got {reading.windows}")
    if reading.text:
        from equipoise.train.choices import choices_of_run

        return _of_choices(*choices_of_run(path, reading.text), reading.windows)
    if path.is_dir() or path.suffix == ".sqlite":
        return _of_run(path, reading)
    return _of_choices(*_recorded(path, reading), reading.windows)


def _of_choices(ids: Mapping[str, np.ndarray], num_experts: Mapping[str, int], windows: int) -> _Halves:
    from equipoise.plan import traffic_of_ids

    fit, held_out = [], []
    first = windows // 2
    for layer, ids_TK in ids.items():
        cut = len(ids_TK) * first // windows
        fit.append(traffic_of_ids(layer, ids_TK[:cut], num_experts[layer], first))
        held_out.append(traffic_of_ids(layer, ids_TK[cut:], num_experts[layer], windows - first))
    lengths = [[len(each.ids_TK) for each in part if each.ids_TK is not None] for part in (fit, held_out)]
    told = [
        f"{max(length):,} tokens in {number} windows"
        for length, number in zip(lengths, (first, windows - first), strict=True)
    ]
    return _Halves(fit, held_out, told[0], f"the {told[1]} after them")


def _recorded(path: Path, reading: Reading) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    from equipoise.monitor.recorded_files import Counts, Layout, read

    found = read(path, Layout())
    if isinstance(found, Counts):
        raise ValueError(
            f"{path}: expected expert ids, got counts: they are one window, and nothing is left to score on; "
            "record ids (`indices` in .npz), or plan from a run folder"
        )
    if reading.num_experts is None:
        raise ValueError("num-experts: needed with recorded expert ids: experts that nobody chose are in no file")
    parts: dict[int, list[np.ndarray]] = {}
    for number, ids_TK, present_TK in found:
        counted_TK = present_TK & ~np.isin(ids_TK, reading.ignore_ids)
        if ((ids_TK < 0) & counted_TK).any():
            raise ValueError(
                f"{path}: layer {number}: expected expert ids of 0 and more, got {ids_TK[counted_TK].min()}; "
                "pass ids that mark padding as --ignore-ids"
            )
        parts.setdefault(number, []).append(np.where(counted_TK, ids_TK, -1))
    ids = {f"layers.{number}": np.concatenate(_same_width(parts[number])) for number in sorted(parts)}
    return ids, dict.fromkeys(ids, reading.num_experts)


def _same_width(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    width = max(part.shape[1] for part in parts)
    return [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1) for part in parts]


def _of_run(path: Path, reading: Reading) -> _Halves:
    from equipoise.monitor.store import RunStore
    from equipoise.plan import Traffic

    with RunStore.open_readonly(path) as store, store.snapshot():
        steps = [step for step in store.flush_steps() if step >= reading.since]
        if len(steps) < 2:
            raise ValueError(
                f"{path}: expected routing of at least 2 flushes since step {reading.since}, one to plan on and one to "
                f"score on, got {len(steps)}; let the run go on, lower --since, or route text with --text"
            )
        groups = [group.tolist() for group in np.array_split(steps, min(reading.windows, len(steps)))]
        first = len(groups) // 2
        parts: list[list[Traffic]] = [[], []]
        for layer in store.layers():
            load_by_step = {stats.step: stats.counts_E for stats in store.routing_history(layer)}
            for part, chosen in zip(parts, (groups[:first], groups[first:]), strict=True):
                load_WE = _summed(load_by_step, chosen)
                pairs_EE, num_tokens = _pairs(store, layer, chosen[0][0], chosen[-1][-1])
                part.append(Traffic(layer, load_WE, pairs_EE, num_tokens))
    told = [f"steps {part[0][0]} to {part[-1][-1]}" for part in (groups[:first], groups[first:])]
    notes = []
    if any(each.pairs_EE is None for each in parts[0]):
        notes.append(
            "the run did not record which experts were chosen together: only load was planned. Record it "
            "(watch(..., co_selection=256)), or route text with --text 64"
        )
    return _Halves(parts[0], parts[1], told[0], told[1], tuple(notes))


def _summed(load_by_step: Mapping[int, np.ndarray], groups: Sequence[Sequence[int]]) -> np.ndarray:
    """int64 (W, E): windows in which the layer has load."""
    sums = [[load_by_step[step] for step in group if step in load_by_step] for group in groups]
    windows = [np.sum(window, axis=0) for window in sums if window]
    return np.stack([window for window in windows if window.sum()] or windows)


def _pairs(store: Any, layer: str, first: int, last: int) -> tuple[np.ndarray | None, int]:
    """Pairs of experts, and the tokens that they are of, summed over the flushes that kept them."""
    total, num_tokens = None, 0
    while (found := store.latest_co_selection(layer, at=last)) is not None and found.step >= first:
        total = found.counts_EE if total is None else total + found.counts_EE
        num_tokens += found.num_tokens
        last = found.step - 1
    return (total, num_tokens) if num_tokens else (None, 0)


def _slot_bytes(path: Path) -> int | None:
    """Bytes of an expert in the run's precision on disk, float32; None for what is no run of ours."""
    if not (path / "config.json").is_file():
        return None
    from equipoise.ops.activation import is_gated
    from equipoise.train.loop import load_config

    config = load_config(path).model
    if config.moe is None:
        return None
    return 4 * (3 if is_gated(config.expert_activation) else 2) * config.dim * config.moe.hidden_dim


# ------------------------------------------------------------------------------------------------------ the answer

_Scores = Mapping[str, "list[Score]"]


def _scores(
    halves: _Halves, cluster: Cluster, planned: Mapping[str, Placement], earlier: Mapping[str, Placement] | None
) -> _Scores:
    """By the name of the planner, on the windows held out."""
    from equipoise.plan import eplb_placement, score_layers
    from equipoise.types import Placement

    sizes = (cluster.num_slots, cluster.num_ranks, cluster.num_nodes)
    rivals: dict[str, Mapping[str, Placement]] = {
        "even": {each.layer: Placement.even(each.num_experts, cluster.num_ranks) for each in halves.fit},
        "EPLB": {each.layer: eplb_placement(each.load_WE.sum(axis=0).astype(float), *sizes) for each in halves.fit},
    }
    if earlier is not None:
        rivals["earlier"] = earlier
    rivals["planned"] = planned
    return {
        name: score_layers(placements, halves.held_out, cluster.num_nodes, earlier)
        for name, placements in rivals.items()
    }


def _mean(scores: Sequence[Score], name: str) -> float | None:
    values = [getattr(score, name) for score in scores]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


NUMBERS = ("balance", "fan_out", "node_fan_out", "rank_hops", "node_hops", "moved")


def _fields(halves: _Halves, cluster: Cluster, planned: Mapping[str, Placement], scores: _Scores) -> dict[str, object]:
    return {
        "cluster": asdict(cluster),
        "planned_on": halves.planned_on,
        "scored_on": halves.scored_on,
        "notes": halves.notes,
        "mean": {who: {number: _mean(each, number) for number in NUMBERS} for who, each in scores.items()},
        "layers": [
            {
                "layer": layer,
                "slots": placement.slots,
                "scores": {who: asdict(each[index]) for who, each in scores.items()},
            }
            for index, (layer, placement) in enumerate(planned.items())
        ],
    }


def _print(scores: _Scores, slot_bytes: int | None) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("layer", "placement"):
        table.add_column(name)
    for name in ("balance", "ranks/token", "nodes/token", "hops on rank", "on node", "slots moved", "bytes moved"):
        table.add_column(name, justify="right")
    num_layers = len(scores["planned"])
    for index in range(min(num_layers, MAX_LAYERS_SHOWN)):
        for who, each in scores.items():
            first = who == next(iter(scores))
            cells = [getattr(each[index], number) for number in NUMBERS]
            table.add_row(each[index].layer if first else "", who, *_cells(cells, slot_bytes))
    for who, each in scores.items():
        cells = [_mean(each, number) for number in NUMBERS]
        table.add_row("mean" if who == next(iter(scores)) else "", who, *_cells(cells, slot_bytes), style="bold")
    wide_console().print(table)
    if num_layers > MAX_LAYERS_SHOWN:
        print(f"{num_layers - MAX_LAYERS_SHOWN} more layers are in the mean, and in --json")


def _cells(numbers: Sequence[float | None], slot_bytes: int | None) -> list[str]:
    balance, fan_out, node_fan_out, rank_hops, node_hops, moved = numbers
    plain = ["-" if value is None else f"{value:.2f}" for value in (balance, fan_out, node_fan_out)]
    shares = ["-" if value is None else f"{value:.1%}" for value in (rank_hops, node_hops)]
    slots = "-" if moved is None else f"{moved:.0f}"
    size = "-" if moved is None or slot_bytes is None else f"{moved * slot_bytes / 1e6:.1f} MB"
    return [*plain, *shares, slots, size]
