"""Everything the monitor has seen, as a file of JSON objects, one per line: to follow with tail, to load anywhere.

A killed process loses at most the line in hand. The run store (store.py) is the one to ask questions; this is a log.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from equipoise.monitor.sinks.line_file import LineFile
from equipoise.monitor.sinks.plain import dump, rfc3339
from equipoise.types import Action, Alert, RoutingStats


class JsonLines:
    """Appends to the file at `path`: the fields of a `RoutingStats` (a line per layer), an `Alert` or an `Action`.

    Each line has two more: record ("routing", "alert" or "action") and time (RFC 3339).
    sync: wait for the disk at each line. clock: seconds since 1970.
    """

    def __init__(self, path: str | Path, *, sync: bool = False, clock: Callable[[], float] = time.time) -> None:
        self._file = LineFile(path, sync=sync)
        self._clock = clock

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Append one line per layer."""
        for stats in window:
            self._append("routing", {f.name: getattr(stats, f.name) for f in fields(stats)})

    def alert(self, alert: Alert) -> None:
        """Append one change of an alert."""
        self._append("alert", asdict(alert))

    def action(self, action: Action) -> None:
        """Append one change of a repair, with its state and note."""
        self._append("action", {f.name: getattr(action, f.name) for f in fields(action)})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, kind: str, record: Mapping[str, Any]) -> None:
        # what tells the lines apart comes last: no field of a record can take its place
        self._file.append(dump({**record, "record": kind, "time": rfc3339(self._clock())}))


def read_json_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of the file, oldest first, without lines that a crash has cut. Raises OSError without the file."""
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record
