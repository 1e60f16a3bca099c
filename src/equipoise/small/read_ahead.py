"""A thread that reads experts into the cache before they are asked for. What it was asked last is all it does."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Collection, Sequence
from typing import Any

from equipoise.small.cache import ExpertCache, Key


class ReadAhead:
    """Begins with the first `ask`, ends with `close`. From any thread."""

    def __init__(self, cache: ExpertCache[Any]) -> None:
        self._cache = cache
        self._asked: tuple[Sequence[Key], Collection[Key]] | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def ask(self, keys: Sequence[Key], keep: Collection[Key]) -> None:
        """Read these, likeliest first, without making those in `keep` go; what is left of the last call is dropped."""
        with self._changed:
            if self._closed or not keys:
                return
            self._asked = keys, keep
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
                self._thread.start()
                atexit.register(self.close)  # a thread that is cut off in the middle of a read aborts the process
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread; a read that is under way is finished first. Twice is once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            atexit.unregister(self.close)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked is not None or self._closed)
                if self._closed or self._asked is None:
                    return
                (keys, keep), self._asked = self._asked, None
            for key in keys:
                if self._is_outdated():
                    break
                self._cache.prefetch(key, keep)

    def _is_outdated(self) -> bool:
        """Whether the model is a layer further, or nobody needs anything any more."""
        return self._asked is not None or self._closed
