"""Shortcut-connected MoE beside top-k of the same arithmetic: python -m benchmarks.scmoe

Part "quality": validation loss, seed by seed. Its results are kept as they come, and the same command goes on where it
stopped. docs/scmoe.md says what the positions are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.disk.atomic import atomic_write
from equipoise.models.config import SHORTCUT_WINDOW, ShortcutName
from equipoise.models.decoder import Decoder
from equipoise.routing import TopK
from equipoise.train.config import TrainConfig
from equipoise.train.data import TokenData
from equipoise.train.loop import Trainer
from equipoise.train.recipes import recipe
from equipoise.train.report import Silent
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


@dataclass(frozen=True)
class Outcome:
    """loss: nats per token of the validation text. max_violation: mean of the MoE layers' last windows."""

    loss: float
    max_violation: float


# ---------------------------------------------------------------------------------------------- quality


def flops_per_token(config: TrainConfig) -> float:
    """Multiplications and additions of a forward, per token, as torch counts them."""
    model = config.model
    assert model.moe is not None
    decoder = Decoder(replace(model, moe=replace(model.moe, backend="lean"))).eval()
    tokens_BS = torch.randint(model.vocab_size, (4, config.data.seq_len))

    def of_experts(  # torch can't look into an operator of ours
        x_TD: Tensor, weights_R: Tensor, up_eHD: Tensor, down_eDF: Tensor, token_ids_R: Tensor, *_: object, **__: object
    ) -> int:
        return 2 * len(token_ids_R) * (up_eHD[0].numel() + down_eDF[0].numel())

    of_experts._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.equipoise.lean_forward: of_experts})
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # the fused attention of a CPU isn't counted
        decoder(tokens_BS)
    return counter.get_total_flops() / tokens_BS.numel()


def outcome(config: TrainConfig, text: Callable[[int], TokenData], out: Path) -> Outcome:
    """Train and evaluate, or what a run of this configuration has come to before.

    text: the data of a seed. out: the file that keeps the outcome.
    """
    if out.exists():
        kept = json.loads(out.read_text(encoding="utf-8"))
        if kept["config"] == config.to_json():
            return Outcome(kept["loss"], kept["max_violation"])
    data = text(config.seed)
    opened = config.with_vocab(data.tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(opened, data, Path(folder) / "run", Silent())
        trainer.run()
        layers = trainer.store.layers()
        windows = [each for layer in layers for each in trainer.store.routing_history(layer)[-LAST_WINDOWS:]]
        found = Outcome(trainer.evaluate().loss, float(np.mean([each.max_violation for each in windows])))
        trainer.close("finished")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write(json.dumps({"config": config.to_json()} | vars(found)).encode())
    return found


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
        found[name].append(outcome(config, text, options.out / f"{name.replace(' ', '')}-{seed}.json"))
    rows = tuple(quality_row(name, flops_per_token(configs[name]), found[name], found[BASELINE]) for name in configs)
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
    parser.add_argument("--out", type=Path, default=Path("runs/scmoe"), help="where results are kept")
    add_output_arguments(parser)
    options = parser.parse_args()
    base = replace(recipe("tiny_scmoe"), steps=options.steps, eval_every=0, checkpoint_every=0, eval_batches=32)
    if options.smoke:
        torch.set_num_threads(1)
        options.seeds = 2
        base = replace(base, steps=6, batch_size=4, eval_batches=1, watch_every=2)
    announce(f"{len(options.parts)} parts")
    tables = [table for part in options.parts for table in PARTS[part](base, options)]
    emit(Report({"recipe": base.name, "steps": base.steps, "seeds": options.seeds}, tuple(tables)), options)


if __name__ == "__main__":
    main()
