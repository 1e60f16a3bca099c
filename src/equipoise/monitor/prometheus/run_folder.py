"""The source for a run in another process: follows its run.sqlite, reading only what is new since the last time.

The run writes and never knows. A run that was resumed from a checkpoint repeats steps: repeated work counts again, so
that totals never fall while this exporter lives.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from equipoise.monitor.prometheus.source import LayerTotals, Snapshot
from equipoise.monitor.store import RunStore, StoreError

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
        for flush in store.routing_after(min(last.step, step), PAGE):  # step < last.step: it was truncated
            for stats in flush:
                before = layers.get(stats.layer)
                layers[stats.layer] = LayerTotals.of(stats) if before is None else before.plus(stats)
            flushes += 1
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
            flushed_at=store.flushed_at(step) if flushes > last.num_flushes else last.flushed_at,
            running=store.meta().get("status") == "running",
            readable=True,
        )


def _grown(before: Mapping[Key, int], now: Mapping[Key, int]) -> dict[Key, int]:
    """The larger of both by key: what a resumed run has taken back has happened all the same."""
    return {key: max(before.get(key, 0), now.get(key, 0)) for key in {**before, **now}}
