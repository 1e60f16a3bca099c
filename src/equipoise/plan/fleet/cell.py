"""One queue of a simulation: queries in the order of their arrival, and the steps that take them along."""

from __future__ import annotations

from math import inf

import numpy as np

from equipoise.plan.fleet.scenario import Batching

Array = np.ndarray


class Cell:
    """The queue of ranks that go through steps together.

    times: float64 (N,), ascending, when queries arrive. rank_N: int64, where. Afterwards start_N and done_N, float64
    (N,), are when each query's step began and ended, infinite where it didn't, and rejected_N is True for those that
    found the queue full.
    """

    def __init__(self, times: Array, rank_N: Array, batching: Batching, ranks: int) -> None:
        self.times, self.rank_N = times, rank_N
        self.start_N, self.done_N = np.full(len(times), inf), np.full(len(times), inf)
        self.rejected_N = np.zeros(len(times), dtype=bool)
        self._window_s = batching.window_s
        self._max_batch, self._max_waiting = batching.max_batch * ranks, batching.max_waiting * ranks
        self._line = np.empty(len(times), dtype=np.int64)  # who was admitted, in order; those of [head, tail) wait
        self._head = self._tail = self._seen = 0
        self._free_at = 0.0

    def look(self, now: float) -> None:
        """Admit who has arrived until now, as far as there is room to wait."""
        until = int(np.searchsorted(self.times, now, side="right"))
        new = np.arange(self._seen, until)
        room = max(self._max_waiting - (self._tail - self._head), 0)
        self.rejected_N[new[room:]] = True
        new = new[:room]
        self._line[self._tail : self._tail + len(new)] = new
        self._tail += len(new)
        self._seen = max(until, self._seen)

    def next_start(self) -> float:
        """When the next step begins: infinite when nobody comes any more."""
        waiting = self._tail - self._head
        if not waiting and self._seen == len(self.times):
            return inf
        first = self.times[self._line[self._head] if waiting else self._seen]
        full = self._seen + min(self._max_batch, self._max_waiting) - waiting - 1  # who makes the batch full
        full_at = inf if full >= len(self.times) else -inf if full < self._seen else self.times[full]
        return float(max(self._free_at, min(first + self._window_s, full_at)))

    def take(self, start: float) -> Array:
        """Begin a step at next_start(): int64, the numbers of the queries that go along."""
        self.look(start)
        taken = self._line[self._head : min(self._tail, self._head + self._max_batch)]
        self._head += len(taken)
        return taken

    def finish(self, taken: Array, start: float, seconds: float) -> None:
        """What was taken at start is served after so many seconds, and the ranks are free again."""
        self.start_N[taken] = start
        self.done_N[taken] = self._free_at = start + seconds
