"""Which experts simulated tokens want, and who finds room: NumPy, all layers of a step at once.

A token's experts are drawn without replacement, each with a probability in proportion to its popularity among those
left (Plackett-Luce), as a top-k of popularity plus Gumbel noise would be; here as a race of exponential clocks.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
CHUNK = 1 << 24  # clocks drawn at once, 64 MiB


def zipf(size: int, exponent: float) -> Array:
    """float64 (size,): shares in proportion to 1 / (i + 1)^exponent."""
    weights = 1.0 / np.arange(1, size + 1) ** exponent
    return np.asarray(weights / weights.sum())


def popularity(rng: np.random.Generator, layers: int, experts: int, skew: float) -> Array:
    """float64 (L, E): Zipf shares, in another order in each layer."""
    shares_E = zipf(experts, skew)
    return np.stack([rng.permutation(shares_E) for _ in range(layers)])


def draw(rng: np.random.Generator, popularity_LTE: Array, tokens: int, num_choices: int) -> Array:
    """int64 (L, T, choices): the experts of so many tokens, the most wanted first.

    popularity_LTE: (L, 1, E) is the same for all tokens, (L, T, E) is each token's own.
    """
    layers, _, experts = popularity_LTE.shape
    at_once = max(1, CHUNK // max(tokens * experts, 1))
    parts = [
        _race(rng, popularity_LTE[first : first + at_once], tokens, num_choices) for first in range(0, layers, at_once)
    ]
    return np.concatenate(parts)


def _race(rng: np.random.Generator, popularity_LTE: Array, tokens: int, num_choices: int) -> Array:
    layers, _, experts = popularity_LTE.shape
    clocks_LTE = rng.standard_exponential((layers, tokens, experts), dtype=np.float32)
    clocks_LTE /= popularity_LTE.astype(np.float32)
    if num_choices < experts:
        few = np.argpartition(clocks_LTE, num_choices - 1, axis=2)[:, :, :num_choices]
    else:
        few = np.broadcast_to(np.arange(experts), clocks_LTE.shape)
    order = np.argsort(np.take_along_axis(clocks_LTE, few, axis=2), axis=2)
    return np.take_along_axis(few, order, axis=2)


def positions(keys_N: Array) -> Array:
    """int64 (N,): how many of the same key come before each."""
    order = np.argsort(keys_N, kind="stable")
    in_order = keys_N[order]
    starts = np.searchsorted(in_order, in_order, side="left")
    found = np.empty(len(keys_N), dtype=np.int64)
    found[order] = np.arange(len(keys_N)) - starts
    return found


def admit(choices_LTC: Array, top_k: int, room: int) -> tuple[Array, Array]:
    """Who gets which expert when each takes `room` rows: ids int64 (L, T, K), and bool (L, T, K): it had room.

    All first choices come before all second ones, then tokens in their order. Where there are more choices than K,
    those without room ask their further ones, round by round, and have the id of the expert that took them.
    """
    ids_LTK = choices_LTC[:, :, :top_k].copy()
    layers = len(ids_LTK)
    num_experts = int(choices_LTC.max(initial=0)) + 1
    layer_L11 = np.arange(layers)[:, None, None] * num_experts
    by_choice = (ids_LTK + layer_L11).transpose(0, 2, 1)  # first choices first
    keys = by_choice.ravel().astype(np.uint16 if layers * num_experts < 2**16 else np.int64)  # radix sort
    fits_LTK = (positions(keys) < room).reshape(by_choice.shape).transpose(0, 2, 1)
    if choices_LTC.shape[2] > top_k:
        fits_LTK = fits_LTK.copy()
        _ask_further(choices_LTC, ids_LTK, fits_LTK, room, num_experts)
    return ids_LTK, fits_LTK


def _ask_further(choices_LTC: Array, ids_LTK: Array, fits_LTK: Array, room: int, num_experts: int) -> None:
    """In place: rounds of further choices. A token's assignments never ask for the same expert."""
    layers, tokens, num_choices = choices_LTC.shape
    asked_LT = np.full((layers, tokens), ids_LTK.shape[2])
    layer_LTK = np.broadcast_to(np.arange(layers)[:, None, None], ids_LTK.shape)
    taken = np.bincount((ids_LTK + layer_LTK * num_experts)[fits_LTK], minlength=layers * num_experts)
    for _ in range(num_choices - ids_LTK.shape[2]):
        where = np.nonzero(~fits_LTK)
        column = asked_LT[where[:2]] + (np.cumsum(~fits_LTK, axis=2) - 1)[where]
        possible = column < num_choices
        where = tuple(axis[possible] for axis in where)
        if not len(where[0]):
            return
        wanted = choices_LTC[where[0], where[1], column[possible]]
        keys = wanted + where[0] * num_experts
        accepted = positions(keys) < room - taken[keys]
        taken += np.bincount(keys[accepted], minlength=len(taken))
        asked_LT += (~fits_LTK).sum(axis=2)
        took = tuple(axis[accepted] for axis in where)
        ids_LTK[took], fits_LTK[took] = wanted[accepted], True
