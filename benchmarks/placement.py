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
from equipoise.routing import SwitchLoss, TopK
from equipoise.train.choices import choices_of_run
from equipoise.train.config import TrainConfig
from equipoise.train.recipes import RECIPES
from equipoise.train.report import Silent
from equipoise.train.run import train
from equipoise.types import Placement

NUM_WINDOWS = 16
SLACKS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 2.0)
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


def rivals(load: Load, cluster: Cluster, aim: Aim) -> dict[str, Mapping[str, Placement]]:
    """Placements by planner."""
    return {
        "even": {each.layer: Placement.even(each.num_experts, cluster.num_ranks) for each in load.fit},
        "EPLB": {
            each.layer: eplb_placement(
                each.load_WE.sum(axis=0).astype(float), cluster.num_slots, cluster.num_ranks, cluster.num_nodes
            )
            for each in load.fit
        },
        "planned": plan_layers(load.fit, cluster, aim=aim),
    }


def mean(scores: Sequence[Score], name: str) -> float:
    """Over the layers that have it; NaN where none has."""
    values = [value for value in (getattr(score, name) for score in scores) if value is not None]
    return float(np.mean(values)) if values else float("nan")


def compared(load: Load, cluster: Cluster) -> tuple[Cell, ...]:
    """A row: balance and fan-out on the windows held out, and what is gained on EPLB."""
    announce(f"{load.name}: {cluster.num_ranks} ranks, {cluster.num_slots} slots")
    scores = {
        who: score_layers(placements, load.held_out, cluster.num_nodes)
        for who, placements in rivals(load, cluster, Aim()).items()
    }
    cells: list[Cell] = [f"{load.name}, {cluster.num_ranks} ranks", cluster.num_slots]
    cells += [mean(scores[who], "balance") for who in scores] + [mean(scores[who], "fan_out") for who in scores]
    balanced = 100 * (mean(scores["planned"], "balance") / mean(scores["EPLB"], "balance") - 1)
    fewer = 100 * (1 - mean(scores["planned"], "fan_out") / mean(scores["EPLB"], "fan_out"))
    reached = "yes" if fewer >= AIM and balanced <= AS_BALANCED else "no"
    return (*cells, balanced, fewer, reached)


def traded(load: Load, cluster: Cluster) -> dict[str, list[tuple[float, float]]]:
    """(fan-out, balance) on the windows held out: of EPLB, and planned with more and more slack."""
    eplb = score_layers(rivals(load, cluster, Aim())["EPLB"], load.held_out, cluster.num_nodes)
    points = [
        score_layers(plan_layers(load.fit, cluster, aim=Aim(slack=slack)), load.held_out, cluster.num_nodes)
        for slack in SLACKS
    ]
    return {
        "EPLB": [(mean(eplb, "fan_out"), mean(eplb, "balance"))],
        "planned": [(mean(each, "fan_out"), mean(each, "balance")) for each in points],
    }


def trade_row(load: Load, cluster: Cluster) -> tuple[Cell, ...]:
    """The fewest ranks per token, in percent below EPLB's, at no less and at 5 % and 10 % less balance than EPLB's."""
    announce(f"{load.name}: what balance buys on {cluster.num_ranks} ranks")
    points = traded(load, cluster)
    fan_out, balance = points["EPLB"][0]
    fewest = [
        max(
            (100 * (1 - planned / fan_out) for planned, spread_ in points["planned"] if spread_ <= more * balance),
            default=None,
        )
        for more in (1.0, 1.05, 1.1)
    ]
    return (f"{load.name}, {cluster.num_ranks} ranks", *fewest)


def planning_seconds(layers: Sequence[Traffic], cluster: Cluster, effort: Effort) -> Spread:
    """Of one call for all layers."""
    announce(f"planning {len(layers)} layers")
    return spread(time_side_by_side([Variant("plan", lambda: plan_layers(layers, cluster))], effort)["plan"])


def draw(loads: Sequence[Load], path: Path) -> None:
    """Balance against fan-out, an axis for each kind of traffic; down and to the left is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3 * len(loads), 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for load, axes in zip(loads, figure.subplots(1, len(loads), squeeze=False)[0], strict=True):
        for cluster, colour in zip(load.clusters, ("#1f77b4", "#d95f02"), strict=False):
            points = traded(load, cluster)
            ranks = f"{cluster.num_ranks} ranks"
            axes.plot(*zip(*points["planned"], strict=True), "o-", color=colour, label=f"planned, {ranks}")
            axes.plot(*zip(*points["EPLB"], strict=True), "X", color=colour, markersize=10, label=f"EPLB, {ranks}")
        axes.set(title=load.name, xlabel="ranks per token", ylabel="fullest rank / mean, windows not seen")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


COLUMNS = (
    "traffic", "slots", "balance: even", "EPLB", "planned", "ranks per token: even", "EPLB ", "planned ",
    "less balanced than EPLB [%]", "fewer ranks than EPLB [%]", "aim reached",
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
    trades = tuple(trade_row(load, cluster) for load, cluster in pairs)
    many = [
        replace(loads[0].fit[number % options.layers], layer=str(number), ids_TK=None)
        for number in range(options.timed_layers)
    ]
    seconds = planning_seconds(many, timed, effort)
    draw(loads, options.picture)
    sizes = f"{len(many)} layers of {size.experts} experts, {timed.num_slots} slots on {timed.num_ranks} ranks"
    tables = (
        Table(
            "On windows not seen",
            COLUMNS,
            rows,
            f"Aim: {AIM:.0f} % fewer ranks per token than EPLB, and as balanced, within {AS_BALANCED:.0f} %.",
        ),
        Table(
            "Fewer ranks per token than EPLB, by what balance may cost",
            ("traffic", "none [%]", "5 % fuller [%]", "10 % fuller [%]"),
            trades,
            "Placements with other slack; - where none is so balanced.",
        ),
        Table("Planning", ("what", "time [s]"), ((sizes, seconds),), "From load and pairs; one call for all layers."),
    )
    settings = {"windows": NUM_WINDOWS, "tokens per window": size.tokens, "layers of each kind": options.layers}
    emit(Report(settings, tables, (f"picture: {options.picture.name}",)), options)


if __name__ == "__main__":
    main()
