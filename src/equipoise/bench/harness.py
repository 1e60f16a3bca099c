"""Times variants side by side in one process, and compares what they compute before they are timed.

Rounds alternate (A B C A B C ...), so that a machine that slows down slows all of them, and ratios are taken within a
round. It knows nothing of what it times and prints nothing: `equipoise.bench.report` does that. What
runs elsewhere than on the CPU needs another clock than the default.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from equipoise.bench.progress import Progress, Quiet

T = TypeVar("T")


def in_sections(
    known: Mapping[str, Callable[[Effort], Iterable[T]]], effort: Effort, only: Sequence[str]
) -> Iterator[T]:
    """What the sections of these names give, in that order; all for no names. Raises ValueError for another name."""
    if unknown := set(only) - set(known):
        raise ValueError(f"only: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    torch.manual_seed(0)
    for name in only or known:
        effort.progress.begin(name)
        yield from known[name](effort)


@dataclass(frozen=True)
class Spread:
    """A median with the 10th and 90th percentile around it."""

    median: float
    low: float
    high: float

    def times(self, factor: float) -> Spread:
        """The same in another unit."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Variant:
    """One way of computing something. run is timed; reset, before each run and after the last, is not."""

    name: str
    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None


Clock = Callable[[Callable[[], object]], float]  # calls it once; the seconds that took


def host_seconds(run: Callable[[], object]) -> float:
    """Seconds until it returns. What it returns is freed off the clock."""
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    del result
    return seconds


@dataclass(frozen=True)
class Effort:
    """How long to measure. A round calls a variant as often as it takes to fill min_seconds, at least once.

    progress: is told of the rounds. clock: times one call.
    """

    rounds: int = 15
    warmup: int = 2
    min_seconds: float = 0.0
    progress: Progress = field(default_factory=Quiet)
    clock: Clock = host_seconds

    def filling(self, min_seconds: float) -> Effort:
        """The same with another least time per round and variant."""
        return replace(self, min_seconds=min_seconds)


Seconds = Mapping[str, tuple[float, ...]]  # variant -> seconds per call, one value per round


def time_side_by_side(variants: Sequence[Variant], effort: Effort) -> Seconds:
    """Run the variants in alternation, after the warm-up rounds.

    Ctrl-C ends it with the whole rounds that there are, if there is one and the effort's progress says so.
    """
    if effort.progress.stopped:
        raise KeyboardInterrupt
    with _no_collection():
        for _ in range(effort.warmup):
            last = {variant.name: _seconds(variant, 1, effort.clock) for variant in variants}
        calls = {name: max(1, math.ceil(effort.min_seconds / seconds)) for name, seconds in last.items()}
        rounds = _rounds(variants, calls, effort)
    columns = zip(*rounds, strict=True)
    return {variant.name: tuple(column) for variant, column in zip(variants, columns, strict=True)}


def _rounds(variants: Sequence[Variant], calls: Mapping[str, int], effort: Effort) -> list[list[float]]:
    """Seconds per call of each variant, round by round."""
    rounds: list[list[float]] = []
    try:
        for number in range(1, effort.rounds + 1):
            gc.collect()
            rounds.append([_seconds(variant, calls[variant.name], effort.clock) for variant in variants])
            effort.progress.advance(number, effort.rounds)
    except KeyboardInterrupt:
        if not rounds or not effort.progress.stop():
            raise
    return rounds


def _seconds(variant: Variant, calls: int, clock: Clock) -> float:
    """Mean seconds of a call."""
    total = 0.0
    for _ in range(calls):
        variant.reset()
        total += clock(variant.run)
    variant.reset()
    return total / calls


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps Python's garbage collector out of the timed part."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def spread(values: Sequence[float]) -> Spread:
    """Median, 10th and 90th percentile."""
    low, median, high = np.percentile(values, (10, 50, 90))
    return Spread(float(median), float(low), float(high))


def ratio(seconds: Seconds, name: str, base: str) -> Spread:
    """Of the times of two variants, round by round: above 1, `name` is slower than `base`."""
    return spread([mine / theirs for mine, theirs in zip(seconds[name], seconds[base], strict=True)])


def fastest(seconds: Seconds, names: Sequence[str]) -> str:
    """The one with the smallest median."""
    return min(names, key=lambda name: spread(seconds[name]).median)


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of |actual - expected| / |expected| over the pairs, in the Euclidean norm."""
    pairs = zip(actual, expected, strict=True)
    return max(float(torch.dist(a.double(), e.double()) / e.double().norm()) for a, e in pairs)


def require_same(name: str, actual: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> float:
    """The relative error. Raises ValueError above the limit: what differs must not be timed side by side."""
    error = relative_error(actual, expected)
    if not error <= limit:  # also for NaN
        raise ValueError(
            f"{name}: expected the same result within a relative error of {limit:g}, got {error:.3g}; "
            "mend the variant before timing it"
        )
    return error
