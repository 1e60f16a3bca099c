"""A report as a picture: bars with their spread, and curves where a table varies one number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise.bench.harness import Spread
from equipoise.bench.report import Report, Table
from equipoise.disk.atomic import atomic_path
from equipoise.host.extras import require

_NUMBER = re.compile(r"(?:[A-Z]=)?(\d+)(?: MB)?")
WIDTH, ROW = 9.0, 0.32  # inches


def write_picture(report: Report, path: Path) -> None:
    """One panel per table, as a PNG. Raises ValueError without matplotlib, or for a report without a spread."""
    require("matplotlib", "plot").use("Agg", force=False)
    from matplotlib.figure import Figure

    tables = [table for table in report.tables if _spread_columns(table)]
    if not tables:
        raise ValueError("picture: expected at least one table with times, got none; leave out --picture")
    heights = [3.2 if _numbers(table) else 0.9 + ROW * len(table.rows) for table in tables]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(tables), squeeze=False, height_ratios=heights)[:, 0]
    for axis, table in zip(axes, tables, strict=True):
        (_curves if _numbers(table) else _bars)(axis, table)
    facts = report.provenance
    figure.supxlabel(f"{facts['command']}, {facts['date']}, {facts['cpu']}, {facts['threads']} threads", fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _spread_columns(table: Table) -> list[int]:
    """Columns that have a spread in every row that has anything there."""
    columns = range(1, len(table.columns))
    return [
        column
        for column in columns
        if any(isinstance(row[column], Spread) for row in table.rows)
        and all(row[column] is None or isinstance(row[column], Spread) for row in table.rows)
    ]


def _numbers(table: Table) -> list[int]:
    """What the rows vary, where their names are numbers; else nothing."""
    found = [_NUMBER.fullmatch(str(row[0])) for row in table.rows]
    return [int(match[1]) for match in found if match] if len(found) > 1 and all(found) else []


def _bars(axis: Any, table: Table) -> None:
    """The first column with a spread."""
    column = _spread_columns(table)[0]
    rows = [(str(row[0]), row[column]) for row in table.rows if isinstance(row[column], Spread)]
    names, cells = [name for name, _ in rows], [cell for _, cell in rows if isinstance(cell, Spread)]
    axis.barh(names, [cell.median for cell in cells], xerr=_errors(cells), color="#4477aa", ecolor="#222222")
    axis.invert_yaxis()
    axis.set_title(table.title, loc="left", fontsize=9)
    axis.set_xlabel(table.columns[column], fontsize=8)
    axis.tick_params(labelsize=7)


def _curves(axis: Any, table: Table) -> None:
    """Every column of times or rates, on logarithmic axes."""
    x = _numbers(table)
    for column in _spread_columns(table):
        cells = [row[column] for row in table.rows]
        if all(isinstance(cell, Spread) and cell.low > 0 for cell in cells):
            own = [cell for cell in cells if isinstance(cell, Spread)]
            axis.errorbar(
                x, [cell.median for cell in own], yerr=_errors(own), label=table.columns[column], marker="o", capsize=2
            )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_title(table.title, loc="left", fontsize=9)
    axis.set_xlabel(table.columns[0], fontsize=8)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)


def _errors(cells: Sequence[Spread]) -> list[list[float]]:
    return [[cell.median - cell.low for cell in cells], [cell.high - cell.median for cell in cells]]
