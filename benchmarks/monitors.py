"""Monitors of MoE routing against a count by hand, on the same models and batches: python -m benchmarks.monitors.

Seven families of transformers 5 with random weights, then models in which something known is wrong. moewatch and
plumb-moe are public packages; without them the command stops and says how to install them, or `--monitors equipoise`.
Right means equal to what plain Python loops count from the routers' logits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import transformers

from benchmarks.monitors_observers import (
    DISTRIBUTIONS,
    OBSERVERS,
    MissingMonitorError,
    Seen,
    brute_force,
    plumb_session,
    versions,
)
from benchmarks.monitors_worlds import FAILURES, FAMILIES, World, random_world
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit

COLUMNS = ("model", "monitor", "layers", "experts", "tokens", "choices", "busiest", "dead", "verdict", "wrong")
MONITORS = ("equipoise", *DISTRIBUTIONS)
READABLE = ("Mixtral", "Olmoe")  # what moewatch, and what plumb reads by itself


def rows_of(world: World, monitors: list[str]) -> Iterator[tuple[Cell, ...]]:
    """The count by hand, then a row per way to use a monitor."""
    announce(world.name)
    truth = brute_force(world)
    yield _row(world.name, "loops", truth, truth)
    for name, observe in OBSERVERS.items():
        if name.partition(",")[0] in monitors:
            yield _row(world.name, name, observe(world), truth)


def _row(world: str, monitor: str, seen: Seen, truth: Seen) -> tuple[Cell, ...]:
    dead = "-" if seen.dead is None else ", ".join(seen.dead[:6]) + (" ..." if len(seen.dead) > 6 else "")
    wrong = ", ".join(seen.differs(truth)) or "nothing"
    busiest = f"{100 * seen.busiest:.1f} %" if seen.choices else "-"
    return (
        world, monitor, seen.layers, seen.experts, seen.tokens, seen.choices, busiest, dead or "none", seen.verdict,
        "" if monitor == "loops" else wrong,
    )  # fmt: skip


def tables(families: list[str], failures: list[str], monitors: list[str]) -> tuple[Table, ...]:
    """Both tables."""
    healthy = [row for family in families for row in rows_of(random_world(family), monitors)]
    known = [row for failure in failures for family in READABLE for row in rows_of(FAILURES[failure](family), monitors)]
    note = (
        "layers, experts: found; experts of all layers together. tokens: said to be seen in a layer. choices: counted "
        "in all layers. busiest: the largest share of a layer's choices. dead: layer:expert. wrong: what differs from "
        "loops; what a monitor doesn't report at all is not called wrong."
    )
    return (
        Table("Random models: nothing is wrong with them", COLUMNS, tuple(healthy), note),
        Table("Models in which the routing is known", COLUMNS, tuple(known), note),
    )


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitors", description=__doc__)
    parser.add_argument("--monitors", nargs="+", choices=MONITORS, default=list(MONITORS), help="which to compare")
    add_output_arguments(parser)
    options = parser.parse_args()
    try:
        settings = {"transformers": transformers.__version__} | versions(options.monitors)
    except MissingMonitorError as error:
        parser.exit(2, f"{error}\n")
    families = list(READABLE) if options.smoke else list(FAMILIES)
    failures = ["always second", "dead tail", "short run" if options.smoke else "long run"]
    notes = (plumb_session(),) if "plumb" in options.monitors else ()
    emit(Report(settings, tables(families, failures, options.monitors), notes), options)


if __name__ == "__main__":
    sys.exit(main())
