"""`equipoise bench sweep`: a recipe under many balancing settings and seeds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from equipoise.commands.shown import Json, wide_console
from equipoise.commands.train import RecipeName
from equipoise.train.config import Overrides
from equipoise.train.grid import Grid


def sweep(
    *,
    grid: Annotated[Grid, tyro.conf.OmitArgPrefixes] = Grid(),  # noqa: B008 - frozen
    recipe: RecipeName = "tiny",
    steps: int | None = None,
    data: str | None = None,
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

    For example: equipoise bench sweep --coefs 0 0.01 0.1 --seeds 0 1 --out runs/sweep

    Args:
        grid: What to go through.
        recipe: The run of each cell; `equipoise train --help` has all.
        steps: Optimizer steps of each run. Default: the recipe's.
        data: embedded, wikitext-2, or the path of a .txt, .jsonl or .parquet file or of a folder of them.
        out: Folder of the sweep; each run has its own in OUT/cells, which `equipoise watch` can show.
        json_: Print what is in sweep.json, and nothing else.
    """
    from rich.console import Console

    from equipoise.host.extras import require
    from equipoise.train.recipes import recipe as named
    from equipoise.train.sweep import run_sweep
    from equipoise.train.sweep_report import sweep_tables, write_report

    require("matplotlib", "plot")  # before the runs, not after
    console = wide_console()
    base = Overrides(steps=steps, corpus=data).apply(named(recipe))
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
