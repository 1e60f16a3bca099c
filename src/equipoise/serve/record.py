"""A server's own run folder: what a training run's has, but for checkpoints, so that every view can show it.

The store belongs to one thread; this sink opens it in the thread that first writes, and forgets what is old.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from equipoise.disk.atomic import atomic_write
from equipoise.models.config import DecoderConfig
from equipoise.models.run_files import CONFIG
from equipoise.monitor.store import RunStore
from equipoise.types import Action, Alert, RoutingStats

KEEP_FLUSHES = 100_000  # rows per layer


class ServerRecord:
    """Implements `Sink`. folder: made if it is not there. name: of the model."""

    def __init__(self, folder: Path, name: str, config: DecoderConfig, *, keep_flushes: int = KEEP_FLUSHES) -> None:
        self.folder, self._name, self._keep = folder, name, keep_flushes
        self._store: RunStore | None = None
        self._steps: list[int] = []
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / CONFIG) as file:
            record = {"name": name, "kind": "server", "model": json.loads(config.to_json())}
            file.write(json.dumps(record, indent=2).encode())

    @property
    def store(self) -> RunStore:
        """Of the calling thread, which must be always the same."""
        if self._store is None:
            self._store = RunStore(self.folder)
            self._store.set_meta(name=self._name, kind="server", status="running")
        return self._store

    def open(self) -> None:
        """The server is running: views may say so."""
        _ = self.store

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Keep one flush; a silent one says nothing."""
        if any(stats.num_tokens for stats in window):
            self.store.routing(window)
            self._forget(window[0].step)

    def alert(self, alert: Alert) -> None:
        """Keep one change of an alert."""
        self.store.alert(alert)

    def action(self, action: Action) -> None:
        """Keep one change of a repair."""
        self.store.action(action)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keep named numbers."""
        self.store.scalars(step, values)

    def close(self) -> None:
        """In the same thread: the server has ended."""
        if self._store is not None:
            self._store.set_meta(status="finished")
            self._store.close()
            self._store = None

    def _forget(self, step: int) -> None:
        self._steps.append(step)
        if len(self._steps) >= 2 * self._keep:
            self._steps = self._steps[-self._keep :]
            self.store.forget_before(self._steps[0])
