"""Statistics of who chose whom, token by token: saturation, agreement, co-selection, specialisation.

Definitions are those of OLMoE (arXiv 2409.02060, section 5), pure functions for NumPy, torch and JAX arrays. They look
at the values to refuse ids that are no experts, so they are for recorded selections and do not trace under `jax.jit`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from array_api_compat import array_namespace, device

MIN_EXPECTED_PAIRS = 5.0  # tokens: with fewer, chance alone doubles and halves
Array = Any  # a NumPy, torch or JAX array: the standard has no common type to name


# ---------------------------------------------------------------------------------- the same tokens, seen twice


def router_saturation(early_TK: Array, late_TK: Array) -> Array:
    """Share of each token's final experts that an earlier checkpoint already chose, mean over tokens, in [0, 1].

    early_TK, late_TK: int (T, K), the experts of the same tokens at both checkpoints, distinct within a row.
    (1/T) sum_t |A_t & B_t| / K. Chance is K/E. 1 without tokens.
    Raises ValueError when the shapes differ.
    """
    if early_TK.shape != late_TK.shape:
        raise ValueError(
            f"late_TK: expected the shape of early_TK, {tuple(early_TK.shape)}, got {tuple(late_TK.shape)}; "
            "route the same tokens with both checkpoints"
        )
    return _mean(_num_shared(early_TK, late_TK) / early_TK.shape[-1])


def routing_agreement(one_TK: Array, other_Tk: Array) -> Array:
    """Mean over tokens of Jaccard's index |A & B| / |A | B| of the experts chosen twice, in [0, 1]; 1 is the same.

    For two checkpoints, two precisions, training and serving. The two may have different K. 1 without tokens.
    Raises ValueError when the numbers of tokens differ.
    """
    shared_T = _num_shared(one_TK, other_Tk)
    return _mean(shared_T / (one_TK.shape[-1] + other_Tk.shape[-1] - shared_T))


def chance_agreement(num_experts: int, k: int) -> float:
    """What `routing_agreement` is on average when both choose K of E experts at random, in (0, 1]."""
    if not 1 <= k <= num_experts:
        raise ValueError(f"k: expected 1 to {num_experts}, the number of experts, got {k}")
    ways = [math.comb(k, shared) * math.comb(num_experts - k, k - shared) for shared in range(k + 1)]
    return sum(n * shared / (2 * k - shared) for shared, n in enumerate(ways)) / math.comb(num_experts, k)


# ------------------------------------------------------------------------------------------- together, and for whom


def co_selection(ids_TK: Array, num_experts: int) -> Array:
    """How often expert j is chosen given that i is: N_ij / N_i, float (E, E), in [0, 1], not symmetric.

    ids_TK: int (T, K), distinct within a row. The diagonal is 1 for experts that were chosen; rows of others are 0.
    A fair, independent router has (K - 1) / (E - 1) beside the diagonal. A pair that is always together works as one
    expert, and belongs on one device. Raises ValueError for ids outside [0, E).
    """
    _check_ids(ids_TK, num_experts)
    xp = array_namespace(ids_TK)
    pairs = ids_TK[:, :, None] * num_experts + ids_TK[:, None, :]
    num_EE = xp.reshape(_count(pairs, num_experts**2), (num_experts, num_experts))
    num_E = xp.sum(xp.where(_eye(num_EE), num_EE, xp.zeros_like(num_EE)), axis=-1)
    return _ratio(num_EE, num_E[:, None])


def co_selection_lift(counts_EE: Array) -> Array:
    """How much more often two experts are chosen together than experts with their loads would be by chance, (E, E).

    counts_EE: int, symmetric, the tokens that chose both, on the diagonal those that chose the one. With n_i on the
    diagonal and P = sum of all pairs, chance has P n_i n_j / sum_{a != b} n_a n_b, so that 1 is the average whatever K
    is. NaN on the diagonal and where chance has fewer than 5 tokens: too few to tell.
    """
    xp = array_namespace(counts_EE)
    num_EE = _real(counts_EE)
    own = _eye(counts_EE)
    n_E = xp.sum(xp.where(own, num_EE, xp.zeros_like(num_EE)), axis=-1)
    together_EE = xp.where(own, xp.zeros_like(num_EE), num_EE)
    chance_EE = xp.where(own, xp.zeros_like(num_EE), n_E[:, None] * n_E[None, :])
    total = xp.sum(chance_EE)
    expected_EE = chance_EE * (xp.sum(together_EE) / xp.where(total == 0, xp.ones_like(total), total))
    few_EE = own | (expected_EE < MIN_EXPECTED_PAIRS)
    lift_EE = together_EE / xp.where(few_EE, xp.ones_like(expected_EE), expected_EE)
    return xp.where(few_EE, xp.full_like(lift_EE, math.nan), lift_EE)


def domain_specialisation(ids_TK: Array, domains_T: Array, num_experts: int, num_domains: int) -> Array:
    """Share of a domain's tokens that reach each expert: N_ED / N_D, float (D, E), in [0, 1]; rows sum to K.

    domains_T: int (T,), in [0, D). Chance is K/E, in each row and column. Rows of domains without tokens are 0.
    Raises ValueError for ids outside [0, E), domains outside [0, D), or another number of them than of tokens.
    """
    xp = array_namespace(ids_TK)
    _check_ids(ids_TK, num_experts)
    _check_groups(domains_T, ids_TK, "domains_T")
    _check_range(domains_T, num_domains, "domains_T", "num_domains")
    num_DE = _count(domains_T[:, None] * num_experts + ids_TK, num_domains * num_experts)
    return _ratio(xp.reshape(num_DE, (num_domains, num_experts)), _count(domains_T, num_domains)[:, None])


class VocabularySpecialisation(NamedTuple):
    """Of each vocabulary entry x that occurs: its id, its number of occurrences, N_xE / N_x over the experts.

    token_ids_U: int (U,), ascending. counts_U: int (U,). share_UE: float (U, E), in [0, 1]; rows sum to K.
    """

    token_ids_U: Array
    counts_U: Array
    share_UE: Array


def vocabulary_specialisation(
    ids_TK: Array, token_ids_T: Array, num_experts: int, *, min_count: int = 1
) -> VocabularySpecialisation:
    """Share of a vocabulary entry's occurrences that reach each expert, N_xE / N_x. Chance is K/E.

    token_ids_T: int (T,), the entries routed (input ids, or predicted ids). min_count: leave rarer entries out: one
    that occurs once has shares of 0 and 1 whatever the router does.
    Raises ValueError for ids outside [0, E) or another number of entries than of tokens.
    """
    xp = array_namespace(ids_TK)
    _check_ids(ids_TK, num_experts)
    _check_groups(token_ids_T, ids_TK, "token_ids_T")
    entries_U = xp.unique_values(token_ids_T)
    rows_T = xp.searchsorted(entries_U, token_ids_T)
    counts_U = _count(rows_T, entries_U.shape[0])
    num_UE = _count(rows_T[:, None] * num_experts + ids_TK, entries_U.shape[0] * num_experts)
    share_UE = _ratio(xp.reshape(num_UE, (entries_U.shape[0], num_experts)), counts_U[:, None])
    kept = counts_U >= min_count
    return VocabularySpecialisation(entries_U[kept], counts_U[kept], share_UE[kept])


# ------------------------------------------------------------------------------------------------------- helpers


def _num_shared(one_TK: Array, other_Tk: Array) -> Array:
    """For each token, how many experts are in both rows."""
    for name, ids in (("one_TK", one_TK), ("other_Tk", other_Tk)):
        if ids.ndim != 2 or ids.shape[-1] == 0:
            raise ValueError(f"{name}: expected shape (T, K), got {tuple(ids.shape)}; flatten batch and sequence")
    if one_TK.shape[0] != other_Tk.shape[0]:
        raise ValueError(
            f"other_Tk: expected {one_TK.shape[0]} tokens, as one_TK has, got {other_Tk.shape[0]}; "
            "compare the same tokens"
        )
    xp = array_namespace(one_TK, other_Tk)
    same_TK = xp.any(one_TK[:, :, None] == other_Tk[:, None, :], axis=-1)
    return _real(xp.sum(xp.astype(same_TK, xp.int32), axis=-1))


def _mean(x_T: Array) -> Array:
    """The mean, and 1 without tokens: what nobody routed has not changed."""
    xp = array_namespace(x_T)
    return xp.mean(x_T) if x_T.shape[0] else xp.sum(x_T) + 1.0


def _count(ids: Array, num_bins: int) -> Array:
    """How often each of 0 ... num_bins - 1 occurs: int (num_bins,), exact. The standard has no bincount."""
    xp = array_namespace(ids)
    ordered = xp.sort(xp.reshape(ids, (-1,)))
    bins = xp.arange(num_bins, dtype=ids.dtype, device=device(ids))
    return xp.searchsorted(ordered, bins, side="right") - xp.searchsorted(ordered, bins, side="left")


def _ratio(num: Array, of: Array) -> Array:
    """num / of, and 0 where `of` is 0."""
    xp = array_namespace(num)
    return _real(num) / _real(xp.where(of == 0, xp.ones_like(of), of))


def _eye(like_EE: Array) -> Array:
    xp = array_namespace(like_EE)
    index = xp.arange(like_EE.shape[0], device=device(like_EE))
    return index[:, None] == index[None, :]


def _real(x: Array) -> Array:
    xp = array_namespace(x)
    return xp.astype(x, xp.__array_namespace_info__().default_dtypes()["real floating"])


def _check_ids(ids_TK: Array, num_experts: int) -> None:
    if ids_TK.ndim != 2:
        raise ValueError(f"ids_TK: expected shape (T, K), got {tuple(ids_TK.shape)}; flatten batch and sequence")
    _check_range(ids_TK, num_experts, "ids_TK", "num_experts")


def _check_groups(groups_T: Array, ids_TK: Array, name: str) -> None:
    if tuple(groups_T.shape) != (ids_TK.shape[0],):
        raise ValueError(
            f"{name}: expected one entry for each of {ids_TK.shape[0]} tokens, got {tuple(groups_T.shape)}"
        )


def _check_range(ids: Array, end: int, name: str, limit: str) -> None:
    xp = array_namespace(ids)
    if math.prod(ids.shape) and (int(xp.min(ids)) < 0 or int(xp.max(ids)) >= end):
        raise ValueError(
            f"{name}: expected values in [0, {end}), got {int(xp.min(ids))} to {int(xp.max(ids))}; "
            f"take padding out, or raise {limit}"
        )
