"""Numbers of the last seconds, for people and alerts: rates, and quantiles of latencies. Bounded, thread-safe."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np


class Rolling:
    """Values of one kind over the last window_s seconds, at most `most` of them."""

    def __init__(self, window_s: float = 60.0, most: int = 10_000, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s, self._clock = window_s, clock
        self._values: deque[tuple[float, float]] = deque(maxlen=most)
        self._lock = threading.Lock()
        self._began = clock()

    def add(self, *values: float) -> None:
        """New ones, now."""
        now = self._clock()
        with self._lock:
            self._values.extend((now, value) for value in values)

    def quantiles(self, *shares: float) -> list[float]:
        """Of the values in the window; NaN where there are none."""
        values = self._recent()
        return [float(np.quantile(values, share)) if len(values) else float("nan") for share in shares]

    def per_second(self) -> float:
        """The sum of the values over the time that they are from."""
        span = min(self._window_s, self._clock() - self._began)
        return float(self._recent().sum() / span) if span > 0 else 0.0

    def mean(self) -> float:
        """NaN where there are none."""
        values = self._recent()
        return float(values.mean()) if len(values) else float("nan")

    def _recent(self) -> np.ndarray:
        since = self._clock() - self._window_s
        with self._lock:
            while self._values and self._values[0][0] < since:
                self._values.popleft()
            return np.array([value for _, value in self._values])
