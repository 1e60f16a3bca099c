"""What the measuring commands of `equipoise bench` share: options for the results, and one run from start to end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equipoise.bench.harness import Effort
    from equipoise.bench.report import Table


@dataclass(frozen=True)
class Output:
    """Where the results go, beside the terminal.

    Args:
        json: Print the results as one JSON object, and nothing else.
        out: Write the same here.
        markdown: A file for tables in Markdown.
        picture: A PNG of the tables as bars and curves. Needs the extra `plot`.
    """

    json: bool = False
    out: Path | None = None
    markdown: Path | None = None
    picture: Path | None = None


NOTHING = Output()


def run_bench(
    measure: Callable[[Effort], Iterable[Table | str]], effort: Effort, settings: dict[str, Any], to: Output
) -> int:
    """Measure with a progress line on stderr, then show it all. After Ctrl-C, what there was by then: 130."""
    from equipoise.bench.plot import write_picture
    from equipoise.bench.progress import Line
    from equipoise.bench.report import Report, Table, as_json, write
    from equipoise.host.extras import require

    if to.picture is not None:
        require("matplotlib", "plot")  # before the minutes, not after
    line = Line()
    tables: list[Table] = []
    notes: list[str] = []
    try:
        for item in measure(replace(effort, progress=line)):
            tables.extend([item] if isinstance(item, Table) else [])
            notes.extend([item] if isinstance(item, str) else [])
    except KeyboardInterrupt:
        line.stopped = True
    line.end()
    if line.stopped:
        notes.append("Stopped by Ctrl-C: what was not measured by then is missing.")
    if not tables:
        print("equipoise: stopped before anything was measured", file=sys.stderr)
        return 130
    report = Report(settings | {"rounds": effort.rounds}, tuple(tables), tuple(dict.fromkeys(notes)))
    if to.out is not None:
        to.out.write_text(as_json(report) + "\n", encoding="utf-8")
    write(report, "-" if to.json else None, to.markdown)
    if to.picture is not None:
        write_picture(report, to.picture)
    return 130 if line.stopped else 0
