"""Statistics of routing as pure functions, written once for NumPy, torch and JAX arrays (array API standard).

They judge nothing (detectors.py does) and collect nothing (recorder.py does). What tokens choose together, by domain,
before and after: stats_selections.py. Near ties, biases, drift: stats_drift.py. Definitions: H is Shannon's entropy in
nats, 0 ln 0 = 0. Without any token there is nothing to say, and every function answers as for an even, undecided
router: load shares 1/E, entropies ln E, mutual information 0, logit moments 0. So emptiness never looks like collapse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import add
from typing import Any, NamedTuple, TypeVar

import numpy as np
from array_api_compat import array_namespace, device

from equipoise.types import RoutingStats

Number = TypeVar("Number", int, float)
Array = Any  # a NumPy, torch or JAX array: the standard has no common type to name

DEAD_LOAD = 0.1  # an expert below this load relative to fair is dead...
DEAD_MIN_EXPECTED = 100.0  # ...if it should have had this many assignments: fewer prove nothing


# ------------------------------------------------------------------------------------------------ of the counts


def load_share(counts_E: Array) -> Array:
    """Share of the assignments that each expert got, (..., E) -> (..., E), sums to 1; 1/E each without assignments."""
    xp = array_namespace(counts_E)
    num_experts = _num_experts(counts_E, "counts_E")
    total = xp.sum(counts_E, axis=-1, keepdims=True)  # before the cast: the sum of integers is exact
    empty = total == 0
    share = _real(counts_E) / _real(xp.where(empty, xp.ones_like(total), total))
    return xp.where(empty, xp.full_like(share, 1.0 / num_experts), share)


def effective_experts(counts_E: Array) -> Array:
    """exp(H(f)) of the load shares f, (..., E) -> (...), in [1, E]: how many even experts the load is worth."""
    return array_namespace(counts_E).exp(_entropy(load_share(counts_E)))


def load_entropy(counts_E: Array) -> Array:
    """H(f) / ln E of the load shares f, (..., E) -> (...), in [0, 1]; 1 is even, and 1 for a single expert."""
    return _relative_entropy(_entropy(load_share(counts_E)), counts_E.shape[-1])


def _relative_entropy(entropy: Array, num_experts: int) -> Array:
    return entropy / math.log(num_experts) if num_experts > 1 else array_namespace(entropy).ones_like(entropy)


def max_violation(counts_E: Array) -> Array:
    """MaxVio, max_e c_e / mean(c) - 1, (..., E) -> (...), in [0, E - 1]; 0 is even (arXiv 2408.15664, eq. 4)."""
    return array_namespace(counts_E).max(load_share(counts_E), axis=-1) * counts_E.shape[-1] - 1.0


def min_load(counts_E: Array) -> Array:
    """Load of the least loaded expert relative to fair, (..., E) -> (...), in [0, 1]; 1 is even."""
    return array_namespace(counts_E).min(load_share(counts_E), axis=-1) * counts_E.shape[-1]


def straggler_factor(counts_E: Array) -> Array:
    """Load of the busiest expert relative to fair, MaxVio + 1, (..., E) -> (...), in [1, E].

    With one expert per device and time in proportion to rows, the step takes so many times as long as an even one.
    """
    return max_violation(counts_E) + 1.0


def rank_straggler_factor(counts_E: Array, rank_of_expert_E: Sequence[int], num_ranks: int) -> Array:
    """Load of the busiest rank relative to a fair rank's, (..., E) -> (...), in [1, R]; the ranks wait for it.

    rank_of_expert_E: for each expert the rank that owns it, in [0, R). num_ranks: R; a rank may own no expert.
    1 / this is what SGLang logs as balancedness (`sglang:srt/eplb/expert_distribution.py`).
    Raises ValueError when rank_of_expert_E has another length or names a rank outside [0, R).
    """
    xp = array_namespace(counts_E)
    ranks = np.asarray(rank_of_expert_E)
    if ranks.shape != (counts_E.shape[-1],):
        raise ValueError(
            f"rank_of_expert_E: expected one rank for each of {counts_E.shape[-1]} experts, got shape {ranks.shape}"
        )
    if ranks.min() < 0 or ranks.max() >= num_ranks:
        raise ValueError(
            f"rank_of_expert_E: expected ranks in [0, {num_ranks}), got {ranks.min()} to {ranks.max()}; raise num_ranks"
        )
    share = load_share(counts_E)
    member_ER = xp.asarray(ranks[:, None] == np.arange(num_ranks), dtype=share.dtype, device=device(share))
    return xp.max(xp.matmul(share, member_ER), axis=-1) * num_ranks


def token_share(counts_E: Array, num_tokens: int) -> Array:
    """Utilisation: the share of all tokens that reach each expert, (..., E) -> (..., E), in [0, 1]; fair is K/E.

    With K distinct experts per token it sums to K. `load_share` is the share of assignments, at most 1/K of them.
    0 without tokens.
    """
    return _real(counts_E) / max(num_tokens, 1)


def hot_experts(counts_E: Array, capacity_factor: float = 1.25) -> Array:
    """Which experts are above the capacity ceil(factor * T K / E), at least 1: (..., E) -> bool (..., E).

    counts_E: before drops, so that their sum is T K. The rule of `layer.capacity.Capacity.limit`: these are the experts
    that lose assignments where a capacity is in force. Raises ValueError for a factor that is not above 0.
    """
    if not capacity_factor > 0:
        raise ValueError(f"capacity_factor: expected more than 0, got {capacity_factor}")
    xp = array_namespace(counts_E)
    total = _real(xp.sum(counts_E, axis=-1, keepdims=True))
    limit = total * (capacity_factor / _num_experts(counts_E, "counts_E"))
    limit = xp.ceil(limit * (1.0 - 4.0 * xp.finfo(limit.dtype).eps))  # 1.1 * 100 / 10 is 11, not 11.000000000000002
    return _real(counts_E) > xp.maximum(limit, xp.ones_like(limit))


def cold_experts(counts_E: Array, load: float = DEAD_LOAD, min_expected: float = DEAD_MIN_EXPECTED) -> Array:
    """Which experts are below `load` relative to fair: (..., E) -> bool (..., E).

    None while the fair load, T K / E, is below min_expected: in a window of 32 tokens a perfectly fair router with
    256 experts and K = 8 leaves 36 % of them below a tenth of the mean. min_expected=0 takes the gate away.
    """
    xp = array_namespace(counts_E)
    expected = _real(xp.sum(counts_E, axis=-1, keepdims=True)) / _num_experts(counts_E, "counts_E")
    return (_real(counts_E) < load * expected) & (expected >= min_expected)


def coefficient_of_variation(counts_E: Array) -> Array:
    """CV, biased standard deviation over mean of the counts, (..., E) -> (...), in [0, sqrt(E - 1)].

    CV^2 is the variance of the load relative to fair. E / (1 + CV^2) = 1 / sum f^2 also counts effective experts.
    """
    return array_namespace(counts_E).std(load_share(counts_E), axis=-1) * counts_E.shape[-1]


def gini(counts_E: Array) -> Array:
    """Gini's coefficient sum_i (2i - E - 1) f_(i) / E of the sorted shares, (..., E) -> (...), in [0, 1 - 1/E]."""
    return _gini(load_share(counts_E))


def _gini(share: Array) -> Array:
    xp = array_namespace(share)
    num_experts = share.shape[-1]
    weights = xp.arange(1 - num_experts, num_experts, 2, dtype=share.dtype, device=device(share))
    return xp.sum(weights * xp.sort(share, axis=-1, stable=False), axis=-1) / num_experts


def max_violation_floor(num_experts: int, expected: float) -> float:
    """The MaxVio that a perfectly fair router shows by chance, about sqrt(2 ln E / mu); infinite for mu = 0.

    expected: mu, the assignments that each expert is to expect, T * K / E. The expected maximum of E independent
    normal deviations with variance 1/mu, an upper bound for it; alerts belong on what exceeds it.
    """
    return math.sqrt(2.0 * math.log(num_experts) / expected) if expected > 0 else math.inf


# ------------------------------------------------------------------------------- of the probabilities and logits


def marginal_entropy(probs_TE: Array) -> Array:
    """H(mean_t p_t) in nats, in [0, ln E]; low means that the router prefers the same experts for all tokens."""
    num_tokens, num_experts = _tokens_experts(probs_TE, "probs_TE")
    xp = array_namespace(probs_TE)
    if num_tokens == 0:
        return _scalar(probs_TE, math.log(num_experts))
    return _entropy(xp.mean(probs_TE, axis=0))


def token_entropy(probs_TE: Array) -> Array:
    """Mean over the tokens of H(p_t) in nats, in [0, ln E]; high means that the router is undecided."""
    num_tokens, num_experts = _tokens_experts(probs_TE, "probs_TE")
    if num_tokens == 0:
        return _scalar(probs_TE, math.log(num_experts))
    return array_namespace(probs_TE).mean(_entropy(probs_TE))


def mutual_information(probs_TE: Array) -> Array:
    """H(mean_t p_t) - mean_t H(p_t) in nats, in [0, ln E]: how much the token tells about the expert."""
    return marginal_entropy(probs_TE) - token_entropy(probs_TE)


class LogitMoments(NamedTuple):
    """Of the router logits: mean and biased standard deviation over all entries, mean log-sum-exp over tokens."""

    mean: Array
    std: Array
    logsumexp: Array


def logit_moments(logits_TE: Array) -> LogitMoments:
    """Mean, standard deviation and mean log-sum-exp of router logits (T, E); zeros without tokens."""
    num_tokens, _ = _tokens_experts(logits_TE, "logits_TE")
    if num_tokens == 0:
        zero = _scalar(logits_TE, 0.0)
        return LogitMoments(zero, zero, zero)
    xp = array_namespace(logits_TE)
    top_T1 = xp.max(logits_TE, axis=-1, keepdims=True)  # subtracted, so that large logits do not overflow
    logsumexp_T = xp.log(xp.sum(xp.exp(logits_TE - top_T1), axis=-1)) + top_T1[:, 0]
    return LogitMoments(xp.mean(logits_TE), xp.std(logits_TE), xp.mean(logsumexp_T))


# ------------------------------------------------------------------------------------------ of a recorder's window


@dataclass(frozen=True, eq=False)
class RoutingSums:
    """What a recorder adds up over a window of one layer. Everything is a sum, so that windows and ranks just add.

    num_tokens: T, real tokens. counts_E: int64 (E,), assignments. probs_sum_E: float64 (E,), sum over tokens of p_te.
    token_entropy_sum: sum over tokens of H(p_t) in nats. logit_sum, logit_sq_sum: over all T * E logits.
    logsumexp_sum: over tokens. dropped, rerouted: assignments without room, by reason (see `RoutingStats`).
    losses: each balancing loss times the tokens of its micro-batch, added up; divided by num_tokens it is the mean.
    """

    num_tokens: int
    counts_E: np.ndarray
    probs_sum_E: np.ndarray
    token_entropy_sum: float
    logit_sum: float
    logit_sq_sum: float
    logsumexp_sum: float
    dropped: Mapping[str, int]
    losses: Mapping[str, float]
    rerouted: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def num_assignments(self) -> int:
        """The sum of counts_E."""
        return int(self.counts_E.sum())


def merge(*parts: RoutingSums) -> RoutingSums:
    """The sums over all of these windows (or ranks) of one layer, at least one, added up in their order.

    Raises ValueError if the numbers of experts differ.
    """
    first = parts[0]
    if wrong := [part for part in parts if len(part.counts_E) != len(first.counts_E)]:
        raise ValueError(
            f"counts_E: cannot merge windows of {len(first.counts_E)} and {len(wrong[0].counts_E)} experts; "
            "merge sums of the same layer only"
        )
    return RoutingSums(
        num_tokens=sum(part.num_tokens for part in parts),
        counts_E=_summed([part.counts_E for part in parts]),
        probs_sum_E=_summed([part.probs_sum_E for part in parts]),
        token_entropy_sum=_in_order([part.token_entropy_sum for part in parts]),
        logit_sum=_in_order([part.logit_sum for part in parts]),
        logit_sq_sum=_in_order([part.logit_sq_sum for part in parts]),
        logsumexp_sum=_in_order([part.logsumexp_sum for part in parts]),
        dropped=_added([part.dropped for part in parts]),
        rerouted=_added([part.rerouted for part in parts]),
        losses=_added([part.losses for part in parts]),
    )


def _in_order(values: Sequence[float]) -> float:
    """From the first one on: `sum` begins with 0, and 0 + -0.0 is another zero than -0.0."""
    return reduce(add, values)


def _summed(parts: Sequence[np.ndarray]) -> np.ndarray:
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


def _added(parts: Sequence[Mapping[str, Number]]) -> dict[str, Number]:
    """By key, of those that have it."""
    total: dict[str, Number] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total[key] + value if key in total else value
    return total


def routing_stats(layer: str, step: int, sums: RoutingSums) -> RoutingStats:
    """The record of one layer's window, from its exact sums.

    The variance of the logits is E[z^2] - E[z]^2: exact enough while |mean| is not thousands of standard deviations.
    """
    return all_routing_stats(step, {layer: sums})[0]


def all_routing_stats(step: int, sums: Mapping[str, RoutingSums]) -> list[RoutingStats]:
    """The records of all layers, in the order of `sums`: the same numbers, with one pass over layers of one size."""
    sizes = dict.fromkeys(_num_experts(each.counts_E, "counts_E") for each in sums.values())
    of_size = {E: {name: each for name, each in sums.items() if len(each.counts_E) == E} for E in sizes}
    records = {stats.layer: stats for layers in of_size.values() for stats in _of_one_size(step, layers)}
    return [records[name] for name in sums]


def _of_one_size(step: int, layers: Mapping[str, RoutingSums]) -> list[RoutingStats]:
    sums = list(layers.values())
    counts_LE = np.stack([each.counts_E for each in sums])
    probs_LE = np.stack([each.probs_sum_E for each in sums]) / np.maximum([[each.num_tokens] for each in sums], 1)
    share_LE, num_experts = load_share(counts_LE), counts_LE.shape[1]  # once for all of the numbers below
    entropy_L = _entropy(share_LE)
    columns = [
        _relative_entropy(entropy_L, num_experts).tolist(),
        (share_LE.max(-1) * num_experts - 1.0).tolist(),
        np.exp(entropy_L).tolist(),
        (share_LE.std(-1) * num_experts).tolist(),
        _gini(share_LE).tolist(),
        (share_LE.min(-1) * num_experts).tolist(),
        counts_LE.max(-1).tolist(),
        _entropy(probs_LE).tolist(),
        _indices(cold_experts(counts_LE)),
    ]
    return [
        _record(name, step, layers[name], row) for name, row in zip(layers, zip(*columns, strict=True), strict=True)
    ]


def _record(layer: str, step: int, sums: RoutingSums, row: tuple[Any, ...]) -> RoutingStats:
    evenness, violation, effective, cv, gini_of_counts, least, most, marginal, dead = row
    num_experts, tokens = len(sums.counts_E), max(sums.num_tokens, 1)
    ln_experts = math.log(num_experts)
    undecided = sums.num_tokens == 0
    marginal = ln_experts if undecided else marginal
    per_token = ln_experts if undecided else sums.token_entropy_sum / tokens
    logit_mean = sums.logit_sum / (tokens * num_experts)
    logit_var = sums.logit_sq_sum / (tokens * num_experts) - logit_mean**2
    return RoutingStats(
        layer=layer,
        step=step,
        num_tokens=sums.num_tokens,
        counts_E=sums.counts_E,
        dropped=dict(sums.dropped),
        rerouted=dict(sums.rerouted),
        load_entropy=evenness,
        token_entropy=per_token / ln_experts if num_experts > 1 else 1.0,
        marginal_entropy=marginal / ln_experts if num_experts > 1 else 1.0,
        mutual_information=marginal - per_token,
        max_violation=violation,
        effective_experts=effective,
        max_token_share=most / tokens,
        dead_experts=dead,
        logit_mean=logit_mean,
        logit_std=math.sqrt(logit_var) if not logit_var < 0 else 0.0,  # rounding may go below 0; NaN must stay NaN
        logit_logsumexp=sums.logsumexp_sum / tokens,
        losses={name: value / tokens for name, value in sums.losses.items()},
        load_cv=cv,
        gini=gini_of_counts,
        min_load=least,
    )


def dead_experts(counts_E: np.ndarray) -> tuple[int, ...]:
    """Experts below a tenth of the fair load; none while fewer than 100 assignments each were to be expected."""
    return _indices(cold_experts(counts_E)[None])[0]


def _indices(mask_LE: np.ndarray) -> list[tuple[int, ...]]:
    """Of each row, where it is set."""
    rows = zip(mask_LE, np.any(mask_LE, axis=-1), strict=True)
    return [tuple(np.flatnonzero(row).tolist()) if is_set else () for row, is_set in rows]


# ------------------------------------------------------------------------------------------------------- helpers


def _entropy(share: Array) -> Array:
    """H in nats over the last axis; where(p > 0) keeps 0 ln 0 at 0 without a NaN or a warning."""
    xp = array_namespace(share)
    safe = xp.where(share > 0, share, xp.ones_like(share))
    return -xp.sum(share * xp.log(safe), axis=-1)


def _real(x: Array) -> Array:
    """x as real floating; integers become the library's default (float64 in NumPy, float32 in torch and JAX)."""
    xp = array_namespace(x)
    if xp.isdtype(x.dtype, "real floating"):
        return x
    return xp.astype(x, xp.__array_namespace_info__().default_dtypes()["real floating"])


def _scalar(like: Array, value: float) -> Array:
    """A 0-dim array of the library, dtype and device of `like`."""
    xp = array_namespace(like)
    return xp.full_like(xp.sum(like), value)


def _num_experts(x: Array, name: str) -> int:
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected one entry per expert on the last axis, got shape {tuple(x.shape)}")
    return int(x.shape[-1])


def _tokens_experts(x: Array, name: str) -> tuple[int, int]:
    if x.ndim != 2 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape (T, E), got {tuple(x.shape)}; flatten batch and sequence to tokens")
    return int(x.shape[0]), int(x.shape[1])
