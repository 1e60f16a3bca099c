"""Placement of experts against EPLB, on windows that neither has seen, and how long planning takes.

Three kinds of traffic, each planned on its first half and scored on its second: `bundles`, small blocks of experts that
fire together and domains that prefer some blocks; `domains`, blocks of 16 that only share a domain; and the choices of
a trained model on real text. In both synthetic kinds the mix of domains wanders. python -m benchmarks.placement
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from equipoise.bench.harness import Effort, Spread, Variant, spread, time_side_by_side
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.plan import Aim, Cluster, Score, Traffic, eplb_placement, plan_layers, score_layers, traffic_of_ids
from equipoise.plan.replicas import copies_in
from equipoise.routing import SwitchLoss, TopK
from equipoise.train.choices import choices_of_run
from equipoise.train.config import TrainConfig
from equipoise.train.recipes import RECIPES
from equipoise.train.report import Silent
from equipoise.train.run import train
from equipoise.types import Placement

NUM_WINDOWS = 16
SLACKS = (1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.07, 1.1, 1.2, 1.4, 2.0)
AIM = 15.0  # percent fewer ranks per token than EPLB's
AS_BALANCED = 1.0  # percent: what is within it is called as balanced


@dataclass(frozen=True)
class Size:
    """Of the synthetic traffic. tokens: of one window."""

    experts: int = 256
    top_k: int = 8
    tokens: int = 2048
    domains: int = 16
    bundle: int = 4


@dataclass(frozen=True, eq=False)
class Load:
    """Some layers' traffic in two halves, and what to place it on."""

    name: str
    fit: Sequence[Traffic]
    held_out: Sequence[Traffic]
    clusters: Sequence[Cluster]


# ----------------------------------------------------------------------------------------------------- the traffic


def bundles(size: Size, seed: int) -> np.ndarray:
    """int64 (T, K). Experts in bundles that a token takes as a whole; each domain prefers some bundles."""
    rng = np.random.default_rng([seed, 0])
    num_bundles = size.experts // size.bundle
    likes_DB = rng.normal(0, 0.5, num_bundles) + rng.normal(0, 1.2, (size.domains, num_bundles))
    popular_E, order_E = rng.normal(0, 0.3, size.experts), rng.permutation(size.experts)
    windows = []
    for domain_T in _domains(size, rng):
        wants_TB = likes_DB[domain_T] + rng.gumbel(size=(size.tokens, num_bundles))
        wants_TE = np.repeat(wants_TB, size.bundle, axis=1) + popular_E
        windows.append(order_E[_top(wants_TE + 0.5 * rng.gumbel(size=wants_TE.shape), size.top_k)])
    return np.concatenate(windows)


def domains(size: Size, seed: int) -> np.ndarray:
    """int64 (T, K). A token takes experts of its domain's block, which fire together only because of the domain."""
    rng = np.random.default_rng([seed, 1])
    block_E = rng.permutation(np.arange(size.experts) % size.domains)
    likes_DE = rng.normal(0, 0.7, size.experts) + rng.normal(0, 0.5, (size.domains, size.experts))
    likes_DE += 3.0 * (block_E == np.arange(size.domains)[:, None])
    windows = [
        _top(likes_DE[domain_T] + rng.gumbel(size=(size.tokens, size.experts)), size.top_k)
        for domain_T in _domains(size, rng)
    ]
    return np.concatenate(windows)


def _domains(size: Size, rng: np.random.Generator) -> list[np.ndarray]:
    """The domain of each token, by window; the mix is a random walk."""
    mix_D, found = rng.normal(0, 0.6, size.domains), []
    for _ in range(NUM_WINDOWS):
        mix_D = 0.95 * mix_D + rng.normal(0, 0.3, size.domains)
        found.append(rng.choice(size.domains, size=size.tokens, p=np.exp(mix_D) / np.exp(mix_D).sum()))
    return found


def _top(wants_TE: np.ndarray, k: int) -> np.ndarray:
    return np.argpartition(-wants_TE, k, axis=1)[:, :k]


def synthetic(name: str, layers: Sequence[np.ndarray], size: Size, clusters: Sequence[Cluster]) -> Load:
    """Layers that know nothing of each other."""
    return _halved(name, {f"layer {number}": ids for number, ids in enumerate(layers)}, size.experts, clusters)


def _halved(name: str, ids: Mapping[str, np.ndarray], num_experts: int, clusters: Sequence[Cluster]) -> Load:
    half = NUM_WINDOWS // 2
    fit = [traffic_of_ids(layer, each[: len(each) // 2], num_experts, half) for layer, each in ids.items()]
    held_out = [traffic_of_ids(layer, each[len(each) // 2 :], num_experts, half) for layer, each in ids.items()]
    return Load(name, fit, held_out, clusters)


def trained(run: Path | None, smoke: bool) -> Load:
    """Choices of a run's model on its validation text, documents of all domains in random order."""
    if run is not None:
        return _of_run(run, "trained run")
    config = RECIPES["tiny"]() if smoke else small_model()
    with tempfile.TemporaryDirectory() as folder:
        train(replace(config, steps=30) if smoke else config, Path(folder) / "run", Silent())
        return _of_run(Path(folder) / "run", "trained model")


def small_model() -> TrainConfig:
    """The recipe `tiny` with 4 layers of 32 experts, 4 per token, on all domains."""
    tiny = RECIPES["tiny"]()
    moe = replace(tiny.model.moe, num_experts=32, hidden_dim=32, router=TopK(k=4), balance=(SwitchLoss(coef=0.02),))
    return replace(tiny, model=replace(tiny.model, num_layers=4, moe=moe), steps=400)


def _of_run(run: Path, name: str) -> Load:
    ids, num_experts = choices_of_run(run, max_batches=64)
    experts = max(num_experts.values())
    clusters = [Cluster(ranks, ranks * (experts // ranks + 1), nodes) for ranks, nodes in ((4, 2), (8, 2))]
    return _halved(name, ids, experts, clusters)


# -------------------------------------------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Point:
    """Of some layers on the windows held out, on average. fan_out: ranks per token."""

    balance: float
    fan_out: float


def scored(placements: Mapping[str, Placement], load: Load, cluster: Cluster) -> Point:
    """With the rule of this project for the copy that a token takes."""
    scores = score_layers(placements, load.held_out, cluster.num_nodes)
    return Point(mean(scores, "balance"), mean(scores, "fan_out"))


def scored_in_turn(placements: Mapping[str, Placement], load: Load) -> Point:
    """As placements of EPLB are used: copies take turns, wherever the token's other experts are.

    vLLM takes "a pseudo-random replica" (vllm/model_executor/layers/fused_moe/router/base_router.py), SGLang a random
    one, or one fixed for the sender (sglang/srt/eplb/expert_location_dispatch.py).
    """
    balances, fan_outs = [], []
    for layer in load.held_out:
        copies = copies_in(placements[layer.layer])
        for ids_TK in layer.windows:
            tokens_T1 = np.arange(len(ids_TK))[:, None]
            ranks_TK = copies.ranks_EX[ids_TK, tokens_T1 % copies.num_E[ids_TK]]
            load_R = np.bincount(ranks_TK.reshape(-1), minlength=copies.num_ranks)
            hit_TR = np.zeros((len(ids_TK), copies.num_ranks), dtype=bool)
            hit_TR[tokens_T1, ranks_TK] = True
            balances.append(load_R.max() / load_R.mean())
            fan_outs.append(hit_TR.sum() / len(ids_TK))
    return Point(float(np.mean(balances)), float(np.mean(fan_outs)))


def eplb(load: Load, cluster: Cluster) -> dict[str, Placement]:
    """EPLB's placements by layer, from the windows seen."""
    sizes = (cluster.num_slots, cluster.num_ranks, cluster.num_nodes)
    return {each.layer: eplb_placement(each.load_WE.sum(axis=0).astype(float), *sizes) for each in load.fit}


def mean(scores: Sequence[Score], name: str) -> float:
    """Over the layers that have it; NaN where none has."""
    values = [value for value in (getattr(score, name) for score in scores) if value is not None]
    return float(np.mean(values)) if values else float("nan")


def compared(load: Load, cluster: Cluster) -> tuple[Cell, ...]:
    """A row: balance and fan-out on the windows held out, and what is gained on EPLB."""
    announce(f"{load.name}: {cluster.num_ranks} ranks, {cluster.num_slots} slots")
    even = {each.layer: Placement.even(each.num_experts, cluster.num_ranks) for each in load.fit}
    theirs = eplb(load, cluster)
    in_turn, planned = scored_in_turn(theirs, load), scored(plan_layers(load.fit, cluster), load, cluster)
    points = (scored(even, load, cluster), in_turn, scored(theirs, load, cluster), planned)
    balanced, fewer = 100 * (planned.balance / in_turn.balance - 1), 100 * (1 - planned.fan_out / in_turn.fan_out)
    reached = "yes" if fewer >= AIM and balanced <= AS_BALANCED else "no"
    cells = (*(each.balance for each in points), *(each.fan_out for each in points))
    return (f"{load.name}, {cluster.num_ranks} ranks", cluster.num_slots, *cells, balanced, fewer, reached)


@dataclass(frozen=True)
class Trade:
    """What balance buys: with more and more slack, planned on what was seen, and as if all had been seen."""

    load: Load
    cluster: Cluster
    planned: Sequence[Point]
    had_seen: Sequence[Point]
    eplb: Point
    eplb_in_turn: Point


def traded(load: Load, cluster: Cluster) -> Trade:
    """Plan with every slack, twice."""
    announce(f"{load.name}: what balance buys on {cluster.num_ranks} ranks")
    planned, had_seen = (
        [scored(plan_layers(seen, cluster, aim=Aim(slack=slack)), load, cluster) for slack in SLACKS]
        for seen in (load.fit, load.held_out)
    )
    theirs = eplb(load, cluster)
    return Trade(load, cluster, planned, had_seen, scored(theirs, load, cluster), scored_in_turn(theirs, load))


def trade_row(trade: Trade) -> tuple[Cell, ...]:
    """The fewest ranks per token, in percent below EPLB's, by how much less balanced than EPLB's it may be."""
    in_turn, as_balanced = trade.eplb_in_turn, 1 + AS_BALANCED / 100

    def fewest(of: Sequence[Point], more: float) -> float | None:
        enough = [100 * (1 - each.fan_out / in_turn.fan_out) for each in of if each.balance <= more * in_turn.balance]
        return max(enough, default=None)

    cells = [fewest(trade.planned, more) for more in (as_balanced, 1.05, 1.1)]
    return (f"{trade.load.name}, {trade.cluster.num_ranks} ranks", *cells, fewest(trade.had_seen, as_balanced))


def planning_seconds(layers: Sequence[Traffic], cluster: Cluster, effort: Effort) -> Spread:
    """Of one call for all layers."""
    announce(f"planning {len(layers)} layers")
    return spread(time_side_by_side([Variant("plan", lambda: plan_layers(layers, cluster))], effort)["plan"])


def draw(trades: Sequence[Trade], path: Path) -> None:
    """Balance against fan-out, an axis for each kind of traffic; down and to the left is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(trade.load.name for trade in trades))
    figure = Figure(figsize=(4.3 * len(names), 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        mine = [trade for trade in trades if trade.load.name == name]
        for trade, colour in zip(mine, ("#1f77b4", "#d95f02"), strict=False):
            for points, style, size, who in (
                (trade.planned, "o-", 4, "planned"),
                ([trade.eplb], "x", 8, "EPLB, our rule"),
                ([trade.eplb_in_turn], "X", 10, "EPLB"),
            ):
                at = [each.fan_out for each in points], [each.balance for each in points]
                label = f"{who}, {trade.cluster.num_ranks} ranks"
                axes.plot(*at, style, color=colour, markersize=size, label=label)
        axes.set(title=name, xlabel="ranks per token", ylabel="fullest rank / mean, windows not seen")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


COLUMNS = (
    "traffic", "slots", "balance: even", "EPLB", "EPLB, our rule", "planned",
    "ranks per token: even", "EPLB ", "EPLB, our rule ", "planned ",
    "less balanced than EPLB [%]", "fewer ranks than EPLB [%]", "aim reached",
)  # fmt: skip


TRADE_COLUMNS = (
    "traffic", f"{AS_BALANCED:.0f} % fuller [%]", "5 % fuller [%]", "10 % fuller [%]", "1 % fuller, had it seen [%]",
)  # fmt: skip


def main() -> None:
    """Compare, time, draw and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.placement", description=__doc__)
    parser.add_argument("--run", type=Path, help="a run folder with a checkpoint, instead of training a small model")
    parser.add_argument("--layers", type=int, default=6, help="layers of each synthetic kind")
    parser.add_argument("--timed-layers", type=int, default=61, help="layers to time planning with")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing")
    parser.add_argument("--picture", type=Path, default=Path("docs/img/placement.png"), help="where to draw")
    add_output_arguments(parser)
    options = parser.parse_args()
    size, clusters = Size(), [Cluster(16, 320), Cluster(64, 320)]
    timed, effort = Cluster(64, 320), Effort(options.rounds, warmup=1)
    if options.smoke:
        size, clusters = Size(experts=32, top_k=4, tokens=256, domains=4), [Cluster(4, 40), Cluster(8, 40)]
        options.layers, options.timed_layers, timed, effort = 2, 2, Cluster(8, 40), Effort(2, warmup=1)
        options.picture = Path(tempfile.mkdtemp()) / "placement.png"
    seeds = range(options.layers)
    loads = [
        synthetic("bundles", [bundles(size, seed) for seed in seeds], size, clusters),
        synthetic("domains", [domains(size, seed) for seed in seeds], size, clusters),
        trained(options.run, options.smoke),
    ]
    pairs = [(load, cluster) for load in loads for cluster in load.clusters]
    rows = tuple(compared(load, cluster) for load, cluster in pairs)
    trades = [traded(load, cluster) for load, cluster in pairs]
    many = [
        replace(loads[0].fit[number % options.layers], layer=str(number), ids_TK=None)
        for number in range(options.timed_layers)
    ]
    seconds = planning_seconds(many, timed, effort)
    draw(trades, options.picture)
    sizes = f"{len(many)} layers of {size.experts} experts, {timed.num_slots} slots on {timed.num_ranks} ranks"
    tables = (
        Table(
            "On windows not seen",
            COLUMNS,
            rows,
            f"EPLB: its copies take turns. Aim: {AIM:.0f} % fewer ranks per token than that, and as balanced, within "
            f"{AS_BALANCED:.0f} %.",
        ),
        Table(
            "Fewer ranks per token than EPLB, by what balance may cost",
            TRADE_COLUMNS,
            tuple(trade_row(trade) for trade in trades),
            "Placements with other slack; - where none is so balanced. Last: planned on what it is scored on.",
        ),
        Table("Planning", ("what", "time [s]"), ((sizes, seconds),), "From load and pairs; one call for all layers."),
    )
    settings = {"windows": NUM_WINDOWS, "tokens per window": size.tokens, "layers of each kind": options.layers}
    emit(Report(settings, tables, (f"picture: {options.picture.name}",)), options)


if __name__ == "__main__":
    main()
