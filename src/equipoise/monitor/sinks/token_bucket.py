"""A token bucket: how long to wait so that a rate is not passed.

It counts and never waits itself. One bucket limits one destination, in one process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class TokenBucket:
    """Lets `burst` requests through at once and then `per_second`, on average.

    clock: seconds that only go forward. Raises ValueError if a number is not positive.
    """

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float]) -> None:
        for name, value in (("per_second", per_second), ("burst", burst)):
            if not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._tokens, self._last = float(burst), clock()
        self._lock = threading.Lock()

    def take(self) -> float:
        """Take one token; returns the seconds to wait before using it. The debt counts for those who come later."""
        with self._lock:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._last) * self._per_second) - 1
            self._last = now
            return max(0.0, -self._tokens / self._per_second)
