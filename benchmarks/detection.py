"""How surely and soon faults of routers are noticed, how often healthy ones are blamed: python -m benchmarks.detection

Real routers on synthetic traffic whose mix of domains drifts, broken by the fault injector, watched by
the rules and the alert book that run in training. A window is what brings 100 assignments per expert: one flush for
batches of training, many for decoded tokens. Three watchers judge the same traffic: both profiles, and "relative" with
baselines taken in health. Strong faults follow long health; weaker ones show where noticing ends. Last, whole models of
fair layers, judged by chance alone.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from rich.progress import track

from benchmarks.detection_family import MODELS, family_table
from benchmarks.detection_traffic import BATCHES, SHAPES, STRONG, WEAKER, Fault, Setting, Traffic
from equipoise.bench.report import Report, Table, add_output_arguments, announce, emit
from equipoise.monitor.alerts import AlertBook
from equipoise.monitor.baseline import baselines_of
from equipoise.monitor.detectors import MIN_EXPECTED, layers_without_opinion
from equipoise.monitor.profiles import rules_of
from equipoise.monitor.stats import RoutingSums, merge, routing_stats
from equipoise.monitor.window import TimeWindow
from equipoise.types import Detector, RoutingStats

BOOK_WINDOWS, SETTLE, BASELINE_WINDOWS = 3, 3, 8  # windows
LOWEST = 0.3  # of the logarithmic axis
Name = Literal["relative", "with baselines", "absolute"]
WATCHERS: tuple[Name, ...] = ("relative", "with baselines", "absolute")
COLOURS: dict[Name, str] = {"relative": "#20639b", "with baselines": "#3caea3", "absolute": "#c8321e"}


@dataclass
class Watcher:
    """The rules of a profile, window and alert book, as `equipoise.watch` has them."""

    name: Name
    rules: tuple[Detector, ...]
    span: TimeWindow = field(default_factory=lambda: TimeWindow(1e9))
    book: AlertBook = field(default_factory=AlertBook)
    step: int = 0

    def see(self, sums: RoutingSums) -> list[str]:
        """The rules whose alerts fire on this flush."""
        self.step += 1
        self.span.add(float(self.step), {"0": sums})
        seen = self.span.recent(MIN_EXPECTED)
        judged = [routing_stats("0", self.step, seen["0"])]
        findings = [finding for rule in self.rules for finding in rule(judged)]
        unjudged = set() if self.name == "absolute" else layers_without_opinion(judged)
        changed = self.book.observe(self.step, findings, unjudged=unjudged)
        return [alert.finding.rule for alert in changed if alert.state == "firing"]


def watchers_of(healthy: list[RoutingStats]) -> dict[Name, Watcher]:
    """One of each, the second with what is normal."""
    return {
        "relative": Watcher("relative", rules_of("relative")),
        "with baselines": Watcher("with baselines", rules_of("relative", baselines_of(healthy))),
        "absolute": Watcher("absolute", rules_of("absolute")),
    }


@dataclass
class Tally:
    """Of one setting and watcher. delays: windows from the fault to the first alert after it; inf where none came."""

    delays: list[float] = field(default_factory=list)
    healthy_windows: float = 0.0
    false_alarms: Counter[str] = field(default_factory=Counter)

    def caught(self, within: float = BOOK_WINDOWS) -> float:
        """Share of the faults that were noticed within so many windows."""
        return sum(delay <= within for delay in self.delays) / max(len(self.delays), 1)

    def add(self, other: Tally) -> None:
        """Count another one's too."""
        self.delays += other.delays
        self.healthy_windows += other.healthy_windows
        self.false_alarms += other.false_alarms


Tallies = dict[Name, Tally]


def run_seed(setting: Setting, fault: Fault, seed: int, healthy: int, tallies: Tallies) -> None:
    """One router: what is normal, `healthy` windows in health, then the fault, and as many windows as it may take."""
    traffic = Traffic(setting, seed)
    normal = traffic.flush()
    for _ in range(BASELINE_WINDOWS * setting.flushes - 1):
        normal = merge(normal, traffic.flush())
    watchers = watchers_of([routing_stats("0", 0, normal)])
    for _ in range(healthy * setting.flushes):
        sums = traffic.flush()
        for name, watcher in watchers.items():
            tallies[name].false_alarms.update(watcher.see(sums))
    injection = traffic.break_by(fault)
    waiting = set(WATCHERS)
    for flush in range(1, fault.windows * setting.flushes + 1):
        injection.advance()
        sums = traffic.flush()
        for name in sorted(waiting):
            noticed = fault.noticed | ({"load_drift"} if name == "with baselines" else set())
            if noticed & set(watchers[name].see(sums)):
                tallies[name].delays.append(flush / setting.flushes)
                waiting.discard(name)
        if not waiting:
            break
    for name in WATCHERS:
        tallies[name].healthy_windows += healthy
        if name in waiting:
            tallies[name].delays.append(math.inf)


def settings(smoke: bool) -> Iterator[Setting]:
    """Shapes by batches."""
    for num_experts, top_k in SHAPES[:2] if smoke else SHAPES:
        for batch in BATCHES:
            yield Setting(num_experts, top_k, batch)


@dataclass(frozen=True)
class Amount:
    """How much to measure. seeds, weak_seeds: routers per setting for the strong fault, and for each weaker one."""

    seeds: int
    weak_seeds: int
    healthy: int
    family_windows: int
    smoke: bool


def measure(amount: Amount) -> dict[str, dict[Setting, Tallies]]:
    """By fault and setting, with a progress bar on the terminal."""
    results: dict[str, dict[Setting, Tallies]] = {}
    work = [(STRONG, setting, seed) for setting in settings(amount.smoke) for seed in range(amount.seeds)]
    weaker = [(fault, setting) for fault in WEAKER for setting in settings(amount.smoke)]
    work += [(fault, setting, seed) for fault, setting in weaker for seed in range(amount.weak_seeds)]
    for fault, setting, seed in track(work, description="routers", disable=amount.smoke):
        long = amount.healthy if setting.batch == "training" else max(amount.healthy // 8, 1)  # many flushes each
        tallies = results.setdefault(fault.name, {}).setdefault(setting, {name: Tally() for name in WATCHERS})
        run_seed(setting, fault, seed, long if fault is STRONG else min(SETTLE, long), tallies)
    return results


# ------------------------------------------------------------------------------------------------- what came of it


def table_of(results: dict[Setting, Tallies], name: Name) -> Table:
    """One row per setting, and one for all."""
    rows = []
    for setting, tallies in results.items():
        rows.append((f"E={setting.num_experts} k={setting.top_k} {setting.batch}", *_cells(tallies[name])))
    rows.append(("all", *_cells(_sum(results, name))))
    columns = (
        "router",
        "faults",
        "caught in 3 windows [%]",
        "windows, median",
        "healthy windows",
        "false alarms",
        "which",
    )
    return Table(f"{STRONG.name}, {name}", columns, tuple(rows))


def faults_table(results: dict[str, dict[Setting, Tallies]]) -> Table:
    """One row per fault: where noticing ends."""
    rows = []
    for fault in (STRONG, *WEAKER):
        totals = [_sum(results[fault.name], name) for name in WATCHERS]
        shares = [round(100 * total.caught(within), 1) for total in totals for within in (BOOK_WINDOWS, fault.windows)]
        medians = [round(float(np.median(total.delays)), 2) for total in totals]
        rows.append((fault.name, len(totals[0].delays), fault.windows, *shares, *medians))
    columns = (
        "fault",
        "faults",
        "windows",
        *(f"{name}, {when} [%]" for name in WATCHERS for when in ("in 3 windows", "ever")),
        *(f"{name}, windows, median" for name in WATCHERS),
    )
    note = (
        "All settings together. A fault counts as noticed when an alert fires that says what it is; inf: most were not."
    )
    return Table("faults of all sizes", columns, tuple(rows), note)


def _sum(results: dict[Setting, Tallies], name: Name) -> Tally:
    total = Tally()
    for tallies in results.values():
        total.add(tallies[name])
    return total


def _cells(tally: Tally) -> tuple[str | float | int, ...]:
    which = ", ".join(f"{rule} {count}" for rule, count in tally.false_alarms.most_common(3))
    median = float(np.median(tally.delays)) if tally.delays else math.inf
    caught = round(100 * tally.caught(), 1)
    return len(tally.delays), caught, round(median, 2), int(tally.healthy_windows), tally.false_alarms.total(), which


def draw(results: dict[str, dict[Setting, Tallies]], path: Path) -> None:
    """Share noticed against windows since the strong fault; by size of the fault; false alarms per healthy window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    sized = [fault.name for fault in (STRONG, *WEAKER) if fault.name.startswith("+")][::-1]
    for name, colour in COLOURS.items():
        strong = _sum(results[STRONG.name], name)
        delays = np.sort(strong.delays)
        left.step(delays, np.arange(1, len(delays) + 1) / len(delays) * 100, where="post", color=colour, label=name)
        caught = [100 * _sum(results[fault], name).caught(STRONG.windows) for fault in sized]
        middle.plot([fault.split()[0] for fault in sized], caught, color=colour, marker="o")
        rate = 1e5 * strong.false_alarms.total() / max(strong.healthy_windows, 1)
        right.bar([name], [rate], color=colour)  # none where there was none: the axis is logarithmic
        text = f"{strong.false_alarms.total():,} in {strong.healthy_windows:,.0f}"
        right.annotate(text, (name, max(rate, LOWEST)), ha="center", va="bottom", fontsize="small")
    left.axvline(BOOK_WINDOWS, color="#666666", linewidth=1, linestyle=":")
    left.set(xlim=(0, 5), ylim=(0, 102), xlabel="windows since +20 logits", ylabel="noticed, % of the faults")
    left.legend(frameon=False, loc="lower right")
    middle.set(ylim=(-2, 102), xlabel="logits, one expert", ylabel=f"noticed within {STRONG.windows} windows, %")
    right.set(yscale="log", ylim=(LOWEST, 1e5), ylabel="false alarms per 100,000 healthy windows")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def amount_of(arguments: argparse.Namespace) -> Amount:
    """What the options ask for."""
    if arguments.smoke:
        return Amount(2, 1, 3, 40, smoke=True)
    if arguments.quick:
        return Amount(10, 5, 8, 50, smoke=False)
    return Amount(arguments.seeds, arguments.weak_seeds, arguments.healthy, arguments.family_windows, smoke=False)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="routers per setting, each broken once (default 200)")
    parser.add_argument(
        "--weak-seeds", type=int, default=40, help="routers per setting for each weaker fault (default 40)"
    )
    parser.add_argument(
        "--healthy", type=int, default=64, help="healthy windows before each fault, an eighth for decode (default 64)"
    )
    parser.add_argument(
        "--family-windows", type=int, default=2000, help="windows of each model of fair layers (default 2000)"
    )
    parser.add_argument("--quick", action="store_true", help="all settings and faults, few routers of each; no picture")
    parser.add_argument("--picture", type=Path, default=Path("docs/img/detection.png"), help="where to draw")
    add_output_arguments(parser)
    arguments = parser.parse_args()
    amount = amount_of(arguments)
    announce(f"{amount.seeds} routers per setting, {amount.weak_seeds} for each weaker fault")
    results = measure(amount)
    family = family_table(amount.family_windows, MODELS[:2] if amount.smoke else MODELS, quiet=amount.smoke)
    if not (amount.smoke or arguments.quick):
        draw(results, arguments.picture)
    strong = tuple(table_of(results[STRONG.name], name) for name in WATCHERS)
    told = {
        "seeds": amount.seeds,
        "seeds of weaker faults": amount.weak_seeds,
        "healthy windows per router": amount.healthy,
        "windows per model": amount.family_windows,
    }
    emit(Report(told, (*strong, faults_table(results), family)), arguments)


if __name__ == "__main__":
    main()
