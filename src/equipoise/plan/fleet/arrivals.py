"""When simulated queries arrive, and what a first tier that hashes makes of them."""

from __future__ import annotations

import numpy as np

from equipoise.plan.fleet.routes import zipf
from equipoise.plan.fleet.scenario import Demand

Array = np.ndarray
NUM_KEYS = 50_000  # different keys: a vocabulary, or sessions


def arrival_times(rng: np.random.Generator, traffic: Demand) -> Array:
    """float64, ascending, in [0, seconds): a Poisson process at the mean rate; with bursts its rate alternates.

    In and out of bursts times are exponential (a Markov-modulated Poisson process); the mean stays qps.
    """
    if traffic.burst == 1:
        return np.sort(rng.uniform(0, traffic.seconds, rng.poisson(traffic.qps * traffic.seconds)))
    share = traffic.burst_share
    calm = traffic.qps * (1 - share * traffic.burst) / (1 - share)
    now, in_burst, parts = 0.0, bool(rng.random() < share), []
    while now < traffic.seconds:
        mean_s = traffic.burst_s if in_burst else traffic.burst_s * (1 - share) / share
        end = min(now + rng.exponential(mean_s), traffic.seconds)
        rate = traffic.qps * traffic.burst if in_burst else calm
        parts.append(np.sort(rng.uniform(now, end, rng.poisson(rate * (end - now)))))
        now, in_burst = end, not in_burst
    return np.concatenate(parts)


def hashed_shares(rng: np.random.Generator, groups: int, key_skew: float) -> Array:
    """float64 (groups,): the share of the traffic that a random table sends to each group, keys being Zipf."""
    table = rng.integers(groups, size=NUM_KEYS)
    return np.bincount(table, weights=zipf(NUM_KEYS, key_skew), minlength=groups)
