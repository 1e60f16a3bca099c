"""The last minutes of routing, in bounded memory: sums per layer over time, so that any span of them is just added up.

Alerts look at the newest traffic, reaching back in time only as far as it takes to have enough of it, and never beyond
the window. Sums of flushes are kept apart while there are few, and neighbours in time are merged when there are many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from equipoise.monitor.stacked import StackedSums
from equipoise.monitor.stats import RoutingSums

Sums = Mapping[str, RoutingSums]


@dataclass(frozen=True, eq=False)
class _Span:
    """Sums over flushes between two moments, in seconds."""

    first: float
    last: float
    sums: StackedSums


class TimeWindow:
    """Sums of the last window_s seconds, in at most max_spans pieces.

    Memory: max_spans * layers * experts * 16 bytes and a little; 61 layers of 256 experts and 64 spans are 16 MB.
    A clock that jumps back goes on from there: the jump takes no time. Raises ValueError for a window that can't be.
    """

    def __init__(self, window_s: float = 600.0, max_spans: int = 64) -> None:
        if not window_s > 0:
            raise ValueError(f"window_s: expected more than 0 seconds, got {window_s}")
        if max_spans < 2:
            raise ValueError(f"max_spans: expected at least 2, got {max_spans}")
        self.window_s, self.max_spans = window_s, max_spans
        self._spans: list[_Span] = []
        self._newest: Sums = {}  # of the last span, layer by layer
        self._clock, self._now = -math.inf, 0.0  # what the clock said last, and seconds since the first flush

    def add(self, now: float, sums: Sums) -> None:
        """Take the sums of one flush at `now`, in seconds of any clock; forget what is older than the window."""
        passed = now - self._clock if math.isfinite(self._clock) else 0.0
        self._clock, self._now = now, self._now + max(0.0, passed)
        stacked, self._newest = StackedSums.of(sums), sums
        if self._spans:
            stacked = stacked.like(self._spans[-1].sums)
        self._spans.append(_Span(self._now, self._now, stacked))
        self._spans = [span for span in self._spans if span.last > self._now - self.window_s]
        if len(self._spans) > self.max_spans:
            self._merge_nearest()

    def recent(self, min_expected: float) -> dict[str, RoutingSums]:
        """Per layer, the newest flushes, as many as bring min_expected assignments per expert, or all there are.

        Where the newest alone is enough, it is the very object that was added.
        """
        if not self._spans:
            return {}
        *older, newest = self._spans
        total, enough = newest.sums.copy(), _with_enough(newest.sums, min_expected)
        found = {layer: sums for layer, sums in self._newest.items() if layer in enough or not older}
        alike = all(span.sums.layout is newest.sums.layout for span in older)
        for span in reversed(older):
            if alike and len(found) == len(total.layout):
                break
            total = total.absorb(span.sums)
            found |= total.by_layer(_with_enough(total, min_expected) - found.keys())
        rest = {place.layer for place in total.layout} - found.keys()
        return found | total.by_layer(rest)

    def whole(self) -> dict[str, RoutingSums]:
        """Per layer, everything in the window."""
        return self.recent(float("inf"))

    @property
    def seconds(self) -> float:
        """How long the window reaches back by now."""
        return self._spans[-1].last - self._spans[0].first if self._spans else 0.0

    def __len__(self) -> int:
        return len(self._spans)

    def _merge_nearest(self) -> None:
        """Join the two neighbours that lie closest in time; the newest span stays by itself, it is judged alone."""
        pairs = range(len(self._spans) - 2)
        index = min(pairs, key=lambda i: self._spans[i + 1].last - self._spans[i].first)
        a, b = self._spans[index : index + 2]
        sums = a.sums.copy().absorb(b.sums).like(b.sums)
        self._spans[index : index + 2] = [_Span(a.first, b.last, sums)]


def _with_enough(sums: StackedSums, min_expected: float) -> set[str]:
    """The layers with so many assignments per expert."""
    enough_L = sums.assignments_L >= min_expected * sums.experts_L
    return {place.layer for place, enough in zip(sums.layout, enough_L.tolist(), strict=True) if enough}
