"""`equipoise train`: a run in this process, or as one of the ranks that torchrun has started."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import tyro

from equipoise.commands.shown import Json
from equipoise.monitor.sinks.options import NOWHERE, Alerts
from equipoise.parallel import ParallelConfig
from equipoise.train.config import Overrides
from equipoise.train.finetune.config import FinetuneConfig

if TYPE_CHECKING:
    from equipoise.train.config import TrainConfig
    from equipoise.train.report import ConsoleReporter, Silent
    from equipoise.train.run import RunResult

RecipeName = Literal[
    "demo",
    "tiny",
    "tiny_two_experts",
    "tiny_scmoe",
    "tiny_peer",
    "tiny_mamba",
    "tiny_zero_experts",
    "tiny_moa",
    "tiny_switch_head",
    "tiny_moh",
    "base",
]


def train(
    recipe: Annotated[RecipeName | Literal["finetune"] | None, tyro.conf.Positional] = None,
    /,
    *,
    change: Annotated[Overrides, tyro.conf.OmitArgPrefixes] = Overrides(),  # noqa: B008 - frozen
    tune: Annotated[FinetuneConfig, tyro.conf.OmitArgPrefixes] = FinetuneConfig(),  # noqa: B008 - frozen
    alerts: Alerts = NOWHERE,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 - frozen
    out: Path | None = None,
    resume: bool = False,
    json_: Json = False,
) -> int:
    """Train a language model with MoE layers, under watch.

    Ctrl-C writes a checkpoint and stops; `--resume` goes on from it, to the bit, on any number of processes. For more
    than one: `torchrun --nproc-per-node 4 -m equipoise train demo --parallel.expert 2 --parallel.data 2`, also with
    `--recover`. With torchrun's `--max-restarts 3` the run goes on from its newest checkpoint when a rank is lost.

    Recipes: demo (4 layers of 16 experts, minutes), tiny (2 layers of 8, seconds), tiny_two_experts (2 layers of 2
    experts on two domains: shows whether the router divides them, under a minute), tiny_scmoe (4 layers, 2 of them
    with 8 experts behind a shortcut, seconds), tiny_peer (1024 single-neuron experts), tiny_mamba (Mamba in place of
    attention), tiny_zero_experts (4 of 12 experts compute nothing), tiny_moa, tiny_switch_head and tiny_moh (attention
    experts), base (8 layers, 4 of them with 32 experts and a shared one, days on two cores). And finetune, which goes
    on from the model of another run folder, on text of your own:
    `equipoise train finetune --from runs/demo --data my.jsonl --freeze-router 100`.

    For example: equipoise train tiny --recover --out runs/tiny

    Args:
        recipe: One of these. Not needed with --resume.
        change: What to change in the recipe.
        tune: For the recipe finetune: what it begins with, and what it trains.
        alerts: Where alerts and repairs go, beside the run folder.
        parallel: How the run is spread over processes. No part of the run: name it again with --resume.
        out: Run folder. Default: runs/RECIPE.
        resume: Go on from the newest whole checkpoint in --out, with the configuration saved there.
        json_: Print the result as one JSON object, and nothing else.
    """
    from equipoise.parallel import started
    from equipoise.train.loop import load_config
    from equipoise.train.run import train as run

    if recipe is None and not resume:
        raise ValueError(
            f"train: name a recipe ({', '.join(get_args(RecipeName))}, finetune), or go on with --resume --out FOLDER"
        )
    if resume and (change != Overrides() or tune != FinetuneConfig()):
        raise ValueError(
            "train: --resume goes on with the configuration that the run began with; leave out the changes"
        )
    out = out or Path("runs") / (recipe or "demo")
    resume = resume or _goes_on(out)
    device = change.device or (load_config(out).device if resume else "auto")
    with started(parallel, device) as ranks, reporter_of(json_ or not (ranks is None or ranks.is_main)) as reporter:
        config = _config(recipe, change, tune) if recipe and not resume else None
        result = run(config, out, reporter, resume=resume, alerts=alerts, ranks=ranks)
        is_main = ranks is None or ranks.is_main
    if is_main:
        _show(result, json_)
    return 0 if result.signal is None else 128 + result.signal


def _config(recipe: str, change: Overrides, tune: FinetuneConfig) -> TrainConfig:
    from equipoise.train.finetune.start import finetune
    from equipoise.train.recipes import recipe as named

    if recipe == "finetune":
        return finetune(tune, change)
    if tune != FinetuneConfig():
        raise ValueError(
            f"train: --from and what else belongs to finetune need that recipe, got {recipe!r}; say "
            "`equipoise train finetune --from FOLDER --data FILE`"
        )
    return change.apply(named(recipe))


def _goes_on(out: Path) -> bool:
    """Whether torchrun has started this rank again, after one was lost, in a run that had begun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and (out / "config.json").exists()


def _show(result: RunResult, as_json: bool) -> None:
    from rich.console import Console

    from equipoise.train.specialisation import specialisation_tables, verdict

    if as_json:
        print(json.dumps(result.fields()))
    elif result.signal is not None:
        print(f"stopped at step {result.step}; go on with: equipoise train --resume --out {result.out}")
    elif result.evaluation is not None:
        print(f"\na sample of its text:\n  {result.sample!r}\n")
        if result.specialisation:
            Console().print(specialisation_tables(result.specialisation))
            print(f"{verdict(result.specialisation)}\n")
        print(f"perplexity {result.evaluation.perplexity:.1f} after {result.step} steps; run folder {result.out}")


def reporter_of(quiet: bool) -> ConsoleReporter | Silent:
    """What shows a run to a person; nothing for a quiet one."""
    from rich.console import Console

    from equipoise.train.report import ConsoleReporter, Silent

    return Silent() if quiet else ConsoleReporter(Console())
