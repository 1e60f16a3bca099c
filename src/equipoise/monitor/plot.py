"""One picture of one layer's history: who got the tokens, step by step, and what was done about it.

Reads the run store, writes a PNG. Needs matplotlib (`equipoise[plot]`), without its global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.monitor.store import RunStore
from equipoise.types import RoutingStats

HOT, OTHER, INK = "#c8321e", "#8fa3b8", "#333333"
MARK_ROW, MARK_ROWS = 12.0, 3  # points per row of labels above the plot, and the most rows
MARK_COLOURS = ("#7a3db8", "#b86e00", "#1d7a3a", "#20639b")


def plot_layer_load(store: RunStore, layer: str, path: str | Path, *, marks: Mapping[str, int] | None = None) -> Path:
    """Draw every expert's share of the tokens over the steps, and the effective experts below; return the path.

    marks: steps to mark by label, such as {"injected": 240, "detected": 260, "repaired": 280}. The expert with the
    largest share of all times is highlighted.
    Raises ValueError for an unknown layer, and ImportError where matplotlib is missing.
    """
    return draw_layer_load(store.routing_history(layer), path, marks=marks)


def draw_layer_load(
    history: Sequence[RoutingStats], path: str | Path, *, marks: Mapping[str, int] | None = None
) -> Path:
    """The same, of a layer's records by step, at least one."""
    figure_type, canvas_type = matplotlib_parts()
    figure = figure_type(figsize=(9.0, 5.4), dpi=150, layout="constrained")
    canvas_type(figure)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    marks = marks or {}
    title_pad = 6.0 + MARK_ROW * min(MARK_ROWS, len(marks))
    top.set_title(
        f"{history[0].layer}: share of the tokens per expert", loc="left", fontsize=11, color=INK, pad=title_pad
    )
    _draw_shares(top, history, title_pad)
    _draw_effective(below, history)
    for axes in (top, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    _draw_marks(top, below, marks)
    below.set_xlabel("step")
    path = Path(path)
    figure.savefig(path, format="png")
    return path


def token_shares(history: Sequence[RoutingStats]) -> np.ndarray:
    """float64 (windows, E): the share of the window's tokens that reach each expert; fair is K/E."""
    counts = np.stack([stats.counts_E for stats in history]).astype(np.float64)
    shares: np.ndarray = counts / np.array([[max(stats.num_tokens, 1)] for stats in history])
    return shares


def _draw_shares(axes: Any, history: Sequence[RoutingStats], title_pad: float) -> None:
    steps = [stats.step for stats in history]
    shares = token_shares(history)
    num_experts = shares.shape[1]
    hot = int(shares.max(axis=0).argmax())
    peak = int(shares[:, hot].argmax())
    fair = float(shares.sum(axis=1).mean()) / num_experts
    marker = "o" if len(steps) == 1 else None  # a single window has no line to draw
    opacity = max(0.25, 0.9 - num_experts / 100)
    for share in np.delete(shares, hot, axis=1).T:
        axes.plot(steps, share, color=OTHER, linewidth=1.0, alpha=opacity, marker=marker, markersize=3)
    axes.plot(steps, shares[:, hot], color=HOT, linewidth=2.2, marker=marker)
    axes.axhline(fair, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    _label_right(axes, fair, f"fair {fair:.1%}")
    # the scale reaches at least to four fair shares: an even layer must not look uneven
    axes.set_ylim(0, min(1.03, max(4.0 * fair, 1.1 * float(shares.max()))) or 1.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("share of tokens")
    label = f"expert {hot}: at most {shares[peak, hot]:.0%}, step {steps[peak]}"
    axes.set_title(label, loc="right", fontsize=10, color=HOT, weight="bold", pad=title_pad)


def _draw_effective(axes: Any, history: Sequence[RoutingStats]) -> None:
    num_experts = history[-1].num_experts
    marker = "o" if len(history) == 1 else None
    axes.plot(
        [s.step for s in history], [s.effective_experts for s in history], color=INK, linewidth=1.8, marker=marker
    )
    axes.set_ylim(0, num_experts * 1.08)
    axes.set_yticks(sorted({0, num_experts // 2, num_experts}))
    axes.set_ylabel("effective\nexperts")
    _label_right(axes, num_experts, f"of {num_experts}")


def _label_right(axes: Any, height: float, text: str) -> None:
    axes.text(1.005, height, text, transform=axes.get_yaxis_transform(), va="center", color=INK, fontsize=9)


def _draw_marks(top: Any, below: Any, marks: Mapping[str, int]) -> None:
    """Vertical lines through both panels; labels above, on up to three rows because marks are often close together."""
    rows = min(MARK_ROWS, len(marks))
    for index, (label, step) in enumerate(sorted(marks.items(), key=lambda item: item[1])):
        colour = MARK_COLOURS[index % len(MARK_COLOURS)]
        for axes in (top, below):
            axes.axvline(step, color=colour, linewidth=1.2)
        first, last = top.get_xlim()
        top.annotate(
            f"{label}, step {step}",
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3.0 + MARK_ROW * (rows - 1 - index % rows)),  # the first on top, as one reads
            textcoords="offset points",
            ha="right" if step > first + 0.8 * (last - first) else "left",
            color=colour,
            fontsize=9,
        )


def matplotlib_parts() -> tuple[Any, Any]:
    """The figure and the canvas that draws it into memory; never pyplot, whose state is global."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is not installed; pip install 'equipoise[plot]'") from error
    return Figure, FigureCanvasAgg
