"""The source for a monitor in this process: a sink that keeps totals. Give it to `watch(sinks=...)` and to an exporter.

Nothing is stored: after a restart the totals begin at 0 again, as those of any counter.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from equipoise.monitor.prometheus.source import LayerTotals, Snapshot
from equipoise.types import Action, Alert, Finding, RoutingStats


class LiveSource:
    """Keeps totals of what a monitor sees. Implements the protocols `Sink` (types.py) and `Source`.

    run: its name. firing: alerts that fire already, `watch.alerts` of a resumed run: a sink hears only of changes.
    max_keys: the most layers, alerts, rules and changes of repairs that are kept, each; what is beyond is only counted.
    clock: seconds since 1970.
    Any thread may write and any may read. Memory: 8 bytes per layer and expert, and the last flush.
    Raises ValueError for max_keys below 1.
    """

    def __init__(
        self,
        run: str,
        *,
        firing: Iterable[Alert] = (),
        max_keys: int = 10_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if max_keys < 1:
            raise ValueError(f"max_keys: expected at least 1, got {max_keys}")
        self.run, self._max_keys, self._clock = run, max_keys, clock
        self._lock = threading.Lock()
        self._layers: dict[str, LayerTotals] = {}
        self._firing: dict[str, Alert] = {alert.key: alert for alert in firing}
        self._aftermath: tuple[Finding, ...] = ()
        self._fired: dict[tuple[str, str], int] = {}
        self._actions: dict[tuple[str, str], int] = {}
        self._seconds: dict[str, float] = {"sink": 0.0}
        self._num_flushes = self._step = self._num_ignored = 0
        self._flushed_at: float | None = None
        self._running = True

    # --------------------------------------------------------------------------------------------------- the sink

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Add one flush."""
        with self._timed():
            for stats in window:
                before = self._layers.get(stats.layer)
                if before is not None:
                    self._layers[stats.layer] = before.plus(stats)
                elif self._has_room(self._layers):
                    self._layers[stats.layer] = LayerTotals.of(stats)
                self._step = stats.step
            self._num_flushes += 1
            self._flushed_at = self._clock()

    def alert(self, alert: Alert) -> None:
        """Take note of an alert that fires or is over."""
        with self._timed():
            if alert.state == "resolved":
                self._firing.pop(alert.key, None)
                return
            if alert.key in self._firing or self._has_room(self._firing):
                self._firing[alert.key] = alert
            kind = (alert.finding.rule, alert.finding.severity)
            if kind in self._fired or self._has_room(self._fired):
                self._fired[kind] = self._fired.get(kind, 0) + 1

    def action(self, action: Action) -> None:
        """Count one change of a repair."""
        with self._timed():
            change = (action.kind, action.state)
            if change in self._actions or self._has_room(self._actions):
                self._actions[change] = self._actions.get(change, 0) + 1

    def left(self, findings: Iterable[Finding]) -> None:
        """What repairs have left as it was, by now: no alerts, but to be known to who judges by the numbers alone."""
        with self._timed():
            self._aftermath = tuple(findings)[: self._max_keys]

    def close(self) -> None:
        """The run is over: say so, and keep what is known."""
        with self._lock:
            self._running = False

    # ------------------------------------------------------------------------------------------------- the source

    def read(self) -> Snapshot:
        """All of one moment: never one layer before a flush and another after it."""
        with self._lock:
            return Snapshot(
                run=self.run,
                layers=dict(self._layers),
                firing=tuple(self._firing.values()),
                aftermath=self._aftermath,
                fired=dict(self._fired),
                actions=dict(self._actions),
                num_flushes=self._num_flushes,
                step=self._step,
                flushed_at=self._flushed_at,
                running=self._running,
                seconds=dict(self._seconds),
                num_ignored=self._num_ignored,
            )

    def spent(self, part: str, seconds: float) -> None:
        """Add to the cost of watching what a loop has measured itself: of part "record", "flush" or another."""
        with self._lock:
            if part in self._seconds or self._has_room(self._seconds):
                self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Hold the lock, and count the time as a cost of watching."""
        with self._lock:
            begin = time.perf_counter()
            try:
                yield
            finally:
                self._seconds["sink"] += time.perf_counter() - begin

    def _has_room(self, kept: object) -> bool:
        assert isinstance(kept, dict)
        if len(kept) < self._max_keys:
            return True
        self._num_ignored += 1
        return False
