"""What the latency guard costs: clocks, its step, and a breaker's record of many groups. python -m benchmarks.breaker

Two figures for the guard. The ratio of whole forwards has every side effect, above all that experts are computed one by
one when they are timed one by one; the share is the time inside clocks and step alone, taken directly.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from equipoise.bench.harness import Effort, Spread, Variant, ratio, spread, time_side_by_side
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.layer import FeedForward
from equipoise.models.decoder import Decoder
from equipoise.recovery.breaker import Breaker, BreakerConfig, Granularity
from equipoise.recovery.dense_path import build_dense_paths
from equipoise.recovery.latency import LatencyGuard
from equipoise.train.config import TrainConfig
from equipoise.train.recipes import RECIPES

GRANULARITIES: tuple[Granularity, ...] = ("layer", "expert")
NEVER = BreakerConfig(slow_s=3600.0, floor_s=3600.0)  # a layer that opened would be timed without its experts
GROUPS = (61, 61 * 256)  # the layers and the experts of a large model


@dataclass(frozen=True, eq=False)
class Workload:
    """run: one forward of the model, on the same random input each time. dense: stand-ins, built beforehand."""

    name: str
    model: Decoder
    run: Callable[[], object]
    dense: Mapping[str, FeedForward]

    def guard(self, granularity: Granularity) -> LatencyGuard:
        """A guard that never opens."""
        return LatencyGuard(self.model.moe_layers, NEVER, granularity=granularity, dense=self.dense)


def stand_ins(model: Decoder) -> Mapping[str, FeedForward]:
    """Of even load."""
    layers = model.moe_layers
    return build_dense_paths(layers, {name: np.ones(layer.num_experts) for name, layer in layers.items()})


def decode(config: TrainConfig, num_sequences: int) -> Workload:
    """A new token for each sequence. There is no past to attend to, so that the guard's share is an upper limit."""
    model = Decoder(config.model).eval()
    tokens_B1 = torch.randint(config.model.vocab_size, (num_sequences, 1))

    def run() -> object:
        with torch.no_grad():
            return model(tokens_B1)

    return Workload(f"decode step, {num_sequences} tokens", model, run, stand_ins(model))


def training(config: TrainConfig) -> Workload:
    """A forward in training mode, of one batch of the recipe."""
    model = Decoder(config.model).train()
    tokens_BS = torch.randint(config.model.vocab_size, (config.batch_size, config.data.seq_len))
    return Workload(f"training forward, {tokens_BS.numel()} tokens", model, lambda: model(tokens_BS), stand_ins(model))


# ---------------------------------------------------------------------------------------------- the two figures


def side_by_side(work: Workload, granularity: Granularity, every: int, effort: Effort) -> tuple[Spread, Spread]:
    """(seconds of an unguarded forward, guarded / unguarded). Attaching is on the clock, once in `every` forwards."""

    def unguarded() -> None:
        for _ in range(every):
            work.run()

    def guarded() -> None:
        guard = work.guard(granularity)
        for number in range(every):
            work.run()
            guard.step(number)
        guard.detach()

    # A forward off the clock before each: the first of a round finds cold caches, which would make the guard a gain.
    runs = [Variant("unguarded", unguarded, work.run), Variant("guarded", guarded, work.run)]
    seconds = time_side_by_side(runs, effort)
    return spread(seconds["unguarded"]).times(1 / every), ratio(seconds, "guarded", "unguarded")


class Stopwatch:
    """Adds up the time between `start` and `stop`, which lie on either side of the guard's clocks."""

    def __init__(self) -> None:
        self.total, self._started = 0.0, 0.0

    def start(self, *_: object) -> None:
        """From here on."""
        self._started = time.perf_counter()

    def stop(self, *_: object) -> None:
        """Up to here."""
        self.total += time.perf_counter() - self._started


@dataclass(frozen=True)
class Edge:
    """A probe on one side of the guard's."""

    begin: Callable[..., None]
    end: Callable[..., None]


def timed_forwards(work: Workload, granularity: Granularity, every: int) -> tuple[float, float, float]:
    """Seconds (inside the clocks, in `step`, in all) of so many guarded forwards."""
    watch, experts = Stopwatch(), [layer.experts for layer in work.model.moe_layers.values()]
    handles = [each.register_forward_hook(watch.start) for each in experts] if granularity == "layer" else []
    guard = work.guard(granularity)
    for each in experts:
        if granularity == "expert":
            each.probes = (Edge(watch.start, watch.stop), *each.probes, Edge(watch.stop, watch.start))
            continue
        handles += [
            each.register_forward_pre_hook(watch.start, prepend=True),
            each.register_forward_pre_hook(watch.stop),
            each.register_forward_hook(watch.stop),
        ]
    in_step = 0.0
    begin = time.perf_counter()
    for number in range(every):
        work.run()
        before = time.perf_counter()
        guard.step(number)
        in_step += time.perf_counter() - before
    total = time.perf_counter() - begin
    for handle in handles:
        handle.remove()
    guard.detach()
    for each in experts:
        each.probes = ()
    return watch.total, in_step, total


def row(work: Workload, granularity: Granularity, every: int, effort: Effort) -> tuple[Cell, ...]:
    """One line of the table."""
    announce(f"{work.name}: by {granularity}")
    forward, guarded = side_by_side(work, granularity, every, effort)
    rounds = [timed_forwards(work, granularity, every) for _ in range(effort.rounds)]
    return (
        work.name,
        granularity,
        forward.times(1e3),
        guarded,
        spread([1e3 * clocks / every for clocks, _, _ in rounds]),
        spread([1e3 * in_step / every for _, in_step, _ in rounds]),
        spread([100 * (clocks + in_step) / total for clocks, in_step, total in rounds]),
    )


def record_row(num_groups: int, effort: Effort) -> tuple[Cell, ...]:
    """A call of every group, none of them slow."""
    announce(f"record of {num_groups} groups")
    breaker = Breaker([str(group) for group in range(num_groups)])
    seconds_G, sizes_G = np.full(num_groups, 1e-3), np.full(num_groups, 64)
    for _ in range(breaker.config.window):
        breaker.record(seconds_G, sizes_G)
    variant = Variant("record", lambda: breaker.record(seconds_G, sizes_G))
    seconds = spread(time_side_by_side([variant], effort.filling(0.02))["record"])
    return num_groups, seconds.times(1e6), seconds.times(1e9 / num_groups)


COLUMNS = (
    "forward",
    "granularity",
    "unguarded [ms]",
    "guarded / unguarded",
    "clocks [ms per forward]",
    "step [ms per forward]",
    "share of the forward [%]",
)
RECORD_COLUMNS = ("groups", "record [us]", "per group [ns]")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.breaker", description=__doc__)
    parser.add_argument("--every", type=int, default=20, help="forwards per round")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of each kind")
    add_output_arguments(parser)
    options = parser.parse_args()
    torch.manual_seed(0)
    config, effort, groups = RECIPES["demo"](), Effort(options.rounds, warmup=1), GROUPS
    if options.smoke:
        torch.set_num_threads(1)
        config, groups = replace(RECIPES["tiny"](), batch_size=2), (2, 16)
        options.every, effort = 2, Effort(rounds=2, warmup=1)
    works = (decode(config, 8), training(config))
    rows = tuple(row(work, each, options.every, effort) for work in works for each in GRANULARITIES)
    records = tuple(record_row(num_groups, effort) for num_groups in groups)
    settings: dict[str, Any] = {"model": config.name, "every": options.every, "rounds": effort.rounds}
    tables = (
        Table("The cost of guarding", COLUMNS, rows, "One step of the guard per forward; nothing opens."),
        Table("The cost of a record", RECORD_COLUMNS, records, "One call of every group at once."),
    )
    emit(Report(settings, tables), options)


if __name__ == "__main__":
    main()
