"""Every fault against every repair, in training and in serving: python -m benchmarks.chaos

What was noticed, what was repaired, by what and how soon, what it cost in perplexity, what was lost. Nothing is timed:
all is counted in steps, tokens and nats, so it may run beside other work. Results are kept as they come; the same
command goes on where it stopped. The last line is the verdict, and so is the exit code.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.chaos_faults import NOBODY, SCENARIOS, Case, rungs_for
from benchmarks.chaos_runs import HEALTHY_STEPS, STEPS_AFTER, UNEVEN, Outcome, healthy_run, run_case
from equipoise.bench.report import Report, Table, add_output_arguments, emit

MODES = ("training", "serving")
LOAD_FAULTS = ("collapse onto one", "collapse onto two", "slow drift", "bias run-away")
QUICK = {
    "nothing": ("ladder",),
    "collapse onto one": (NOBODY, "ladder", "quantile_bias", "router_rollback", "round_robin"),
    "logit blow-up": ("ladder",),
    "NaN in an expert": ("ladder",),
    "stale counters": ("ladder",),
    "one domain": ("ladder",),
}


def cases_of(seeds: int, quick: bool) -> list[Case]:
    """All cells, seed by seed."""
    return [
        Case(fault, rung, mode, seed)
        for seed in range(seeds)
        for mode in MODES
        for fault, scenario in SCENARIOS.items()
        if mode in scenario.modes and (not quick or fault in QUICK)
        for rung in (QUICK[fault] if quick else rungs_for(fault, mode))
    ]


def run_all(cases: Sequence[Case], out: Path, jobs: int) -> list[Outcome]:
    """Run what is not in OUT/results.jsonl yet; everything, in the order of the cases."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.jsonl"
    done = {outcome.case.name: outcome for outcome in _read(file)}
    todo = [case for case in cases if case.name not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, file.open("a", encoding="utf-8") as log:
        task = progress.add_task("training healthy models", total=len({case.seed for case in todo}))
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(healthy_run, seed, out) for seed in {c.seed for c in todo}]):
                future.result()
                progress.advance(task)
            task = progress.add_task("faults and repairs", total=len(todo))
            futures = {pool.submit(run_case, case, out): case for case in todo}
            failed: list[BaseException] = []
            for future in as_completed(futures):
                progress.advance(task)
                if error := future.exception():  # the others go on; it is an error all the same
                    print(f"{futures[future].name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    failed.append(error)
                    continue
                outcome = future.result()
                log.write(json.dumps(asdict(outcome)) + "\n")
                log.flush()
                done[outcome.case.name] = outcome
    if failed:
        raise failed[0]
    return [done[case.name] for case in cases]


def _read(file: Path) -> Iterable[Outcome]:
    """What is there; a line that a killed process left half-written is run again."""
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        yield Outcome(**{**record, "case": Case(**record["case"])})


# ------------------------------------------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class Claim:
    """What must hold; evidence: the figures behind it."""

    text: str
    holds: bool
    evidence: str


def select(outcomes: Sequence[Outcome], *, fault: str = "", rung: str = "", mode: str = "") -> list[Outcome]:
    """Those of the fault, rung and mode that are named."""
    return [
        o
        for o in outcomes
        if (not fault or o.case.fault == fault)
        and (not rung or o.case.rung == rung)
        and (not mode or o.case.mode == mode)
    ]


Test = Callable[[Outcome], bool]


def claims(outcomes: Sequence[Outcome]) -> list[Claim]:
    """What the recovery promises, checked."""
    found = []

    def claim(
        text: str, group: Sequence[Outcome], test: Callable[[Outcome], bool], figure: Callable[..., object]
    ) -> None:
        if group:
            figures = sorted({str(figure(o)) for o in group})
            shown = ", ".join(figures[:6]) + (", ..." if len(figures) > 6 else "")
            found.append(Claim(text, all(map(test, group)), f"{len(group)} runs: {shown}"))

    ladder = select(outcomes, rung="ladder")
    claim("the ladder loses no output", select(ladder, mode="serving"), lambda o: o.lost == 0, lambda o: o.lost)
    claim("the ladder takes no false action", ladder, lambda o: o.false_actions == 0, lambda o: o.false_actions)
    claim(
        "the ladder leaves no straggler",
        [o for fault in LOAD_FAULTS for o in select(ladder, fault=fault)],
        lambda o: o.straggler_end <= UNEVEN,
        lambda o: f"{o.straggler_end:.2f}",
    )
    one = select(outcomes, fault="collapse onto one")
    quantile = select(one, rung="quantile_bias")
    claim(
        "quantile bias balances a collapse in 1 to 5 steps",
        quantile,
        lambda o: o.restored is not None and o.restored <= 5,
        lambda o: o.restored,
    )
    claim(
        "the Switch loss alone stays stuck on a saturated router",
        select(one, rung=NOBODY, mode="training"),
        lambda o: o.straggler_end > UNEVEN,
        lambda o: f"{o.straggler_end:.2f}",
    )
    exact = [o for fault in LOAD_FAULTS[:2] for o in select(outcomes, fault=fault, rung="router_rollback")]
    claim("router rollback is exact", select(exact, mode="serving"), lambda o: bool(o.exact), lambda o: o.exact)
    claim(
        "training goes on after a NaN",
        select(ladder, fault="NaN in an expert", mode="training"),
        lambda o: not o.stopped,
        lambda o: o.repair,
    )
    damaged = select(outcomes, fault="collapse, and a damaged checkpoint", rung="full_rollback")
    claim("full rollback passes over a damaged checkpoint", damaged, lambda o: o.repair is not None, lambda o: o.repair)
    return found + _round_robin(one)


def _round_robin(one: Sequence[Outcome]) -> list[Claim]:
    """Of what balances a collapsed server, round robin has the worst perplexity."""
    serving = select(one, mode="serving")
    loss = {
        rung: sum(o.loss_after for o in group) / len(group)
        for rung in {o.case.rung for o in serving}
        if rung != NOBODY and (group := select(serving, rung=rung)) and all(o.straggler_end <= UNEVEN for o in group)
    }
    if "round_robin" not in loss or len(loss) < 2:
        return []
    worst = max(loss, key=lambda rung: loss[rung])
    text = ", ".join(f"{rung} {math.exp(value):.1f}" for rung, value in sorted(loss.items(), key=lambda item: item[1]))
    return [Claim("round robin balances at the worst perplexity", worst == "round_robin", text)]


# ------------------------------------------------------------------------------------------------- tables


def ladder_table(outcomes: Sequence[Outcome], mode: str) -> Table:
    """What the ladder made of each fault."""
    rows = []
    for fault in SCENARIOS:
        rung = "breaker" if fault == "slow expert" else "ladder"
        group = select(outcomes, fault=fault, rung=rung, mode=mode)
        if not group:
            continue
        kinds = Counter(o.repair for o in group if o.repair)
        told = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()) or "-"
        rows.append(
            (
                fault,
                spread(o.detected for o in group),
                told,
                spread(o.restored for o in group if o.repair),
                " → ".join(perplexity(getattr(o, f"loss_{when}") for o in group) for when in _WHEN),
                f"{median(o.straggler_worst for o in group):.2f} → {median(o.straggler_end for o in group):.2f}",
                sum(o.lost for o in group),
                sum(o.false_actions for o in group),
            )
        )
    columns = ("fault", "noticed", "repaired by", "even after", "perplexity", "busiest expert", "lost", "false")
    note = (
        "Steps: from the fault to the first alert, and from the repair that was kept to an even load; median, and "
        "range over the seeds. Perplexity of held-out text before, right after the fault, and 40 steps later. Busiest "
        "expert: load relative to fair, at its worst and at the end. Lost: outputs that were not numbers, tokens "
        "without any expert. False: repairs of what was not broken."
    )
    return Table(f"The ladder, {mode}", columns, tuple(rows), note)


_WHEN = ("before", "broken", "after")


def matrix(outcomes: Sequence[Outcome], mode: str) -> Table:
    """Each fault against each repair by itself."""
    group = [o for o in outcomes if o.case.mode == mode and o.case.fault != "slow expert"]
    rungs = list(dict.fromkeys(o.case.rung for o in group if SCENARIOS[o.case.fault].blames))
    rows = []
    for fault in SCENARIOS:
        cells = [select(group, fault=fault, rung=rung) for rung in rungs]
        if any(cells):
            rows.append((fault, *(_cell(cell) for cell in cells)))
    note = (
        "Perplexity at the end; in brackets how many of the seeds were repaired by it and kept it, and after how many "
        "steps the load was even (median). Without brackets: it could not be done, did not help, or was undone."
    )
    return Table(f"Each repair by itself, {mode}", ("fault", *rungs), tuple(rows), note)


def _cell(group: Sequence[Outcome]) -> str | None:
    if not group:
        return None
    text = perplexity(o.loss_after for o in group)
    if any(o.stopped for o in group):
        return f"stopped {sum(o.stopped for o in group)}/{len(group)}"
    kept = [o for o in group if o.repair is not None]
    if not kept:
        return text
    return f"{text} ({len(kept)}/{len(group)}, {spread((o.restored for o in kept), short=True)})"


def spread(values: Iterable[float | None], short: bool = False) -> str:
    """Median, and the range when there is one."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, middle, high = min(known), median(known), max(known)
    return f"{middle:g}" if short or low == high else f"{middle:g} [{low:g}, {high:g}]"


def perplexity(losses: Iterable[float]) -> str:
    """exp of the mean loss; "-" where outputs were not numbers."""
    values = list(losses)
    mean = sum(values) / len(values)
    return f"{math.exp(mean):.1f}" if math.isfinite(mean) else "-"


def main() -> None:
    """Run, print, and exit with 1 unless every claim holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and the main cells: under a minute")
    parser.add_argument("--seeds", type=int, default=5, help="of data, weights and faults")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="where results are kept")
    add_output_arguments(parser)
    options = parser.parse_args()
    quick = options.quick or options.smoke
    cases = cases_of(1 if quick else options.seeds, quick)
    outcomes = run_all(cases, options.out, options.jobs)
    checked = claims(outcomes)
    verdict = Table(
        "What must hold",
        ("claim", "holds", "figures"),
        tuple((claim.text, "yes" if claim.holds else "NO", claim.evidence) for claim in checked),
    )
    tables = [verdict, *(ladder_table(outcomes, mode) for mode in MODES)]
    tables += [] if quick else [matrix(outcomes, mode) for mode in MODES]
    settings = {"seeds": len({case.seed for case in cases}), "healthy_steps": HEALTHY_STEPS, "steps": STEPS_AFTER}
    emit(Report(settings, tuple(tables)), options)
    holding = sum(claim.holds for claim in checked)
    summary = f"chaos: {holding} of {len(checked)} claims hold in {len(outcomes)} runs"
    print(summary, file=sys.stderr if options.json == "-" else sys.stdout)
    sys.exit(holding < len(checked))


if __name__ == "__main__":
    main()
