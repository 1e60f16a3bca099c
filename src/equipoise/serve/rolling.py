"""Numbers of the last seconds, for people and alerts: rates, and quantiles of latencies. Bounded, thread-safe."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np


class Rolling:
    """Values of one kind over the last window_s seconds, at most `most` of them."""

    def __init__(self, window_s: float = 60.0, most: int = 10_000, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s, self._clock = window_s, clock
        # rings, and no objects that live for a minute among those of requests: they keep memory from being given back
        self._times, self._values = np.empty(most), np.empty(most)
        self._num_added = 0
        self._lock = threading.Lock()
        self._began = clock()

    def add(self, *values: float) -> None:
        """New ones, now."""
        now = self._clock()
        with self._lock:
            for value in values:
                place = self._num_added % len(self._values)
                self._times[place], self._values[place] = now, value
                self._num_added += 1

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
        """In no order."""
        since = self._clock() - self._window_s
        with self._lock:
            kept = min(self._num_added, len(self._values))
            found: np.ndarray = self._values[:kept][self._times[:kept] >= since]  # a copy
            return found
