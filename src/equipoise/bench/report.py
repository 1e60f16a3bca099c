"""What a benchmark prints: tables with the machine, the command and the date; as text, Markdown or JSON.

Cells are numbers or `Spread`s; how they look is decided here. It measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

from equipoise.bench.harness import Spread

SPEED_VARIABLES = ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "OMP_NUM_THREADS")  # part of what was measured, if set

PEERS = ("transformers", "accelerate", "st-moe-pytorch", "torchao", "torchtitan", "triton", "xllamacpp")

Cell = str | float | int | Spread | None


@dataclass(frozen=True)
class Table:
    """rows: a cell per column. note: how to read it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that one command measured. notes: what was left out, and why."""

    settings: dict[str, Any]
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=lambda: provenance())


def provenance() -> dict[str, Any]:
    """Where, when and by which command the numbers were made."""
    return {
        "command": _command(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load_at_end": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "equipoise": version("equipoise"),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        **{name: found for name in PEERS if (found := _installed(name))},
    } | {name: os.environ[name] for name in SPEED_VARIABLES if name in os.environ}


def _command() -> str:
    """What was typed: `equipoise ...`, or `python -m benchmarks....`."""
    program = getattr(sys.modules["__main__"], "__spec__", None)
    if program is None or program.name.startswith("equipoise"):
        return shlex.join(["equipoise", *sys.argv[1:]])
    return shlex.join(["python", "-m", program.name, *sys.argv[1:]])


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """--json, --markdown and --smoke, the same for every benchmark."""
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="PATH", help="write JSON to PATH; alone or -: to stdout"
    )
    parser.add_argument("--markdown", metavar="PATH", help="write Markdown tables to PATH")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, few rounds: does it run? Its times say nothing"
    )


def announce(what: str) -> None:
    """Say on stderr what is being measured now: a whole run takes minutes."""
    print(f"{datetime.now(UTC):%H:%M:%S} {what}", file=sys.stderr, flush=True)


def emit(report: Report, options: argparse.Namespace) -> None:
    """What the options of `add_output_arguments` ask for."""
    write(report, options.json, options.markdown and Path(options.markdown))


def write(report: Report, json_to: str | None, markdown_to: Path | None) -> None:
    """Print the tables, or the JSON instead when it goes to stdout ("-"); write what was asked for."""
    if markdown_to:
        markdown_to.write_text(markdown(report), encoding="utf-8")
    if json_to == "-":
        print(as_json(report))
        return
    if json_to:
        Path(json_to).write_text(as_json(report) + "\n", encoding="utf-8")
    print_tables(report)


def as_json(report: Report) -> str:
    """One object; each row is an object by column, a spread has median, low and high."""
    tables = [
        {
            "title": table.title,
            "note": table.note,
            "rows": [
                {column: asdict(cell) if isinstance(cell, Spread) else cell for column, cell in _named(table, row)}
                for row in table.rows
            ],
        }
        for table in report.tables
    ]
    data = {"provenance": report.provenance, "settings": report.settings, "tables": tables, "notes": report.notes}
    return json.dumps(data, indent=2)


def markdown(report: Report) -> str:
    """Tables and notes, ready for a page of documentation."""
    parts = []
    for table in report.tables:
        lines = [_line(table.columns), _line(["---", *["---:"] * (len(table.columns) - 1)])]
        lines += [_line([shown(cell) for cell in row]) for row in table.rows]
        parts += [f"### {table.title}", table.note, "\n".join(lines)]
    parts += ["\n".join(f"- {note}" for note in report.notes), *_footer(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def print_tables(report: Report) -> None:
    """The same on the terminal."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in report.tables:
        shown_table = RichTable(title=table.title, title_justify="left", caption=table.note, caption_justify="left")
        for index, column in enumerate(table.columns):
            shown_table.add_column(column, justify="right" if index else "left")
        for row in table.rows:
            shown_table.add_row(*(shown(cell) for cell in row))
        console.print(shown_table)
    for line in (*report.notes, *_footer(report)):
        console.print(line, markup=False, highlight=False)


def shown(cell: Cell) -> str:
    """A cell as people read it: three significant digits, the spread in brackets."""
    if cell is None:
        return "-"
    if isinstance(cell, Spread):
        return f"{_number(cell.median)} [{_number(cell.low)}, {_number(cell.high)}]"
    return _number(cell) if isinstance(cell, float) else str(cell)


def _number(value: float) -> str:
    if value == 0 or 0.01 <= abs(value) < 1e6:
        return f"{value:.{max(0, 2 - len(str(int(abs(value)))) + 1)}f}"
    return f"{value:.1e}"


def _named(table: Table, row: tuple[Cell, ...]) -> list[tuple[str, Cell]]:
    return list(zip(table.columns, row, strict=True))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _footer(report: Report) -> tuple[str, str]:
    facts = {key: value for key, value in report.provenance.items() if key not in ("command", "date")}
    described = ", ".join(f"{key} {value}" for key, value in (facts | report.settings).items())
    command, date = report.provenance["command"], report.provenance["date"]
    return f"`{command}`, {date}; brackets: 10th and 90th percentile.", f"{described}."
