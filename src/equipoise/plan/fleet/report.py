"""What simulations came to, side by side: a table, and a picture of latency, queues and links."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.plan.fleet.result import FleetResult

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = ("#333333", "#c8321e", "#20639b", "#1d7a3a")
PARTS = 100  # of the time, in the picture of the queue
INK, GRID = "#333333", "#e6e6e6"


def rows(result: FleetResult) -> dict[str, str]:
    """What the table says of a design, by its name there."""
    latency, total = result.latency, max(result.assignments, 1)
    return {
        "queries served per second": f"{result.throughput:,.0f}",
        "latency p50": _ms(latency.p50),
        "latency p90": _ms(latency.p90),
        "latency p99": _ms(latency.p99),
        "waiting, mean": _ms(result.wait_s),
        "queue, mean": f"{result.queue_mean:,.0f}",
        "queue, p99": f"{result.queue_p99:,.0f}",
        "queue, most": f"{result.queue_max:,.0f}",
        "in flight at the end": f"{result.in_flight:,}",
        "turned away": f"{result.rejected:,}",
        "moved to another expert": f"{result.moved / total:.2%}",
        "spilled to the shared expert": f"{result.spilled / total:.2%}",
        "dropped": f"{result.dropped / total:.2%}",
        "tokens per step": f"{result.tokens_per_step:,.1f}",
        "ranks sent to, per token": f"{result.copies_per_token:.2f}",
        "busiest link": f"{max(result.link_load_R):.2%}",
        "mean link": f"{np.mean(result.link_load_R):.2%}",
        "busiest rank computes": f"{max(result.busy_R):.1%}",
        "mean rank computes": f"{np.mean(result.busy_R):.1%}",
        "exchanges, of a step": f"{result.link_share:.1%}",
        "straggler factor": f"{result.straggler:.2f}",
    }


def designs_table(results: Sequence[FleetResult]) -> Table:
    """A column per design."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for result in results:
        table.add_column(result.design, justify="right")
    columns = [rows(result) for result in results]
    for name in columns[0]:
        table.add_row(name, *[column[name] for column in columns])
    return table


def draw_designs(results: Sequence[FleetResult], path: str | Path) -> Path:
    """Latencies, the queue over time, and what each rank's link and experts carry; return the path of the PNG.

    Raises ImportError where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib, which is not installed; pip install 'equipoise[plot]'") from error
    figure = Figure(figsize=(10.0, 6.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    (latency, queue), (links, busy) = figure.subplots(2, 2)
    for number, result in enumerate(results):
        colour = COLOURS[number % len(COLOURS)]
        share = np.arange(len(result.latencies)) / max(len(result.latencies), 1)
        latency.plot(result.latencies * 1e3, share, color=colour, label=result.design, linewidth=1.6)
        latency.axvline(result.latency.p99 * 1e3, color=colour, linewidth=0.8, linestyle=(0, (4, 3)))
        _draw_queue(queue, result, colour)
        _bars(links, result.link_load_R, number, len(results), colour)
        _bars(busy, result.busy_R, number, len(results), colour)
    _words(latency, "queries served within; dashed: p99", "ms", "")
    latency.legend(frameon=False, fontsize=9)
    _words(queue, "queries waiting; thin: the most", "s", "")
    _words(links, "load of each rank's link, one way", "rank", "")
    _words(busy, "time that each rank computes", "rank", "")
    for axes in (latency, links, busy):
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}" if value > 1 else f"{100 * value:.3g} %")
    path = Path(path)
    figure.savefig(path, format="png")
    return path


def _draw_queue(axes: Any, result: FleetResult, colour: str) -> None:
    """Mean and most of each hundredth of the time: single samples of a saw-tooth would show a beat."""
    depth = result.depth[: len(result.depth) // PARTS * PARTS].reshape(PARTS, -1)
    middle = (np.arange(PARTS) + 0.5) / PARTS * result.seconds
    axes.plot(middle, depth.mean(axis=1), color=colour, linewidth=1.6)
    axes.plot(middle, depth.max(axis=1), color=colour, linewidth=0.6, alpha=0.6)


def _bars(axes: Any, heights: Sequence[float], number: int, many: int, colour: str) -> None:
    width = 0.8 / many
    axes.bar(np.arange(len(heights)) - 0.4 + (number + 0.5) * width, heights, width, color=colour)


def _words(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if np.isfinite(seconds) else "-"
