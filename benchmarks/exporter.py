"""What exporting to Prometheus costs: a flush into the live source, and a scrape. python -m benchmarks.exporter

A scrape is what prometheus_client does for a request: collect every series and write them as text. It runs in a thread
of the process that trains or serves, and Python lets one thread run at a time, so its time is taken from the model's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from equipoise.bench.harness import Effort, Variant, spread, time_side_by_side
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.monitor.prometheus.collector import Detail, RoutingCollector
from equipoise.monitor.prometheus.live import LiveSource
from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.types import RoutingStats


@dataclass(frozen=True)
class Size:
    """A model, as an exporter sees it."""

    num_layers: int
    num_experts: int
    top_k: int = 8


SIZES = (Size(4, 16, 2), Size(32, 8, 2), Size(61, 256))
SMOKE = (Size(2, 8, 2),)
NO_LIMIT = 1_000_000


def flush_of(size: Size, num_tokens: int = 4096) -> list[RoutingStats]:
    """One flush of a fair router."""
    generator = np.random.default_rng(0)
    fair_E = np.full(size.num_experts, 1 / size.num_experts)
    window = []
    for layer in range(size.num_layers):
        sums = RoutingSums(
            num_tokens=num_tokens,
            counts_E=generator.multinomial(num_tokens * size.top_k, fair_E),
            probs_sum_E=num_tokens * fair_E,
            token_entropy_sum=0.5 * num_tokens * np.log(size.num_experts),
            logit_sum=0.0,
            logit_sq_sum=float(num_tokens * size.num_experts),
            logsumexp_sum=4.0 * num_tokens,
            dropped={"capacity": 0, "hard_cap": 0, "tokens": 0},
            losses={"switch": float(num_tokens)},
        )
        window.append(routing_stats(f"blocks.{layer}.moe", 1, sums))
    return window


def scrape_of(source: LiveSource, detail: Detail) -> Callable[[], bytes]:
    """A scrape of everything at that detail, as an HTTP request makes it."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(RoutingCollector(source, detail=detail, max_series=NO_LIMIT))
    return lambda: generate_latest(registry)


def measure(size: Size, effort: Effort) -> list[tuple[Cell, ...]]:
    """A line per operation: milliseconds, series, bytes."""
    announce(f"{size.num_layers} layers of {size.num_experts} experts")
    source, window = LiveSource("run"), flush_of(size)
    source.routing(window)
    scrapes = {detail: scrape_of(source, detail) for detail in get_args(Detail)}
    texts = {detail: scrape() for detail, scrape in scrapes.items()}
    variants = [Variant("flush", lambda: source.routing(window))]
    variants += [Variant(f"scrape, {detail}", scrape) for detail, scrape in scrapes.items()]
    seconds = time_side_by_side(variants, effort)
    name = f"{size.num_layers} x {size.num_experts}"
    rows: list[tuple[Cell, ...]] = [(name, "flush", spread(seconds["flush"]).times(1e3), None, None)]
    for detail, text in texts.items():
        series = sum(not line.startswith(b"#") for line in text.splitlines())
        label = f"scrape, {detail}"
        rows.append((name, label, spread(seconds[label]).times(1e3), series, len(text) / 1024))
    return rows


COLUMNS = ("layers x experts", "operation", "time [ms]", "series", "text [KiB]")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exporter", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="scrapes of each kind")
    add_output_arguments(parser)
    options = parser.parse_args()
    effort, sizes = (Effort(2, warmup=1), SMOKE) if options.smoke else (Effort(options.rounds), SIZES)
    rows = tuple(row for size in sizes for row in measure(size, effort))
    settings: dict[str, Any] = {"rounds": effort.rounds, "max_series": NO_LIMIT}
    note = "A scrape every 15 s at 150 ms takes 1 % of one core, and of the interpreter."
    emit(Report(settings, (Table("The cost of exporting", COLUMNS, rows, note),)), options)


if __name__ == "__main__":
    main()
