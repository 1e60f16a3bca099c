"""How far a run in health moves from its newest known-good record while it learns: python -m benchmarks.learning

Why a model in training is not compared with its record in load and in the spread of its logits: each flush of a
recipe's run is put beside the newest record, as the monitor of a server would do it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import track

from equipoise.bench.report import Report, Table, add_output_arguments, announce, emit
from equipoise.monitor.rules import LoadDriftRule, LogitRule, load_moved
from equipoise.train.config import TrainConfig
from equipoise.train.loop import Trainer
from equipoise.train.recipes import recipe
from equipoise.train.report import Silent
from equipoise.train.run import open_data

COLUMNS = ("run", "flushes compared", "largest PSI", "flushes with load drift [%]", "largest growth of std", "records")


def moved(trainer: Trainer) -> Iterator[tuple[float, bool, float]]:
    """Per flush with a record before it, of all layers: largest PSI, whether it is called drift, largest std ratio."""
    while trainer.step_number < trainer.config.steps:
        trainer.step()
        records = trainer.repairs.known_good.records
        if not trainer.watch.is_due(trainer.step_number) or not records or records[-1].step == trainer.step_number:
            continue
        known, stats = records[-1].baselines, trainer.watch.stats()
        psi = max(load_moved(each.counts_E, np.array(known[each.layer].counts_E))[0] for each in stats)
        ratio = max(each.logit_std / known[each.layer].logit_std for each in stats)
        yield psi, bool(LoadDriftRule(known)(stats)), ratio


def measure(config: TrainConfig) -> tuple[str | float | int, ...]:
    """A row of the table: one run to its end."""
    config, data = open_data(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, data, Path(folder) / "run", Silent())
        flushes = list(moved(trainer))
        records = len(trainer.repairs.known_good.records)
        trainer.close("finished")
    psi, ratio = (max((each[i] for each in flushes), default=0.0) for i in (0, 2))
    share = 100 * sum(drifted for _, drifted, _ in flushes) / max(len(flushes), 1)
    return f"{config.name}, seed {config.seed}", len(flushes), round(psi, 2), round(share, 1), round(ratio, 2), records


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe (default 3)")
    add_output_arguments(parser)
    arguments = parser.parse_args()
    configs = [replace(recipe(name), seed=seed) for name in ("tiny", "demo") for seed in range(arguments.seeds)]
    if arguments.smoke:
        configs = [replace(recipe("tiny"), checkpoint_every=50)]
    announce(f"{len(configs)} runs")
    rows = tuple(measure(config) for config in track(configs, description="runs", disable=arguments.smoke))
    note = f"A server alarms at a PSI of {LoadDriftRule().limit:g} and a growth of {LogitRule().std_ratio:g}."
    emit(Report({}, (Table("moved from the newest record", COLUMNS, rows, note),)), arguments)


if __name__ == "__main__":
    main()
