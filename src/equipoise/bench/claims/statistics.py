"""Intervals, and what they allow to be said: paired differences, the bootstrap, non-inferiority, the noise floor.

A claim is a range in which a number is said to lie. It is supported when the whole interval lies inside, contradicted
when no part does, open otherwise. So superiority is a range beyond the noise floor, and non-inferiority one below a
margin: the two one-sided tests of Schuirmann (1987), at 2.5 % each because the interval is the 95 % one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from equipoise.train.sweep_report import student_95

Outcome = Literal["supported", "contradicted", "open"]
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean of n values and its 95 % confidence interval; infinite for one value, which says nothing of its spread."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def reach(self) -> float:
        """How far from zero the interval goes."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Range:
    """Where a claim puts a number: between low and high, both left out.

    noise: how far outside it a number may lie that would still be on the claim's side, were it not for noise: what lies
    there as a whole neither supports nor contradicts. Raises ValueError for an empty range.
    """

    low: float = -math.inf
    high: float = math.inf
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"range: expected low below high, got {self.low} and {self.high}; swap them")

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"below {self.high:.3g}"
        return f"above {self.low:.3g}" if math.isinf(self.high) else f"{self.low:.3g} to {self.high:.3g}"


def above(low: float, noise: float = 0.0) -> Range:
    """Superiority: more than this."""
    return Range(low=low, noise=noise)


def below(high: float, noise: float = 0.0) -> Range:
    """Non-inferiority of something that should be small: less than this margin."""
    return Range(high=high, noise=noise)


def judge(interval: Interval, claimed: Range) -> Outcome:
    """What an interval says about a claim. A number that is not finite says nothing: open."""
    if not math.isfinite(interval.mean):
        return "open"
    if claimed.low < interval.low and interval.high < claimed.high:
        return "supported"
    if claimed.low - claimed.noise < interval.low and interval.high < claimed.high + claimed.noise:
        return "open"  # on the claim's side, but within noise
    if interval.high <= claimed.low or interval.low >= claimed.high:
        return "contradicted"
    return "open"


def student(values: Sequence[float]) -> Interval:
    """Mean and Student's interval. For paired runs, values are the differences, pair by pair. Raises ValueError."""
    numbers = _finite(values)
    n, mean = len(numbers), float(numbers.mean())
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = student_95(n - 1) * float(numbers.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def exact(value: float) -> Interval:
    """A number that is computed, not sampled: its interval is the number."""
    return Interval(float(value), float(value), float(value), 1)


def bootstrap(values: Sequence[float], statistic: Callable[[np.ndarray], float] = np.median, seed: int = 0) -> Interval:
    """A statistic and its percentile interval over resamples (Efron 1979), for values that are far from normal.

    Reproducible: the seed decides the resamples. Too narrow for fewer than about ten values. Raises ValueError.
    """
    numbers = _finite(values)
    if len(numbers) == 1:
        return Interval(float(numbers[0]), -math.inf, math.inf, 1)
    draws = np.random.default_rng(seed).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    found = np.array([float(statistic(numbers[draw])) for draw in draws])
    low, high = np.percentile(found, (2.5, 97.5))
    return Interval(float(statistic(numbers)), float(low), float(high), len(numbers))


def noise_floor(differences: Sequence[float]) -> float:
    """How far the difference of two runs that differ in nothing that matters may be from zero: its interval's reach."""
    return student(differences).reach


def _finite(values: Sequence[float]) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"values: expected one or more finite numbers, got {list(values)}; leave out runs that failed")
    return numbers
