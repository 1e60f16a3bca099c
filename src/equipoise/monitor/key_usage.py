"""How evenly the keys of a product-key layer are used: what the monitor's exact counts say about very many experts.

Source: arXiv 1907.05242, section 4.4: the share of keys that are used at all, and the divergence from uniform use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from equipoise.types import RoutingStats


@dataclass(frozen=True)
class KeyUsage:
    """One layer over one window.

    used: share of the keys with at least one assignment, in [0, 1]. used_by_chance: what that share would be, were
    every assignment drawn evenly: with few assignments most keys are unused in any layer. unevenness: KL divergence of
    the use from uniform in nats, in [0, ln N]; 0 is even. unevenness_by_chance: what even draws would show on average,
    about (N - 1) / (2 assignments) where every key has many. used_first, used_second: share of the sub-keys of each
    half that are used.
    """

    used: float
    used_by_chance: float
    unevenness: float
    unevenness_by_chance: float
    used_first: float
    used_second: float


def key_usage(stats: RoutingStats) -> KeyUsage:
    """Of a layer whose number of experts is a square, expert i n + j having the sub-keys i and j.

    Raises ValueError for another number of experts and for a window without assignments.
    """
    N, total = stats.num_experts, stats.num_assignments
    n = math.isqrt(N)
    if n * n != N or total == 0:
        raise ValueError(
            f"stats: expected assignments in a layer of n x n experts, got {total} in {stats.layer} of {N}. Product "
            "keys are those of `Peer` layers; give the window some tokens."
        )
    shares = stats.counts_E[stats.counts_E > 0] / total
    grid = stats.counts_E.reshape(n, n)
    return KeyUsage(
        used=len(shares) / N,
        used_by_chance=-math.expm1(total * math.log1p(-1 / N)) if N > 1 else 1.0,
        unevenness=float((shares * np.log(shares * N)).sum()),
        unevenness_by_chance=_by_chance(N, total),
        used_first=float((grid.sum(1) > 0).mean()),
        used_second=float((grid.sum(0) > 0).mean()),
    )


def _by_chance(num_keys: int, total: int) -> float:
    """The mean of the divergence over even draws: a key's count is binomial(total, 1 / num_keys)."""
    if num_keys == 1:
        return 0.0
    mean = total / num_keys
    wide = 12 * math.sqrt(mean) + 40  # what is beyond has a probability below 1e-20
    counts = range(max(1, int(mean - wide)), min(total, int(mean + wide)) + 1)
    log_p, log_q = -math.log(num_keys), math.log1p(-1 / num_keys)
    ways = math.lgamma(total + 1)
    found = 0.0
    for c in counts:
        log_pmf = ways - math.lgamma(c + 1) - math.lgamma(total - c + 1) + c * log_p + (total - c) * log_q
        found += math.exp(log_pmf) * c / mean * math.log(c / mean)
    return found
