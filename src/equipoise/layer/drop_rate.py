"""How much a perfectly fair router drops at a capacity factor, and which factor keeps that small.

Chance alone overloads experts: if every token takes k of E experts evenly at random, an expert's load is
Binomial(T, k/E), and what lies above the capacity is lost. Plain arithmetic from that definition, exact up to
rounding. What an unfair router loses comes on top.
"""

from __future__ import annotations

import math

from equipoise.layer.capacity import Capacity


def expected_drop_rate(factor: float, num_tokens: int, k: int, num_experts: int) -> float:
    """Expected share of the T k assignments that are dropped: E[max(load - C, 0)] E / (T k), in [0, 1).

    C is the limit of `Capacity(factor)`. At factor 1 the rate is close to 0.4 sqrt((1 - k/E) / (T k / E)).
    num_tokens: T, the tokens that share one capacity, which are those of one forward. 0 tokens drop nothing.
    Takes some sqrt(T k / E) steps. Rounding errors are relative and grow with T: 1e-12 at T = 1,000, 1e-6 at 1e8.
    Raises ValueError for a factor that is not above 0, num_tokens below 0, and k not in [1, num_experts].
    """
    _check_sizes(num_tokens, k, num_experts)
    limit = Capacity(factor).limit(num_tokens, num_tokens * k, num_experts)
    if limit >= num_tokens:
        return 0.0
    if k == num_experts:
        return 1 - limit / num_tokens  # nothing is left to chance: every expert is offered every token
    fair = num_tokens * k / num_experts
    return _expected_excess(num_tokens, k / num_experts, limit) / fair


def factor_for(drop_rate: float, num_tokens: int, k: int, num_experts: int) -> float:
    """The smallest capacity factor, to 0.01, at which a fair router's expected drop rate is at most drop_rate.

    Arguments as in `expected_drop_rate`. Raises ValueError for those, and for a drop_rate that is not between 0 and 1.
    """
    if not 0 < drop_rate < 1:
        raise ValueError(
            f"drop_rate: expected a share between 0 and 1, got {drop_rate}; for no drops at all use no capacity"
        )
    _check_sizes(num_tokens, k, num_experts)
    too_low, enough = 0, math.ceil(100 * num_experts / k)  # hundredths; at E/k an expert has room for all tokens
    while enough - too_low > 1:
        middle = (too_low + enough) // 2
        if expected_drop_rate(middle / 100, num_tokens, k, num_experts) <= drop_rate:
            enough = middle
        else:
            too_low = middle
    return enough / 100


def _expected_excess(n: int, p: float, limit: int) -> float:
    """E[max(load - limit, 0)] for load ~ Binomial(n, p), 0 < p < 1, 0 < limit < n. Adds up positive terms only."""
    odds = p / (1 - p)
    if limit >= n * p:
        return _sum_of_excess(n, odds, limit, limit + 1, _chance(n, p, limit + 1))
    # Below the mean the short sum is the other one: load - limit = (n - limit) - (n - load), and n - load is
    # Binomial(n, 1 - p), so that E[max(load - limit, 0)] = n p - limit + E[max((n - load) - (n - limit), 0)].
    short = _sum_of_excess(n, 1 / odds, n - limit, n - limit + 1, _chance(n, 1 - p, n - limit + 1))
    return n * p - limit + short


def _sum_of_excess(n: int, odds: float, limit: int, load: int, chance: float) -> float:
    """Sum of (load - limit) P(load) from `load` up, where the chance is `chance`, until terms no longer count."""
    total, term = 0.0, chance * (load - limit)
    while term > 1e-18 * total:  # terms rise, then fall ever faster
        total += term
        chance *= odds * (n - load) / (load + 1)  # 0 after the last, load = n
        load += 1
        term = chance * (load - limit)
    return total


def _chance(n: int, p: float, load: int) -> float:
    """P(load) of Binomial(n, p)."""
    choices = math.lgamma(n + 1) - math.lgamma(load + 1) - math.lgamma(n - load + 1)
    return math.exp(choices + load * math.log(p) + (n - load) * math.log1p(-p))


def _check_sizes(num_tokens: int, k: int, num_experts: int) -> None:
    if num_tokens < 0:
        raise ValueError(f"num_tokens: expected at least 0, got {num_tokens}; pass the tokens of one forward")
    if not 1 <= k <= num_experts:
        raise ValueError(
            f"k: expected 1 to num_experts={num_experts}, got {k}; a token's experts are distinct, so lower k"
        )
