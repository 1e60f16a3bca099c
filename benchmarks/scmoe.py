"""Shortcut-connected MoE beside top-k of the same arithmetic: python -m benchmarks.scmoe

Part "quality": validation loss, seed by seed. Its results are kept as they come, and the same command goes on where it
stopped. docs/scmoe.md says what the positions are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from equipoise.bench.architectures.count import flops_per_token
from equipoise.bench.architectures.quality import Outcome, outcome
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.models.config import SHORTCUT_WINDOW, ShortcutName
from equipoise.routing import TopK
from equipoise.train.config import TrainConfig
from equipoise.train.recipes import recipe
from equipoise.train.run import open_data
from equipoise.train.sweep_report import paired_difference

MARGIN = 0.02  # nats per token, 2 % of the perplexity: more than this is worse
BASELINE = "top-2"
LAST_WINDOWS = 5  # of the monitor, over which MaxVio is averaged


@dataclass(frozen=True)
class Arm:
    """One way of wiring the recipe's MoE layers. routed, shared: experts per token."""

    routed: int
    shared: int
    shortcut: ShortcutName | None = None

    def of(self, base: TrainConfig) -> TrainConfig:
        """The recipe so wired. Repairs are off: they would mend what is to be measured."""
        moe = base.model.moe
        assert moe is not None
        moe = replace(moe, router=TopK(k=self.routed), shared_experts=self.shared, shortcut=self.shortcut)
        return replace(base, model=replace(base.model, moe=moe), recover=False)


ARMS = {
    BASELINE: Arm(2, 0),
    "1 + 1 shared": Arm(1, 1),
    **{f"ScMoE {place}": Arm(1, 1, place) for place in SHORTCUT_WINDOW},
}


# ---------------------------------------------------------------------------------------------- quality


def verdict(low: float, high: float) -> str:
    """Whether the interval of the difference lies below the margin."""
    if high < MARGIN:
        return "not worse"
    return "worse" if low > MARGIN else "open"


def quality_row(name: str, flops: float, outcomes: Sequence[Outcome], baseline: Sequence[Outcome]) -> tuple[Cell, ...]:
    """A row of the table; outcomes and baseline seed by seed."""
    mean, violation = (float(np.mean([getattr(each, key) for each in outcomes])) for key in ("loss", "max_violation"))
    row: tuple[Cell, ...] = (name, flops / 1e3, mean, violation)
    if name == BASELINE:
        return (*row, None, None, None, None)
    difference = paired_difference([each.loss for each in outcomes], [each.loss for each in baseline])
    ends = (difference.mean, difference.low, difference.high)
    cells = [round(1e3 * value, 2) if np.isfinite(value) else None for value in ends]
    return (*row, *cells, verdict(difference.low, difference.high))


def quality_tables(base: TrainConfig, options: argparse.Namespace) -> list[Table]:
    """Every arm with every seed."""
    configs = {name: arm.of(base) for name, arm in ARMS.items() if name in (BASELINE, *options.arms)}
    text = lru_cache(1)(lambda seed: open_data(replace(base, seed=seed))[1])
    cells = [
        (seed, name) for seed in range(options.seeds) for name in configs
    ]  # an early stop leaves whole comparisons
    found: Mapping[str, list[Outcome]] = {name: [] for name in configs}
    for seed, name in track(cells, description="runs", disable=options.smoke):
        config = replace(configs[name], name=f"{base.name}, {name}", seed=seed)
        found[name].append(outcome(config, text, options.out))
    flops = {name: flops_per_token(config.model, config.data.seq_len) for name, config in configs.items()}
    rows = tuple(quality_row(name, flops[name], found[name], found[BASELINE]) for name in configs)
    columns = (
        "per token",
        "forward [kFLOP]",
        "loss [nats]",
        "MaxVio",
        f"- {BASELINE} [mnat]",
        "low",
        "high",
        f"margin {1e3 * MARGIN:g} mnat",
    )
    note = (
        f"{options.seeds} seeds, {base.steps} steps. low, high: 95 % interval of the paired difference (Student's t). "
        "A seed fixes text, data order and, where the layers are the same, the first weights. Not worse: all of "
        "the interval lies below the margin; worse: above. No correction for several comparisons."
    )
    return [Table(f"quality: {base.name}", columns, rows, note)]


PARTS: dict[str, Callable[[TrainConfig, argparse.Namespace], list[Table]]] = {"quality": quality_tables}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scmoe", description=__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="default: all")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="beside top-2; default: all")
    parser.add_argument("--seeds", type=int, default=6, help="runs of each arm (default 6)")
    parser.add_argument("--steps", type=int, default=1200, help="of each run (default 1200)")
    parser.add_argument("--warmup", type=int, help="steps of warm-up (default: the recipe's)")
    parser.add_argument("--out", type=Path, default=Path("runs/scmoe"), help="where results are kept")
    add_output_arguments(parser)
    options = parser.parse_args()
    base = replace(recipe("tiny_scmoe"), steps=options.steps, eval_every=0, checkpoint_every=0, eval_batches=32)
    if options.warmup is not None:
        base = replace(base, optim=replace(base.optim, warmup=options.warmup))
    if options.smoke:
        torch.set_num_threads(1)
        options.seeds = 2
        base = replace(base, steps=6, batch_size=4, eval_batches=1, watch_every=2)
    announce(f"{len(options.parts)} parts")
    tables = [table for part in options.parts for table in PARTS[part](base, options)]
    emit(Report({"recipe": base.name, "steps": base.steps, "seeds": options.seeds}, tuple(tables)), options)


if __name__ == "__main__":
    main()
