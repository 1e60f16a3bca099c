"""The exponent of a power law y = a x^b, by least squares on the logarithms, with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Student's t at 97.5 % by degrees of freedom 1, 2, ...; from the last one on it is within 3 % of the normal's 1.96.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class PowerLaw:
    """y = scale * x ** exponent. low, high: the 95 % interval of the exponent."""

    exponent: float
    low: float
    high: float
    scale: float

    def shown(self) -> str:
        """As people read it."""
        return f"{self.exponent:.2f} [{self.low:.2f}, {self.high:.2f}]"


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """The fit of at least 3 points, all positive. Raises ValueError for fewer or others, or for one x alone."""
    if len(x) != len(y) or len(x) < 3 or min(*x, *y) <= 0 or len(set(x)) < 2:
        raise ValueError(
            f"points: expected 3 or more pairs of positive numbers with different x, got {list(x)}, {list(y)}"
        )
    log_x, log_y = np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float))
    spread_x = float(((log_x - log_x.mean()) ** 2).sum())
    exponent = float(((log_x - log_x.mean()) * (log_y - log_y.mean())).sum() / spread_x)
    offset = float(log_y.mean() - exponent * log_x.mean())
    left_over = log_y - offset - exponent * log_x
    free = len(x) - 2
    error = math.sqrt(float((left_over**2).sum()) / free / spread_x)
    margin = error * STUDENT[min(free, len(STUDENT)) - 1]
    return PowerLaw(exponent, exponent - margin, exponent + margin, math.exp(offset))
