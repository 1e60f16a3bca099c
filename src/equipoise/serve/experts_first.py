"""Which answers to go on with when not all can: those whose last tokens went to the same experts.

Weights of an expert are read once for all tokens that go to it; where reading them is what takes time, a batch that
touches fewer experts is faster. Who was left out for a given number of steps goes before all others.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from functools import reduce
from operator import or_

from equipoise.serve.sequence import Sequence


def choose_by_experts(candidates: Several[Sequence], size: int, max_skips: int) -> list[Sequence]:
    """`size` of them: first all who have been skipped max_skips times, then, one by one, who adds the fewest experts.

    Greedy set cover; ties go to who was skipped more often, then to who came first.
    """
    due = sorted((each for each in candidates if each.skipped >= max_skips), key=lambda each: -each.skipped)[:size]
    chosen = list(due)
    left = [each for each in candidates if each not in due]
    touched = reduce(or_, (each.last_experts for each in chosen), 0)
    while left and len(chosen) < size:
        best = min(left, key=lambda each: ((each.last_experts & ~touched).bit_count(), -each.skipped, each.order))
        chosen.append(best)
        left.remove(best)
        touched |= best.last_experts
    return chosen
