"""The source for a run in another process: follows its run.sqlite, reading only what is new since the last time.

The run writes and never knows. A run that was resumed from a checkpoint repeats steps: repeated work counts again, so
that totals never fall while this exporter lives.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from equipoise.monitor.prometheus.source import LayerTotals, Snapshot
from equipoise.monitor.store import RunStore, StoreError, _load_stats
from equipoise.types import RoutingStats

PAGE = 64  # flushes that are read at a time: bounds memory when a long run is read for the first time
Key = TypeVar("Key")


class RunFolderSource:
    """Reads the run folder `path`. Implements the protocol `Source`; `read` may be called from any thread.

    run: its name; None takes the folder's. The whole history is read once, here: totals are those of the run and not
    of this exporter. Raises StoreError (a ValueError) when there is no run at `path`. Later trouble with the file is
    not raised: `read` returns the last picture with readable=False.
    """

    def __init__(self, path: str | Path, *, run: str | None = None) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._last = _follow(Snapshot(run=run or self.path.resolve().name), self.path)
        self._seconds = 0.0

    def read(self) -> Snapshot:
        """What the run has written by now."""
        with self._lock:
            begin = time.perf_counter()
            try:
                found = _follow(self._last, self.path)
            except StoreError:
                found = replace(self._last, readable=False)
            self._seconds += time.perf_counter() - begin
            self._last = replace(found, seconds={"read": self._seconds})
            return self._last


def _follow(last: Snapshot, path: Path) -> Snapshot:
    """The next picture. A connection of its own each time: SQLite wants one per thread, and folders get moved."""
    with RunStore.open_readonly(path) as store, store.snapshot():
        newest, alerts = store.latest_routing(), store.alerts()
        step = newest[0].step if newest else 0
        layers, flushes = dict(last.layers), last.num_flushes
        for stats, begins_flush in _routing_after(store, min(last.step, step)):  # step < last.step: it was truncated
            before = layers.get(stats.layer)
            layers[stats.layer] = LayerTotals.of(stats) if before is None else before.plus(stats)
            flushes += begins_flush
        state = {alert.key: alert for alert in alerts}
        fired = Counter((a.finding.rule, str(a.finding.severity)) for a in alerts if a.state == "firing")
        changes = Counter((action.kind, str(action.state)) for action in store.actions())
        return replace(
            last,
            layers=layers,
            firing=tuple(alert for alert in state.values() if alert.state == "firing"),
            fired=_grown(last.fired, fired),
            actions=_grown(last.actions, changes),
            num_flushes=flushes,
            step=step,
            flushed_at=_time_of(store, step) if flushes > last.num_flushes else last.flushed_at,
            running=store.meta().get("status") == "running",
            readable=True,
        )


def _routing_after(store: RunStore, step: int) -> Iterator[tuple[RoutingStats, bool]]:
    """Every record of the flushes after `step`, in order, and whether it is the first of its flush."""
    while True:
        steps = store._rows("SELECT DISTINCT step FROM routing WHERE step > ? ORDER BY step LIMIT ?", (step, PAGE))
        if not steps:
            return
        (last,), previous = steps[-1], step
        query = "SELECT stats, counts FROM routing WHERE step > ? AND step <= ? ORDER BY step, id"
        for text, counts in store._rows(query, (step, last)):
            stats = _load_stats(text, counts)
            yield stats, stats.step != previous
            previous = stats.step
        step = last


def _time_of(store: RunStore, step: int) -> float:
    """When the flush of `step` was written. Training keeps the loss of each step with its time; else it is the file's.

    Of a write-ahead log, the newer file of the two counts.
    """
    times = {at: when for at, _, when in store.scalar_history("loss", last=1000)}
    if step in times:
        return times[step]
    files = (store.path, store.path.with_name(store.path.name + "-wal"))
    return max(file.stat().st_mtime for file in files if file.exists())


def _grown(before: Mapping[Key, int], now: Mapping[Key, int]) -> dict[Key, int]:
    """The larger of both by key: what a resumed run has taken back has happened all the same."""
    return {key: max(before.get(key, 0), now.get(key, 0)) for key in {**before, **now}}
