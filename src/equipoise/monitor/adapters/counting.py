"""A watch that counts only while somebody else's loop trains: what the callbacks for trainers are made of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from equipoise.monitor.watch import Watch
from equipoise.types import Alert


class Counting:
    """The watch, paused or not, whatever the order of the calls. on_alert: gets each alert that changes at a step."""

    def __init__(self, watch: Watch, on_alert: Callable[[Alert], None] | None) -> None:
        self._watch = watch
        self._on_alert = on_alert
        self._pause = ExitStack()

    def start(self) -> None:
        """What comes is counted."""
        self._pause.close()

    def stop(self) -> None:
        """What comes is not counted."""
        self.start()
        self._pause.enter_context(self._watch.recorder.paused())

    def step(self, step: int) -> None:
        """The optimizer has stepped."""
        for alert in self._watch.step(step):
            if self._on_alert is not None:
                self._on_alert(alert)
