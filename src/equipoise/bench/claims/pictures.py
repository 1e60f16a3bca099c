"""A picture per theme: each number's interval, the range that is claimed for it, and its control."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise.bench.claims.claim import Found, Reading
from equipoise.disk.atomic import atomic_path
from equipoise.host.extras import require

COLOURS = {"supported": "#1d7a3a", "contradicted": "#c8321e", "open": "#b86e00"}
INK, GREY, SHADE = "#333333", "#8a8a8a", "#dfe9f3"
ROW_INCHES = 0.62


def draw_theme(found: Sequence[Found], path: Path) -> None:
    """Write the picture. Raises DataError where matplotlib is missing."""
    rows = [(each, index) for each in found for index in range(len(each.readings))]
    figure = require("matplotlib.figure", "plot").Figure(
        figsize=(9.5, 0.7 + ROW_INCHES * len(rows)), dpi=130, layout="constrained"
    )
    require("matplotlib.backends.backend_agg", "plot").FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (each, index) in zip(panels, rows, strict=True):
        _draw(axes, each, index)
    figure.suptitle(
        "95 % intervals in colour, the control in grey, the claimed range shaded; each number on its own axis",
        fontsize=8,
        color=INK,
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw(axes: Any, found: Found, index: int) -> None:
    reading = found.readings[index]
    control = found.control[index] if index < len(found.control) else None
    low, high = _limits([reading] + ([control] if control else []))
    axes.axvspan(max(reading.claimed.low, low), min(reading.claimed.high, high), color=SHADE, linewidth=0)
    if control:
        _interval(axes, control, 0.0, GREY, (low, high))
    _interval(axes, reading, 1.0, COLOURS[reading.outcome], (low, high))
    axes.set(xlim=(low, high), ylim=(-0.7, 1.7), yticks=[])
    axes.tick_params(labelsize=6, length=2, pad=1)
    axes.set_ylabel(found.claim.name, rotation=0, ha="right", va="center", fontsize=7, color=INK)
    unit = f" [{reading.unit}]" if reading.unit else ""
    axes.set_title(f"{reading.name}{unit}", fontsize=6.5, loc="left", pad=2, color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _interval(axes: Any, reading: Reading, place: float, colour: str, limits: tuple[float, float]) -> None:
    interval = reading.interval
    ends = [max(interval.low, limits[0]), min(interval.high, limits[1])]
    axes.plot(ends, [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
    axes.plot([interval.mean], [place], "o", color=colour, markersize=4.5)


def _limits(readings: Sequence[Reading]) -> tuple[float, float]:
    """Of the axis: means, ends and limits that are finite, zero, and a margin."""
    numbers = [0.0]
    for reading in readings:
        interval = reading.interval
        numbers += [interval.mean, interval.low, interval.high, reading.claimed.low, reading.claimed.high]
    finite = [number for number in numbers if math.isfinite(number)]
    low, high = min(finite), max(finite)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin
