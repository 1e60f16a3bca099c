"""`equipoise bench claims`: published claims about routing, measured here."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from equipoise.bench.claims.claim import Claim, Found
    from equipoise.bench.claims.runs import Runs

Json = Annotated[bool, tyro.conf.arg(name="json")]
Listed = Annotated[bool, tyro.conf.arg(name="list")]
WIDE = 140  # columns of the table where there is no terminal


def claims(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    list_: Listed = False,
    cheap: bool = False,
    seeds: int = 5,
    out: Path = Path("runs/claims"),
    report: Path | None = None,
    picture_dir: Path | None = None,
    json_: Json = False,
) -> int:
    """Measure published claims about routing and its collapse, each with a control in which its effect is absent.

    Most train small models, some 40 seconds each on one core; each is trained once and kept in OUT/cells. Ctrl-C loses
    nothing: the same command goes on. Started twice with the same --out, OMP_NUM_THREADS=1 each, two processes share
    the work: --list says how long it takes.

    For example: equipoise bench claims --list

    Args:
        names: Claims by name, or how names begin; all without.
        list_: List claims with their sources and costs, and run nothing.
        cheap: Only those that need no training: about half a minute.
        seeds: Training runs per setting, paired: a seed has the same weights and data in all settings.
        out: Folder of the runs.
        report: Write the page with tables and pictures here; claims that are not chosen come from what OUT holds.
        picture_dir: Where its pictures go. Default: img beside the page.
        json_: Print the claims as JSON, and nothing else.
    """
    from rich.console import Console

    from equipoise.bench.claims.arms import NOISE
    from equipoise.bench.claims.registry import chosen
    from equipoise.bench.claims.runs import Runs
    from equipoise.host.extras import require

    picked = chosen(names, cheap)
    if seeds < 1:
        raise ValueError(f"bench claims: expected --seeds of at least 1, got {seeds}")
    runs = Runs(out, tuple(range(seeds)), noise=NOISE)
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=WIDE)
    if list_:
        _tell_list(picked, runs, console, json_)
        return 0
    if report:
        require("matplotlib", "plot")  # before the runs, not after
    found, number = _measure(picked, runs)
    if number is not None:
        print(f"stopped; what is done is kept in {out}; the same command goes on", file=sys.stderr)
        return 128 + number
    if report:
        written = _write(found, runs, report, picture_dir or report.parent / "img")
        console = Console(quiet=True) if json_ else console
        console.print("\n".join(str(path) for path in written), highlight=False)
    _tell(found, console, json_)
    return 0


def _measure(picked: Sequence[Claim], runs: Runs) -> tuple[list[Found], int | None]:
    """(what was found, None), or (what was found before, the signal's number). A line on stderr for each piece."""
    from rich.console import Console

    from equipoise.bench.claims.claim import find
    from equipoise.bench.claims.store import keep, source_version
    from equipoise.bench.progress import Pieces
    from equipoise.host.interrupt import interruptible

    number = runs.run(runs.jobs(picked), Console(stderr=True))
    if number is not None:
        return [], number
    found, source, told = [], source_version(), Pieces(len(picked))
    with interruptible() as interrupted:
        for claim in picked:
            found.append(find(claim, runs))
            keep(found[-1], runs.out, source)
            told.done(f"{claim.name}: {found[-1].verdict}")
            if (number := interrupted()) is not None:
                return found, number
    return found, None


def _write(found: Sequence[Found], runs: Runs, page: Path, pictures: Path) -> list[Path]:
    """The page has all claims: those just measured, and what is kept of the others."""
    from equipoise.bench.claims.claim import Found, find
    from equipoise.bench.claims.registry import CLAIMS, CURVES
    from equipoise.bench.claims.report import Page, write_report
    from equipoise.bench.claims.store import kept, source_version

    known, source = {each.claim.name: each for each in found}, source_version()
    every = []
    for claim in CLAIMS:
        there = known.get(claim.name) or kept(claim, runs.out, source)
        if there is None or there.verdict == "not run yet":
            there = Found(claim, "not run yet") if claim.cheap else find(claim, runs)
        every.append(there)
    return write_report(every, runs, Page(page, pictures, shlex.join(["equipoise", *sys.argv[1:]])), CURVES)


def _tell(found: Sequence[Found], console: Console, json_: bool) -> None:
    from equipoise.bench.claims.store import fields_of

    if json_:
        print(json.dumps([fields_of(each) for each in found]))
    else:
        console.print(results_table(found))


def results_table(found: Sequence[Found]) -> Table:
    """A row per claim."""
    from rich.table import Table

    from equipoise.bench.claims.report import shown

    table = Table(title="claimed, and found here: mean [95 % interval]", title_justify="left", box=None)
    for column in ("claim", "theirs", "claimed", "ours", "verdict"):
        table.add_column(column)
    for each in found:
        claimed = "\n".join(str(reading.claimed) for reading in each.readings)
        ours = "\n".join(shown(reading) for reading in each.readings)
        table.add_row(each.claim.name, each.claim.theirs, claimed, ours, each.verdict)
    return table


def _tell_list(picked: Sequence[Claim], runs: Runs, console: Console, json_: bool) -> None:
    from equipoise.bench.claims.arms import SECONDS_PER_STEP

    jobs = runs.jobs(picked)
    if json_:
        print(json.dumps([_listed(claim) for claim in picked]))
        return
    console.print(claims_table(picked))
    seconds = sum(claim.seconds for claim in picked)
    training = sum(job.arm.config.steps * SECONDS_PER_STEP + job.arm.seconds for job in jobs)
    console.print(
        f"{len(picked)} claims, {sum(claim.cheap for claim in picked)} without training ({seconds:.0f} s); "
        f"{len(jobs)} training runs for {len(runs.seeds)} seeds: about {training / 60:.0f} minutes of one "
        "core",
        highlight=False,
    )


def _listed(claim: Claim) -> dict[str, Any]:
    names = ("name", "theme", "hypothesis", "where", "theirs", "method", "control_is", "untestable", "cheap", "seconds")
    return {name: getattr(claim, name) for name in names} | {"runs": [arm.label for arm in claim.arms]}


def claims_table(picked: Sequence[Claim]) -> Table:
    """A row per claim: what it says, and what it costs."""
    from rich.table import Table

    table = Table(box=None)
    for column in ("claim", "theme", "hypothesis", "cost"):
        table.add_column(column)
    for claim in picked:
        cost = f"{claim.seconds:.0f} s" if claim.cheap else f"{len(claim.arms)} runs per seed"
        table.add_row(claim.name, claim.theme, claim.hypothesis, "none" if claim.untestable else cost)
    return table
