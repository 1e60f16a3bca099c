"""Loads that may come: what planning must expect beyond the windows that it has seen.

The mix of the traffic wanders, and when more tokens come that choose expert i, then so does the load of all that those
tokens choose beside it. So pairs tell in which directions the load can go, also where it has not yet been: the main
directions of the loads of "the tokens that choose i", around the load of all. How far it goes there is taken from how
far the windows wander along these directions together, beyond what chance explains.
"""

from __future__ import annotations

import numpy as np

NUM_DIRECTIONS = 6
NUM_ITERATIONS = 5  # of subspace iteration: directions need not be exact
REACH = 8.0  # standard deviations of the windows: tried, with less the windows to come are less balanced (docs/log.md)


def windows_to_expect(load_WE: np.ndarray, pairs_EE: np.ndarray | None, num_pair_tokens: int) -> np.ndarray:
    """float64 (W', E): the windows' shares of the load, then the mean plus and minus 8 r s v along 6 directions v.

    v, s: principal axes and standard deviations over experts i, weighted by load, of the load shares of the tokens that
    choose i. r^2: variance of the windows over that of s, both summed over the directions. Without pairs, with one
    window, or where windows differ by chance alone: the windows. Rows sum to 1.
    """
    seen_WE = np.asarray(load_WE / load_WE.sum(axis=1, keepdims=True))
    if pairs_EE is None or len(pairs_EE) < 3 or len(load_WE) < 2 or not num_pair_tokens:
        return seen_WE
    mean_E = load_WE.sum(axis=0) / load_WE.sum()
    axes_NE, lengths_N = _main_directions(_away(mean_E, pairs_EE), min(NUM_DIRECTIONS, len(mean_E) - 1))
    wanders = _variance_of_windows(load_WE, axes_NE, pairs_EE / num_pair_tokens)
    if wanders <= 0:
        return seen_WE
    reach = REACH * np.sqrt(wanders / (lengths_N**2).sum())
    steps_NE = reach * lengths_N[:, None] * axes_NE
    expected = np.concatenate([mean_E + steps_NE, mean_E - steps_NE]).clip(min=0)
    return np.concatenate([seen_WE, expected / expected.sum(axis=1, keepdims=True)])


def _away(mean_E: np.ndarray, pairs_EE: np.ndarray) -> np.ndarray:
    """float64 (E, E): load shares of the tokens that choose i, minus those of all, by the root of i's weight."""
    others_EE = pairs_EE.astype(np.float64)
    weight_E = np.diag(others_EE) / max(np.trace(others_EE), 1.0)
    np.fill_diagonal(others_EE, 0)  # i itself is in all of them: it says nothing about where they go
    total_E1 = others_EE.sum(axis=1, keepdims=True)
    away_EE = np.where(total_E1 > 0, others_EE / np.maximum(total_E1, 1) - mean_E, 0)
    return np.asarray(away_EE * np.sqrt(weight_E)[:, None])


def _main_directions(away_NE: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 (num, E): principal axes of the rows, of length 1; float64 (num,): standard deviations along them."""
    covariance_EE = away_NE.T @ away_NE
    start_E = np.argsort(-np.diag(covariance_EE), kind="stable")[:num]
    axes_EN = covariance_EE[:, start_E]
    for _ in range(NUM_ITERATIONS):
        axes_EN = np.linalg.qr(covariance_EE @ axes_EN)[0]
    variances_N = ((covariance_EE @ axes_EN) * axes_EN).sum(axis=0)
    return axes_EN.T, np.sqrt(variances_N.clip(min=0))


def _variance_of_windows(load_WE: np.ndarray, axes_NE: np.ndarray, pairs_EE: np.ndarray) -> float:
    """Of the load shares along the axes, summed over them, minus what it would be for tokens drawn at random.

    pairs_EE: per token.
    """
    top_k = np.trace(pairs_EE)
    tokens_W = load_WE.sum(axis=1) / max(top_k, 1e-12)
    along_WN = load_WE / load_WE.sum(axis=1, keepdims=True) @ axes_NE.T
    of_token = ((axes_NE @ pairs_EE) * axes_NE).sum() / max(top_k, 1e-12) ** 2 - (along_WN.mean(axis=0) ** 2).sum()
    return float(along_WN.var(axis=0, ddof=1).sum() - of_token * (1 / tokens_W).mean())
