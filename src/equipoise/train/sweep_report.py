"""What a sweep found: means over seeds, differences seed by seed with a confidence interval, a table, a picture.

Reads results, runs nothing. The interval is Student's for paired differences: settings that share a seed share weights,
data order and validation text, so what the seed does to both cancels. The picture needs matplotlib (`equipoise[plot]`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from equipoise.disk.atomic import atomic_write
from equipoise.host.extras import require
from equipoise.train.sweep import CellResult, SweepResult

# name of the field: heading of its column, format of the mean, of the spread (None: not shown, a clock's is no news)
MEASURES = {
    "loss": ("loss", ".3f", ".3f"),
    "max_violation": ("MaxVio", ".2f", ".2f"),
    "specialisation": ("specialisation", ".3f", ".3f"),
    "cosine": ("cosine", "+.2f", ".2f"),
    "ratio": ("ratio", ".2g", ".1g"),
    "negative_share": ("negative", ".0%", ".0%"),
    "tokens_per_s": ("tokens/s", ",.0f", None),
}
INTERFERENCE = (
    "cosine",
    "ratio",
    "negative_share",
)  # not shown without a balancing gradient: no angle is no 90 degrees
COMPARED = ("loss", "max_violation", "specialisation")
PANELS = {
    "loss": ("Validation loss", "nats per token"),
    "max_violation": ("Imbalance at the end", "MaxVio (0 is even)"),
    "specialisation": ("Specialisation by domain, beyond chance", "mutual information, nats"),
    "cosine": ("Interference on the routers' weights", "cosine of balancing to task gradient"),
}
COLOURS = ("#20639b", "#c8321e", "#1d7a3a", "#7a3db8", "#b86e00", "#333333")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, GRID = "#333333", "#e6e6e6"


@dataclass(frozen=True)
class Difference:
    """A setting minus its baseline, paired by seed: mean, and the 95 % confidence interval (infinite for one seed)."""

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Setting:
    """One coefficient with one rate, over its seeds.

    mean, spread: by measure; the spread is the standard deviation over seeds (n - 1), 0 for one. Measures that a
    seed lacks are left out. to_baseline: by measure, against the smallest coefficient at the same rate.
    """

    coef: float
    rate: float
    seeds: tuple[int, ...]
    mean: Mapping[str, float]
    spread: Mapping[str, float]
    to_baseline: Mapping[str, Difference]

    def fields(self) -> dict[str, Any]:
        """For JSON; an interval without ends is null."""
        differences = {
            name: {"mean": d.mean, "interval_95": [d.low, d.high] if math.isfinite(d.low) else None}
            for name, d in self.to_baseline.items()
        }
        plain = {"coef": self.coef, "rate": self.rate, "seeds": self.seeds, "mean": dict(self.mean)}
        return plain | {"spread": dict(self.spread), "to_baseline": differences}


def settings(result: SweepResult) -> list[Setting]:
    """One record per rate and coefficient of which there is a result, ascending."""
    found = []
    for rate in result.grid.rates:
        for coef in result.grid.coefs:
            cells = _cells(result, coef, rate)
            if cells:
                smallest = result.grid.coefs[0]
                found.append(_setting(coef, rate, cells, {} if coef == smallest else _cells(result, smallest, rate)))
    return found


def _cells(result: SweepResult, coef: float, rate: float) -> dict[int, CellResult]:
    return {cell.seed: cell for cell in result.cells if (cell.coef, cell.rate) == (coef, rate)}


def _setting(coef: float, rate: float, cells: Mapping[int, CellResult], baseline: Mapping[int, CellResult]) -> Setting:
    values = {name: [getattr(cell, name) for cell in cells.values()] for name in MEASURES}
    whole = {name: numbers for name, numbers in values.items() if None not in numbers}
    paired = [seed for seed in cells if seed in baseline]
    return Setting(
        coef=coef,
        rate=rate,
        seeds=tuple(cells),
        mean={name: float(np.mean(numbers)) for name, numbers in whole.items()},
        spread={name: float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0 for name, numbers in whole.items()},
        to_baseline={
            name: paired_difference(
                [getattr(cells[seed], name) for seed in paired], [getattr(baseline[seed], name) for seed in paired]
            )
            for name in COMPARED
            if paired and name in whole
        },
    )


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Mean of values - baseline, pair by pair, and its 95 % confidence interval by Student's t."""
    differences = np.subtract(values, baseline)
    mean, n = float(differences.mean()), len(differences)
    half = student_95(n - 1) * float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Difference(mean, mean - half, mean + half)


def student_95(degrees: int) -> float:
    """The t that a variable of Student's distribution exceeds in size with probability 0.05. degrees: 1 or more."""
    low, high = 0.0, 13.0  # 12.71 at one degree is the largest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """P(|T| <= t): the finite series of Abramowitz and Stegun, 26.7.3 (odd degrees) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for power in range(1 + odd, degrees, 2):
        total += term
        term *= math.cos(angle) ** 2 * power / (power + 1)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


# ------------------------------------------------------------------------------------------------- files and tables


def write_report(result: SweepResult) -> dict[str, Any]:
    """Write sweep.json and sweep.png into the sweep's folder; return what sweep.json holds."""
    picture = plot_sweep(result, result.out / "sweep.png")
    report = result.fields() | {"settings": [each.fields() for each in settings(result)], "picture": str(picture)}
    with atomic_write(result.out / "sweep.json") as file:
        file.write(json.dumps(report, indent=2).encode())
    return report


def sweep_tables(result: SweepResult) -> RenderableType:
    """Means and spreads; then differences to the baseline, a star where the interval excludes zero."""
    found = settings(result)
    seeds = len(result.grid.seeds)
    values = Table(title=f"Mean ± standard deviation over {seeds} seed(s)", title_justify="left", box=box.SIMPLE)
    for name in ("rate", "coef", *(heading for heading, *_ in MEASURES.values())):
        values.add_column(name, justify="right")
    for setting in found:
        cells = [_with_spread(setting, name) for name in MEASURES]
        values.add_row(_first(found, setting), f"{setting.coef:g}", *cells)
    if len(result.grid.coefs) == 1:
        return values
    base = result.grid.coefs[0]
    title = f"Difference to coefficient {base:g} at the same rate, seed by seed, and its 95 % interval"
    note = "* excludes 0; where nothing differs, 1 interval in 20 does so by chance"
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left", box=box.SIMPLE)
    for name in ("rate", "coef", *(MEASURES[name][0] for name in COMPARED)):
        table.add_column(name, justify="right")
    for setting in found:
        if setting.coef != base:
            cells = [_with_interval(setting, name) for name in COMPARED]
            table.add_row(_first(found, setting, base), f"{setting.coef:g}", *cells)
    return Group(values, table)


def _first(found: Sequence[Setting], setting: Setting, left_out: float | None = None) -> str:
    """The rate, where a block of rows with it begins."""
    rows = [each for each in found if each.rate == setting.rate and each.coef != left_out]
    return f"{setting.rate:g}" if setting is rows[0] else ""


def _with_spread(setting: Setting, name: str) -> str:
    if name not in setting.mean or (name in INTERFERENCE and setting.mean["ratio"] == 0.0):
        return "-"
    _, style, spread = MEASURES[name]
    return f"{setting.mean[name]:{style}}" + (f" ± {setting.spread[name]:{spread}}" if spread else "")


def _with_interval(setting: Setting, name: str) -> str:
    difference = setting.to_baseline.get(name)
    if difference is None:
        return "-"
    style = "+" + MEASURES[name][1]
    if not math.isfinite(difference.low):
        return f"{difference.mean:{style}} (one seed)"
    star = "*" if difference.is_clear else " "
    return f"{difference.mean:{style}} [{difference.low:{style}}, {difference.high:{style}}]{star}"


# ------------------------------------------------------------------------------------------------------- picture


def plot_sweep(result: SweepResult, path: Path) -> Path:
    """Four panels over the coefficient, a line per rate through the means, a dot per seed; return the path.

    The coefficient's axis is logarithmic, with 0 apart at its left. Raises DataError where matplotlib is missing.
    """
    figure = require("matplotlib.figure", "plot").Figure(figsize=(10.0, 7.4), dpi=150, layout="constrained")
    require("matplotlib.backends.backend_agg", "plot").FigureCanvasAgg(figure)
    places = _places(result.grid.coefs)
    for axes, name in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _draw_panel(axes, result, name, places)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    seeds = len(result.grid.seeds)
    figure.suptitle(
        f"{result.recipe}: Switch loss ({result.grid.scope} scope) and balancing bias, {result.steps} steps, "
        f"{seeds} seed{'s' if seeds > 1 else ''}\nlines: means; dots: single runs",
        fontsize=11,
        color=INK,
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    figure.savefig(path, format="png")
    return path


def _places(coefs: Sequence[float]) -> dict[float, float]:
    """Where each coefficient stands: its logarithm, and 0 one and a half decades left of the smallest."""
    logs = {coef: math.log10(coef) for coef in coefs if coef > 0}
    zero = {0.0: min(logs.values(), default=0.0) - 1.5} if 0.0 in coefs else {}
    return zero | logs


def _draw_panel(axes: Any, result: SweepResult, name: str, places: Mapping[float, float]) -> None:
    title, label = PANELS[name]
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_ylabel(label)
    axes.set_xlabel("coefficient of the Switch loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xticks(list(places.values()), [_power(coef) for coef in places])
    axes.set_xlim(min(places.values()) - 0.4, max(places.values()) + 0.4)
    if name == "cosine":
        axes.axhline(0.0, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        largest = max((abs(cell.cosine) for cell in result.cells), default=0.0)
        axes.set_ylim(-max(0.2, 1.15 * largest), max(0.2, 1.15 * largest))
    rates = result.grid.rates
    for index, rate in enumerate(rates):
        shift = 0.09 * (index - (len(rates) - 1) / 2)  # or the dots of one rate would hide those of another
        _draw_rate(axes, result, name, rate, {coef: place + shift for coef, place in places.items()}, index)
    if name == "max_violation":
        axes.set_ylim(bottom=0.0)
    if 0.0 in places and len(places) > 1:  # the axis is broken between 0 and the smallest coefficient
        gap = (places[0.0] + sorted(places.values())[1]) / 2
        axes.text(gap, 0.0, "//", transform=axes.get_xaxis_transform(), ha="center", va="center", fontsize=11)


def _draw_rate(
    axes: Any, result: SweepResult, name: str, rate: float, places: Mapping[float, float], index: int
) -> None:
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    style = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1.8}
    points = []
    for setting in settings(result):
        drawn = name in setting.mean and not (name in INTERFERENCE and setting.mean["ratio"] == 0.0)
        if setting.rate == rate and drawn:
            seeds = [getattr(cell, name) for cell in _cells(result, setting.coef, rate).values()]
            place = places[setting.coef]
            axes.plot([place] * len(seeds), seeds, ".", color=colour, alpha=0.45, markersize=6)
            points.append((setting.coef, place, setting.mean[name]))
    above = [(place, mean) for coef, place, mean in points if coef > 0]
    axes.plot(*zip(*above, strict=True) if above else ([], []), label=f"bias rate {rate:g}", **style)
    if points and points[0][0] == 0.0:
        (_, place, mean), *_ = points
        axes.plot([place, *(p for p, _ in above[:1])], [mean, *(m for _, m in above[:1])], linestyle=":", **style)


def _power(coef: float) -> str:
    """As on a logarithmic axis where it is a power of ten."""
    if coef == 0.0:
        return "0"
    exponent = math.log10(coef)
    return f"$10^{{{exponent:.0f}}}$" if math.isclose(exponent, round(exponent), abs_tol=1e-9) else f"{coef:g}"
