"""The thread that owns the engine, and how others reach it: submit, cancel, drain, and call between two steps.

Answers go to asyncio queues, all pieces of a step in one hand-over. What a request asks for is checked before it gets
here; the engine thread only computes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from equipoise.serve.engine import Backend, OverloadedError
from equipoise.serve.posted import fulfil
from equipoise.serve.request import FinishReason, Output, Request, RequestError

T = TypeVar("T")


class DrainingError(RuntimeError):
    """The server is on its way out and takes no new requests."""


class StoppedError(RuntimeError):
    """The engine's thread has ended."""


@dataclass(frozen=True)
class Progress:
    """num_steps: so far. seconds: since the last step or call ended, or the thread began to work, while requests are
    open; else 0. error: the thread has ended with it."""

    num_steps: int
    seconds: float
    num_open: int
    error: str


class _Listener:
    """Where the pieces of one answer go."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.queue: asyncio.Queue[Output] = asyncio.Queue()


class EngineLoop:
    """Start it, submit from any number of asyncio tasks, stop it.

    running: a context for each step, in which nobody else may change the model. max_open: requests at a time; more are
    refused. clock: seconds, for `progress`.
    """

    def __init__(
        self,
        engine: Backend,
        *,
        running: Callable[[], AbstractContextManager[object]] = nullcontext,
        max_open: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self._running, self._max_open, self._clock = running, max_open, clock
        self._condition = threading.Condition()
        self._inbox: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._listeners: dict[str, _Listener] = {}
        self._draining = self._stopping = self._stale = False
        self._idle = True  # nothing to do: neither a call that was posted, nor work in the engine
        self._error = ""
        self._num_steps = 0
        self._last_progress = clock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    # ------------------------------------------------------------------------------------------------- others' side

    async def stream(
        self, request: Request, on_added: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Output, None]:
        """The pieces of the answer; the last one has `finish`. Leaving early cancels the request.

        on_added: is called when the engine has taken the request, which may be long before the first piece.
        Raises RequestError, OverloadedError, DrainingError or StoppedError instead of a first piece.
        """
        listener = _Listener(asyncio.get_running_loop())
        added = self._submit(request, listener)
        try:
            await asyncio.wrap_future(added)
            on_added()
            while True:
                output = await listener.queue.get()
                yield output
                if output.finish is not None:
                    return
        finally:
            self._close(request.id, listener)

    def _submit(self, request: Request, listener: _Listener) -> Future[None]:
        with self._condition:
            if self._error:
                raise StoppedError(self._error)
            if self._draining:  # also when it has stopped since: to whoever asks it is the same shut-down
                raise DrainingError("the server is shutting down and takes no new requests")
            if self._stopping:
                raise StoppedError("the engine has been stopped")
            if request.id in self._listeners:
                raise RequestError("id", f"expected a new one, {request.id!r} is being served")
            if len(self._listeners) >= self._max_open:
                raise OverloadedError(f"{len(self._listeners)} requests are open already")
            self._listeners[request.id] = listener
            return self._post(lambda: self.engine.add(request))

    def _close(self, id: str, listener: _Listener) -> None:
        """It waits no more. Where its answer has ended, the id may be another's by now."""
        with self._condition:
            if self._listeners.get(id) is listener:
                del self._listeners[id]
                if not self._stopping and not self._error:
                    self._post(lambda: self.cancel(id))
            self._condition.notify_all()

    def between_steps(self, function: Callable[[], T]) -> Future[T]:
        """Have the engine's thread call it before its next step."""
        with self._condition:
            if self._error or self._stopping:
                raise StoppedError(self._error or "the engine has been stopped")
            return self._post(function)

    def cancel(self, id: str, reason: FinishReason = "cancelled") -> None:
        """In the engine's thread: end a request."""
        self._hand_over(self.engine.cancel(id, reason))

    def forget_cache(self) -> None:
        """What was computed so far is computed anew before the next step; call it where the model is changed, while
        no step can run."""
        self._stale = True

    def progress(self) -> Progress:
        """Whether it moves."""
        with self._condition:
            nobody_waits = self._idle or not self._listeners
            seconds = 0.0 if nobody_waits else self._clock() - self._last_progress
            return Progress(self._num_steps, seconds, len(self._listeners), self._error)

    @property
    def state(self) -> Literal["new", "running", "ended"]:
        """Of the thread: not started yet, at work, or gone."""
        if self._thread.ident is None:
            return "new"
        return "running" if self._thread.is_alive() else "ended"

    def drain(self, timeout_s: float) -> bool:
        """Take no new requests, and wait for those that are open. Whether all ended in time."""
        with self._condition:
            self._draining = True
            return self._condition.wait_for(lambda: not self._listeners or bool(self._error), timeout_s)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    @property
    def stopping(self) -> bool:
        """Whether the thread ends after its step, or has ended."""
        return self._stopping

    def resume(self) -> None:
        """Take requests again."""
        with self._condition:
            self._draining = False

    def stop(self) -> None:
        """End the thread after its step. What is open is told that it was cancelled."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _post(self, function: Callable[[], T]) -> Future[T]:
        """Under the lock: to the inbox of the engine's thread."""
        future: Future[T] = Future()
        if self._idle:
            self._idle, self._last_progress = False, self._clock()
        self._inbox.append((future, function))
        self._condition.notify_all()
        return future

    # ------------------------------------------------------------------------------------------------- engine's thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self._end_all("cancelled", "the server has stopped")
        except BaseException as error:  # nothing may leave those who wait without an answer
            with self._condition:
                self._error = f"{type(error).__name__}: {error}"
            self._end_all("failed", self._error)

    def _turn(self) -> bool:
        """What was posted, then one step. False when it is time to end."""
        with self._condition:
            while not (self._inbox or self._stopping or self.engine.has_work):
                self._idle = True
                self._condition.wait()
            if self._stopping:
                return False
            inbox, self._inbox = self._inbox, []
        for future, function in inbox:
            fulfil(future, function)
        if steps := self.engine.has_work:
            with self._running():
                if self._stale:
                    self._stale = False
                    self.engine.forget_cache()
                outputs = self.engine.step()
            self._hand_over(outputs)
        with self._condition:
            self._num_steps += steps
            self._last_progress = self._clock()
        return True

    def _hand_over(self, outputs: list[Output]) -> None:
        """All pieces to their listeners, with one call per asyncio loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Output], Output]]] = {}
        with self._condition:
            for output in outputs:
                listener = self._listeners.get(output.id)
                if listener is None:
                    continue
                by_loop.setdefault(listener.loop, []).append((listener.queue, output))
                if output.finish is not None:
                    del self._listeners[output.id]
                    self._condition.notify_all()
        for loop, pieces in by_loop.items():
            _deliver(loop, pieces)

    def _end_all(self, reason: FinishReason, error: str) -> None:
        with self._condition:
            self._stopping = self._idle = True
            ids, inbox, self._inbox = list(self._listeners), self._inbox, []
        for future, _ in inbox:
            if future.set_running_or_notify_cancel():
                future.set_exception(StoppedError(error))
        self._hand_over([Output(id, finish=reason, error=error) for id in ids])


def _deliver(loop: asyncio.AbstractEventLoop, pieces: list[tuple[asyncio.Queue[Output], Output]]) -> None:
    def put() -> None:
        for queue, output in pieces:
            queue.put_nowait(output)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:  # that loop is closed: its listeners are gone too
        return
