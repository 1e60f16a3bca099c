"""Values that change with the optimizer step: balancing coefficients, learning rates. Pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __call__(self, step: int) -> float:
        """The value at `step`."""
        return self.value


@dataclass(frozen=True)
class LinearAnneal:
    """From start to end in a straight line over `steps` steps, then end."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        """The value at `step`."""
        done = min(max(step / max(self.steps, 1), 0.0), 1.0)
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class CosineAnneal:
    """From start to end along half a cosine over `steps` steps, then end."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        """The value at `step`."""
        done = min(max(step / max(self.steps, 1), 0.0), 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class HighThenLow:
    """`high` for the first `hold` steps, then a straight line down to `low` over `anneal` steps.

    Balance is won or lost early: a strong push while the router is young, a light one after.
    """

    high: float = 0.1
    low: float = 0.001
    hold: int = 1000
    anneal: int = 1000

    def __call__(self, step: int) -> float:
        """The value at `step`."""
        return LinearAnneal(self.high, self.low, self.anneal)(step - self.hold)


Schedule = Constant | LinearAnneal | CosineAnneal | HighThenLow


def value_at(value: float | Schedule, step: int) -> float:
    """A plain number as it is, a schedule at `step`."""
    return value if isinstance(value, int | float) else value(step)
