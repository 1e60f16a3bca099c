"""Statistics of what could change a router's choices, rounding or a selection bias, and of drift from a baseline.

Pure functions for NumPy, torch and JAX arrays, all of which trace under `jax.jit`. They judge nothing: what a router
shows by chance is `drift_floor`, and what text does beyond chance has to be measured on a healthy run.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from equipoise.monitor.stats import load_share

Array = Any  # a NumPy, torch or JAX array: the standard has no common type to name

BF16_EPS = 2.0**-7  # relative spacing of bfloat16 numbers


# ------------------------------------------------------------------------------------------------------ near ties


def fragile_share(scores_TE: Array, k: int, eps: float = BF16_EPS) -> Array:
    """Share of tokens whose margin is below eps times the larger of the two scores' magnitudes, in [0, 1].

    Rounding alone, of the scores or of what they are made of, can change who is chosen for these: between training and
    serving, or between two kernels. scores_TE: what top-k is taken of, selection bias included. eps: relative spacing
    of the format, 2^-7 for bfloat16, 2^-10 for float16. 0 without tokens. Raises ValueError unless 1 <= k < E.
    """
    num_experts = _num_experts(scores_TE)
    if not 1 <= k < num_experts:
        raise ValueError(f"k: expected at least 1 and less than {num_experts}, the number of experts, got {k}")
    xp = array_namespace(scores_TE)
    ordered_TE = xp.sort(scores_TE, axis=-1)
    split = num_experts - k
    chosen_T, next_T = ordered_TE[:, split], ordered_TE[:, split - 1]
    fragile_T = chosen_T - next_T < eps * xp.maximum(xp.abs(chosen_T), xp.abs(next_T))
    return _mean(xp.astype(fragile_T, scores_TE.dtype), empty=0.0)


# ------------------------------------------------------------------------------------------------- selection bias


class BiasHealth(NamedTuple):
    """Of a selection bias: its size, its size beside the scores' spread, and how many tokens it sends elsewhere.

    std: biased standard deviation over experts, in units of the scores. max_abs: the largest magnitude.
    ratio: std(b) / std(s); far above 1 the bias routes, not the router. changed_share: share of tokens, in [0, 1],
    whose top-k of s + b is another set than their top-k of s.
    """

    std: Array
    max_abs: Array
    ratio: Array
    changed_share: Array


def bias_health(bias_E: Array, scores_TE: Array, k: int) -> BiasHealth:
    """What a selection bias (arXiv 2408.15664) does: its spread beside that of the scores, and whom it redirects.

    scores_TE: what the bias is added to. Their spread is over the experts, within a token, root mean square over
    tokens: what all experts of a token share moves no choice. Infinite ratio for scores that do not differ, 0 for a
    bias that does not. 0 for ratio and changed share without tokens. Raises ValueError unless 1 <= k <= E.
    """
    num_experts = _num_experts(scores_TE)
    if not 1 <= k <= num_experts:
        raise ValueError(f"k: expected 1 to {num_experts}, the number of experts, got {k}")
    if tuple(bias_E.shape) != (num_experts,):
        raise ValueError(f"bias_E: expected shape ({num_experts},), got {tuple(bias_E.shape)}")
    xp = array_namespace(bias_E, scores_TE)
    centred_TE = scores_TE - xp.mean(scores_TE, axis=-1, keepdims=True)
    std, spread = xp.std(bias_E), xp.sqrt(_mean(xp.mean(centred_TE**2, axis=-1), empty=math.inf))
    safe = xp.where(spread > 0, spread, xp.ones_like(spread))
    ratio = xp.where((spread > 0) | (std == 0), std / safe, xp.full_like(std, math.inf))
    changed_T = xp.any(_chosen(scores_TE, k) != _chosen(scores_TE + bias_E, k), axis=-1)
    changed_share = _mean(xp.astype(changed_T, scores_TE.dtype), empty=0.0)
    return BiasHealth(std, xp.max(xp.abs(bias_E)), ratio, changed_share)


# ----------------------------------------------------------------------------------------- drift from a baseline


def population_stability_index(counts_E: Array, baseline_E: Array, pseudo_count: float = 0.5) -> Array:
    """PSI = sum (f - g) ln(f / g) of the load shares f, g of two windows: (..., E) -> (...), at least 0, in nats.

    Symmetric: KL(f, g) + KL(g, f), with KL(f, g) = sum f ln(f / g). pseudo_count is added to every expert's count in
    both, so that an expert without assignments does not make it infinite. In credit scoring 0.1 is called a small and
    0.25 a large shift; but see `drift_floor` for what two small windows of the same router show.
    """
    f, g = _smoothed(counts_E, pseudo_count), _smoothed(baseline_E, pseudo_count)
    xp = array_namespace(f, g)
    return xp.sum((f - g) * (xp.log(f) - xp.log(g)), axis=-1)


def drift_floor(num_experts: int, assignments: float, baseline_assignments: float, quantile: float = 0.99) -> float:
    """The PSI that two samples of one load stay below with this probability.

    PSI is about chi^2 with E - 1 degrees of freedom times (1/n + 1/m), for n and m assignments (B. Yurdakul,
    "Statistical Properties of Population Stability Index", 2018), when each expert has about ten or more. Quantiles of
    chi^2 by Wilson and Hilferty's cube. Infinite without assignments; 0 for one expert.
    Assignments of one token, and of tokens of one text, are not independent: real windows move more (or, for K near E,
    less) than this, so it bounds what may be called drift at all.
    """
    if not 0.0 < quantile < 1.0:
        raise ValueError(f"quantile: expected a probability between 0 and 1, got {quantile}")
    if not (assignments > 0 and baseline_assignments > 0):
        return math.inf
    degrees = num_experts - 1
    if degrees == 0:
        return 0.0
    spread = 2.0 / (9.0 * degrees)
    chi2 = degrees * max(0.0, 1.0 - spread + NormalDist().inv_cdf(quantile) * math.sqrt(spread)) ** 3
    return chi2 * (1.0 / assignments + 1.0 / baseline_assignments)


# ------------------------------------------------------------------------------------------------------- helpers


def _smoothed(counts_E: Array, pseudo_count: float) -> Array:
    """Load shares after adding pseudo_count to every expert."""
    return load_share(counts_E + pseudo_count)


def _chosen(scores_TE: Array, k: int) -> Array:
    """bool (T, E): the k largest of each row; ties go to the lower expert."""
    xp = array_namespace(scores_TE)
    order_TE = xp.argsort(scores_TE, axis=-1, descending=True, stable=True)
    return xp.argsort(order_TE, axis=-1, stable=True) < k


def _mean(x_T: Array, *, empty: float) -> Array:
    """The mean, and `empty` without tokens."""
    xp = array_namespace(x_T)
    return xp.mean(x_T) if x_T.shape[0] else xp.sum(x_T) + empty


def _num_experts(scores_TE: Array) -> int:
    if scores_TE.ndim != 2:
        raise ValueError(f"scores_TE: expected shape (T, E), got {tuple(scores_TE.shape)}; flatten batch and sequence")
    return int(scores_TE.shape[-1])
