"""Numbers of runs along something that was varied: a picture and a table, beside the claims that they belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.bench.claims.claim import Arm, Bench
from equipoise.bench.claims.pictures import INK
from equipoise.bench.claims.statistics import Interval, exact, student
from equipoise.disk.atomic import atomic_path
from equipoise.host.extras import require

COLOURS = ("#1f5fa8", "#c8321e", "#1d7a3a", "#b86e00", "#6b3fa0", "#333333")
MARKERS = "osD^vx"
PANEL_INCHES = (4.4, 3.0)
SHIFT = 0.012  # of the axis, by which each line's points lie beside those of the one before


@dataclass(frozen=True)
class Line:
    """arms: one for each place, None where there is none. computed: numbers in place of arms, for the first panel."""

    label: str
    arms: tuple[Arm | None, ...] = ()
    computed: tuple[float, ...] = ()


@dataclass(frozen=True)
class Panel:
    """metric: a number of the runs. beside: less that of this run with the same seed, so that seeds do not count."""

    metric: str
    title: str
    beside: Arm | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One picture with its table.

    axis: what was varied. places, ticks: where on the axis, and what is written there. joined: whether the places are
    in an order that a line may follow. note: how to read it. Raises ValueError for lines of another length.
    """

    name: str
    theme: str
    title: str
    axis: str
    places: tuple[float, ...]
    ticks: tuple[str, ...]
    panels: tuple[Panel, ...]
    lines: tuple[Line, ...]
    joined: bool = True
    note: str = ""

    def __post_init__(self) -> None:
        lengths = [len(self.ticks), *(len(line.arms or line.computed) for line in self.lines)]
        if any(length != len(self.places) for length in lengths):
            raise ValueError(
                f"curve {self.name}: expected {len(self.places)} ticks and points of each line, one for each place, "
                f"got {lengths}; put None where a line has no run"
            )


@dataclass(frozen=True)
class Drawn:
    """A curve with its intervals: for each panel and line, by their numbers, one at each place or None."""

    curve: Curve
    points: dict[tuple[int, int], tuple[Interval | None, ...]]


def measure_curve(curve: Curve, bench: Bench) -> Drawn:
    """Means over the seeds with 95 % intervals. Raises NotRunError."""
    points: dict[tuple[int, int], tuple[Interval | None, ...]] = {}
    for p, panel in enumerate(curve.panels):
        for n, line in enumerate(curve.lines):
            if line.arms:
                points[p, n] = tuple(_interval(arm, panel, bench) for arm in line.arms)
            elif p == 0:
                points[p, n] = tuple(exact(value) for value in line.computed)
    return Drawn(curve, points)


def _interval(arm: Arm | None, panel: Panel, bench: Bench) -> Interval | None:
    if arm is None:
        return None
    seeds, beside = arm.seeds(bench.seeds), panel.beside
    if beside is None:
        return student([bench.result(arm, seed)[panel.metric] for seed in seeds])
    seeds = beside.seeds(seeds)
    return student([bench.result(arm, s)[panel.metric] - bench.result(beside, s)[panel.metric] for s in seeds])


def curve_table(drawn: Drawn) -> str:
    """Markdown: a row for each panel and line, a column for each place; mean and half of the interval."""
    curve = drawn.curve
    lines = [
        f"| number | {curve.axis}: | {' | '.join(curve.ticks)} |",
        f"| --- | --- | {' | '.join('---:' for _ in curve.ticks)} |",
    ]
    for (p, n), row in drawn.points.items():
        cells = " | ".join(_shown(interval) for interval in row)
        lines.append(f"| {curve.panels[p].title} | {curve.lines[n].label} | {cells} |")
    return "\n".join(lines)


def _shown(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    half = (interval.high - interval.low) / 2
    return f"{interval.mean:.3g}" + (f" ± {half:.2g}" if math.isfinite(half) and half > 0 else "")


def draw_curve(drawn: Drawn, path: Path) -> None:
    """Write the picture. Raises DataError where matplotlib is missing."""
    curve = drawn.curve
    columns = min(2, len(curve.panels))
    rows = math.ceil(len(curve.panels) / columns)
    figure = require("matplotlib.figure", "plot").Figure(
        figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.5), dpi=130, layout="constrained"
    )
    require("matplotlib.backends.backend_agg", "plot").FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for p, axes in enumerate(panels):
        if p < len(curve.panels):
            _draw_panel(axes, drawn, p)
        else:
            axes.set_axis_off()
    if len(curve.lines) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    figure.suptitle(f"{curve.title}\nmeans with 95 % intervals over the seeds", fontsize=8.5, color=INK)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_panel(axes: Any, drawn: Drawn, p: int) -> None:
    curve = drawn.curve
    width = max(curve.places) - min(curve.places)
    for (panel, n), row in drawn.points.items():
        if panel != p:
            continue
        line = curve.lines[n]
        shift = 0.0 if line.computed else SHIFT * width * (n - (len(curve.lines) - 1) / 2)
        there = [(place + shift, interval) for place, interval in zip(curve.places, row, strict=True) if interval]
        _draw_line(axes, there, line, n, curve.joined)
    axes.set_xticks(
        curve.places, curve.ticks, rotation=0 if curve.joined else 35, ha="center" if curve.joined else "right"
    )
    axes.set_title(curve.panels[p].title, fontsize=8, loc="left", color=INK)
    axes.set_xlabel(curve.axis, fontsize=7)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_line(axes: Any, there: Sequence[tuple[float, Interval]], line: Line, n: int, joined: bool) -> None:
    places = [place for place, _ in there]
    means = [interval.mean for _, interval in there]
    halves = [interval.high - interval.mean for _, interval in there]
    colour = COLOURS[n % len(COLOURS)]
    if line.computed:
        axes.plot(places, means, linestyle=":", color=INK, linewidth=1.1, label=line.label)
        return
    axes.errorbar(
        places,
        means,
        yerr=[half if math.isfinite(half) else 0.0 for half in halves],
        fmt=MARKERS[n % len(MARKERS)] + ("-" if joined else ""),
        color=colour,
        markersize=3.5,
        linewidth=1.1,
        elinewidth=0.9,
        capsize=2,
        label=line.label,
    )
