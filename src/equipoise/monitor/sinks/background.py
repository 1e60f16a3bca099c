"""A sink behind a queue and a thread, so that a slow, hanging or failing sink never holds up training or serving.

The caller only appends to a bounded queue. It doesn't deliver, retry or keep anything on disk: the sink does.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Literal, Protocol, Self, runtime_checkable

from equipoise.types import Action, Alert, RoutingStats, Sink

Kind = Literal["routing", "alert", "action"]


@runtime_checkable
class Ticks(Protocol):
    """A sink that has something to do when nothing comes, such as sending again what still holds."""

    def tick(self) -> None: ...  # noqa: D102 - described by the class


@runtime_checkable
class Closes(Protocol):
    """A sink that holds a file or a connection."""

    def close(self) -> None: ...  # noqa: D102 - described by the class


@runtime_checkable
class Spills(Protocol):
    """A sink that can put what it could not deliver somewhere, instead of waiting any longer."""

    def spill(self) -> None: ...  # noqa: D102 - described by the class


@dataclass(frozen=True)
class BackgroundState:
    """What has become of what a `Background` was given.

    pending: waiting in the queue. handled: taken by the sink without an error. errors: exceptions of the sink.
    last_error: the newest of them as text, or None. dropped: what found no room, by kind.
    """

    pending: int
    handled: int
    errors: int
    last_error: str | None
    dropped: Mapping[Kind, int]


@dataclass(frozen=True)
class _Job:
    """One call of the sink. number: how many were queued before it. kind: None for a tick."""

    number: int
    kind: Kind | None
    do: Callable[[], None]


class Background:
    """Hands everything to `sink` on a daemon thread, in order. Implements the protocol `Sink` and never raises in it.

    max_pending: how many windows, alerts and actions may wait. When it is full, the oldest routing window goes; alerts
    and actions only when no window is left, the oldest first.
    tick_s: a sink with a `tick` gets it after so many seconds without anything else to do.
    The sink belongs to this object from now on: it is called from one thread, and closed at the end. (`RunStore` can't
    be used here: SQLite wants the thread that opened it.) In a forked child the queue starts empty, with a thread of
    its own: what was waiting is the parent's to deliver. What waits when the interpreter ends gets 5 seconds.
    name: for whoever shows its state. Raises ValueError for a `max_pending` below 1 or a `tick_s` that is not positive.
    """

    def __init__(self, sink: Sink, *, max_pending: int = 1000, tick_s: float = 15.0, name: str = "") -> None:
        if max_pending < 1:
            raise ValueError(f"max_pending: expected room for at least 1 record, got {max_pending}")
        if not tick_s > 0:
            raise ValueError(f"tick_s: expected a time above 0 seconds, got {tick_s}")
        self._sink, self.name = sink, name
        self._max_pending = max_pending
        self._tick_s = tick_s if isinstance(sink, Ticks) else None
        self._owner = os.getpid()
        self._closed = False
        self._start_afresh()

    def _start_afresh(self) -> None:
        """Everything that belongs to one process: a lock copied by a fork may be held by a thread that isn't there."""
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._windows: deque[_Job] = deque()  # oldest first
        self._events: deque[_Job] = deque()  # alerts and actions
        self._queued = 0
        self._busy = False
        self._abandoned = False
        self._thread: threading.Thread | None = None
        self._handled = 0
        self._errors = 0
        self._last_error: str | None = None
        self._dropped: dict[Kind, int] = {"routing": 0, "alert": 0, "action": 0}

    # --------------------------------------------------------------------------------------------- for the caller

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Queue one window."""
        self._put("routing", partial(self._sink.routing, tuple(window)))

    def alert(self, alert: Alert) -> None:
        """Queue one change of an alert."""
        self._put("alert", partial(self._sink.alert, alert))

    def action(self, action: Action) -> None:
        """Queue one repair."""
        self._put("action", partial(self._sink.action, action))

    @property
    def state(self) -> BackgroundState:
        """How it goes, now."""
        with self._lock():
            return BackgroundState(self._pending, self._handled, self._errors, self._last_error, dict(self._dropped))

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all that was queued has been handled, at most so many seconds; returns whether it has."""
        with self._lock():
            return self._changed.wait_for(self._idle, timeout)

    def close(self, timeout: float = 5.0) -> bool:
        """Take nothing more, wait for what is queued, close the sink. Returns whether the sink has had all in time.

        After `timeout` seconds a sink with a `spill` is told to keep what is left on disk; for other sinks the rest is
        dropped and counted. May be called twice.
        """
        with self._lock():
            if self._abandoned:
                return False
            self._closed = True
            self._changed.notify_all()
            in_time = self._changed.wait_for(self._idle, timeout)
            self._abandoned = not in_time
            rest = self._leave() if self._abandoned else []
            thread = self._thread
        atexit.unregister(self.close)
        if not in_time and isinstance(self._sink, Spills):
            self._guarded(_Job(0, None, self._sink.spill))
            for job in rest:
                self._guarded(job)
        elif thread is not None and thread is not threading.current_thread():
            thread.join(timeout if in_time else 0)  # in time: it has only the sink's close to do
        elif self._owner == os.getpid():
            self._close_sink()
        return in_time

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- the queue

    def _lock(self) -> threading.Condition:
        if self._process != os.getpid():
            self._start_afresh()
        return self._changed

    @property
    def _pending(self) -> int:
        return len(self._windows) + len(self._events)

    def _idle(self) -> bool:
        return not self._pending and not self._busy

    def _put(self, kind: Kind, do: Callable[[], None]) -> None:
        with self._lock():
            if self._closed or not self._make_room(kind):
                self._dropped[kind] += 1
                return
            self._queued += 1
            (self._windows if kind == "routing" else self._events).append(_Job(self._queued, kind, do))
            if self._thread is None or not self._thread.is_alive():
                self._start_thread()
            self._changed.notify_all()

    def _make_room(self, kind: Kind) -> bool:
        """Drop what counts least, the oldest of it. False if that is the new record itself."""
        if self._pending < self._max_pending:
            return True
        if not self._windows and kind == "routing":
            return False
        self._drop((self._windows or self._events).popleft())
        return True

    def _drop(self, job: _Job) -> None:
        if job.kind is not None:
            self._dropped[job.kind] += 1

    def _take(self) -> _Job:
        """The oldest of all."""
        windows, events = self._windows, self._events
        events_first = not windows or (events and events[0].number < windows[0].number)
        return (events if events_first else windows).popleft()

    def _leave(self) -> list[_Job]:
        """Empty the queue: what the sink can spill, in order; for another sink it is dropped."""
        rest = [self._take() for _ in range(self._pending)]
        if isinstance(self._sink, Spills):
            return rest
        for job in rest:
            self._drop(job)
        return []

    # ------------------------------------------------------------------------------------------------ the thread

    def _start_thread(self) -> None:
        if self._thread is None:
            atexit.register(self.close)
        self._thread = threading.Thread(target=self._work, name="equipoise-sink", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._guarded(job)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
        if not self._abandoned:
            self._close_sink()

    def _next(self) -> _Job | None:
        """Wait for the next thing to do; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closed, self._tick_s)
            if self._closed and not self._pending:
                return None
            self._busy = True
            return self._take() if self._pending else _Job(0, None, self._tick)

    def _tick(self) -> None:
        if isinstance(self._sink, Ticks):
            self._sink.tick()

    def _close_sink(self) -> None:
        if isinstance(self._sink, Closes):
            self._guarded(_Job(0, None, self._sink.close))

    def _guarded(self, job: _Job) -> None:
        """Do it. An error is counted, and kept as text: frames would keep alive what they hold."""
        try:
            job.do()
        except Exception as error:
            with self._changed:
                self._errors += 1
                self._last_error = f"{type(error).__name__}: {error}"
        else:
            with self._changed:
                self._handled += job.kind is not None
