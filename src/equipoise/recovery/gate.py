"""Many forwards or one change: a repair waits until no forward runs, and forwards wait until it is done.

For servers that run forwards in other threads than the one that repairs. It knows nothing of models.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class GateTimeoutError(RuntimeError):
    """A change waited too long for running forwards. Nothing was changed."""


class Gate:
    """`running()` is shared, and may be nested in one thread; `changing()` is exclusive.

    A change that waits goes before forwards that begin later, so that a busy server cannot starve it.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running: dict[int, tuple[int, float]] = {}  # thread -> (depth, since)
        self._changing: int | None = None
        self._waiting = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a forward."""
        me = threading.get_ident()
        with self._condition:
            if me not in self._running and self._changing != me:
                self._condition.wait_for(lambda: self._changing is None and not self._waiting)
            depth, since = self._running.get(me, (0, time.monotonic()))  # waiting is not running
            self._running[me] = (depth + 1, since)
        try:
            yield
        finally:
            with self._condition:
                depth, since = self._running[me]  # as it is now: forwards of one thread may end in any order
                if depth > 1:
                    self._running[me] = (depth - 1, since)
                else:
                    del self._running[me]
                self._condition.notify_all()

    @contextmanager
    def changing(self, timeout_s: float = 30.0) -> Iterator[None]:
        """Around a change. Raises GateTimeoutError when forwards run on for timeout_s, and RuntimeError
        inside a forward or another change of the same thread."""
        me = threading.get_ident()
        with self._condition:
            if me in self._running:
                raise RuntimeError("gate: changing() inside running() of the same thread would wait for itself")
            if self._changing == me:
                raise RuntimeError("gate: changing() inside changing() of the same thread would wait for itself")
            self._waiting += 1
            try:
                free = self._condition.wait_for(self._is_free, timeout_s)
            finally:
                self._waiting -= 1
                self._condition.notify_all()
            if not free:
                raise GateTimeoutError(self._why(timeout_s))
            self._changing = me
        try:
            yield
        finally:
            with self._condition:
                self._changing = None
                self._condition.notify_all()

    def _is_free(self) -> bool:
        return not self._running and self._changing is None

    def _why(self, timeout_s: float) -> str:
        if not self._running:
            return f"gate: another change took longer than {timeout_s:g} s; nothing was changed"
        oldest = time.monotonic() - min(since for _, since in self._running.values())
        number = len(self._running)
        return (
            f"gate: {number} {'forward was' if number == 1 else 'forwards were'} still running after {timeout_s:g} s, "
            f"the oldest for {oldest:.1f} s; nothing was changed. Look for a forward that hangs, or give it more time"
        )
