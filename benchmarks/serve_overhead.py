"""What care costs while serving: engine steps with and without what watches them. python -m benchmarks.serve_overhead

The engine alone, then with each part, then with all: the monitor's counts and one flush, the scores that repairs need,
the breaker's clocks, the step metrics. All take turns; attaching, one flush and taking off again are on the clock. In a
server a flush comes every two seconds, here with every run, so the figures are upper limits. HTTP is not in them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.breaker import NEVER, stand_ins
from benchmarks.serve_peers import SIZES, SMOKE_SIZES
from benchmarks.serving import byte_tokenizer, random_model
from equipoise.bench.harness import Effort, Variant, ratio, spread, time_side_by_side
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.models.config import DecoderConfig
from equipoise.monitor.watch import Watch
from equipoise.recovery.latency import LatencyGuard
from equipoise.recovery.recent import RecentScores
from equipoise.serve.engine import Engine, StepReport
from equipoise.serve.metrics import ServingMetrics
from equipoise.serve.request import Request, Sampling

BARE, ALL = "engine alone", "all of them"
PROMPT, BLOCK = 16, 16


class Served:
    """One engine whose steps are told to `on_step`, and the same work for it each time."""

    def __init__(self, config: DecoderConfig, num_requests: int, num_tokens: int) -> None:
        self.model = random_model(config, torch.float32)
        self.layers = self.model.moe_layers
        self.dense = stand_ins(self.model)
        self.on_step: Callable[[StepReport], None] = _nobody
        self._num_requests, self._num_tokens = num_requests, num_tokens
        self.engine = Engine(
            self.model,
            byte_tokenizer(config.vocab_size),
            num_blocks=num_requests * (config.max_seq_len // BLOCK),
            block_size=BLOCK,
            prefix_reuse=False,
            on_step=lambda report: self.on_step(report),
        )

    def run(self) -> None:
        """All requests, to their end."""
        for number in range(self._num_requests):
            prompt = tuple(range(256 + number, 256 + number + PROMPT))
            self.engine.add(Request(str(number), prompt, self._num_tokens, Sampling(temperature=0.0)))
        while self.engine.has_work:
            self.engine.step()


def _nobody(report: StepReport) -> None:
    return None


@contextmanager
def watched(served: Served):
    """The recorder's hooks, and a flush with all rules."""
    watch = Watch(served.model, every=1)
    yield
    watch.flush(1)
    watch.detach()


@contextmanager
def recent(served: Served):
    """The scores of the newest tokens, for repairs."""
    scores = RecentScores(served.layers)
    yield
    scores.detach()


@contextmanager
def clocked(served: Served):
    """The breaker's clocks on each layer, and its step. It never opens."""
    guard = LatencyGuard(served.layers, NEVER, dense=served.dense)
    yield
    guard.step(1)
    guard.detach()


@contextmanager
def clocked_singly(served: Served):
    """The breaker's clocks on each expert: experts are computed one by one."""
    guard = LatencyGuard(served.layers, NEVER, granularity="expert", dense=served.dense)
    yield
    guard.step(1)
    guard.detach()


@contextmanager
def measured(served: Served):
    """The metrics of each step, and what is made of them for the records."""
    metrics = ServingMetrics(tuple(served.layers), lambda: 0, served.engine.occupancy)
    served.on_step = metrics.on_step
    yield
    metrics.scalars()
    served.on_step = _nobody


Part = Callable[[Served], AbstractContextManager[None]]
PARTS: dict[str, Sequence[Part]] = {
    BARE: (),
    "monitor": (watched,),
    "recent scores": (recent,),
    "breaker's clocks": (clocked,),
    "breaker's clocks, by expert": (clocked_singly,),
    "step metrics": (measured,),
    ALL: (watched, recent, clocked, measured),
}


def run_with(served: Served, parts: Sequence[Part]) -> None:
    """The work, watched by these."""
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part(served))
        served.run()


def rows(
    name: str, config: DecoderConfig, num_requests: int, num_tokens: int, effort: Effort
) -> list[tuple[Cell, ...]]:
    """A line per part."""
    announce(f"{name}: {num_requests} answers at a time")
    served = Served(config, num_requests, num_tokens)
    variants = [Variant(label, partial(run_with, served, parts)) for label, parts in PARTS.items()]
    seconds = time_side_by_side(variants, effort)
    return [
        (name, num_requests, label, spread(seconds[label]).times(1e3 / num_tokens), ratio(seconds, label, BARE))
        for label in PARTS
    ]


COLUMNS = ("model", "answers at a time", "with", "step [ms]", "/ engine alone")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="runs of each kind")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    add_output_arguments(parser)
    options = parser.parse_args()
    sizes, batches, effort = SIZES, (1, 16), Effort(options.rounds, warmup=1)
    if options.smoke:
        torch.set_num_threads(1)
        sizes, batches, effort, options.tokens = SMOKE_SIZES, (2,), Effort(2, warmup=1), 8
    found = [
        row
        for name, config in sizes.items()
        for size in batches
        for row in rows(name, config, size, options.tokens, effort)
    ]
    settings: dict[str, Any] = {"rounds": effort.rounds, "tokens": options.tokens}
    note = f"fp32; prompts of {PROMPT} tokens; one flush in {options.tokens} steps."
    emit(Report(settings, (Table("The cost of care", COLUMNS, tuple(found), note),)), options)


if __name__ == "__main__":
    main()
