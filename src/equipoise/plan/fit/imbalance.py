"""How much more than its share the busiest rank of an expert group gets: chance, and experts that are more popular."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

# MaxVio over experts of a 3B model balanced by an auxiliary loss, on held-out text (arXiv 2408.15664, table 2; with a
# balancing bias it was 0.04). A rank's experts average it down, so that for ranks it errs on the safe side.
SKEW = 0.52


def chance_max_vio(assignments: float, ranks: int, quantile: float = 0.99) -> float:
    """MaxVio of ranks that a perfectly fair router stays below in that share of the layers, by chance alone.

    Each of the ranks gets a binomial number of the assignments; the normal quantile of all of them together (a union
    bound) is z sqrt((1 - 1/R) R / N) above the mean, with 1 - (1 - quantile) / R of the normal distribution below z.
    The median of the maximum is the better known sqrt(2 ln R / mean).
    """
    if ranks == 1 or assignments <= 0:
        return 0.0
    z = NormalDist().inv_cdf(1 - (1 - quantile) / ranks)
    return z * sqrt((ranks - 1) / assignments)


def max_vio(assignments: float, ranks: int, given: float | None) -> float:
    """What room is left for: `given`, or chance on top of a skew of 0.52; never more than all of it on one rank.

    assignments: of all ranks of a group together.
    """
    if ranks == 1:
        return 0.0
    found = given if given is not None else (1 + SKEW) * (1 + chance_max_vio(assignments, ranks)) - 1
    return min(found, ranks - 1.0)
