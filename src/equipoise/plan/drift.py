"""Loads that may come: what planning must expect beyond the windows that it has seen.

The mix of the traffic wanders, and when more tokens come that choose expert i, then so does the load of all that those
tokens choose beside it. So pairs tell where the load can go, also where it has not yet been: the main directions of the
loads of "the tokens that choose i", around the load of all.
"""

from __future__ import annotations

import numpy as np

NUM_DIRECTIONS = 6
NUM_ITERATIONS = 5  # of subspace iteration: directions need not be exact
SPREAD = 2.0  # standard deviations


def windows_to_expect(load_WE: np.ndarray, pairs_EE: np.ndarray | None) -> np.ndarray:
    """float64 (W', E): the windows' shares of the load, then the mean plus and minus 2 s v along 6 directions v.

    v, s: principal axes and standard deviations over experts i, weighted by load, of the load shares of the tokens that
    choose i. Without pairs: the windows alone. Rows sum to 1.
    """
    seen_WE = load_WE / load_WE.sum(axis=1, keepdims=True)
    if pairs_EE is None or len(pairs_EE) < 3:
        return np.asarray(seen_WE)
    others_EE = pairs_EE.astype(np.float64)
    weight_E = np.diag(others_EE) / max(np.trace(others_EE), 1.0)
    np.fill_diagonal(others_EE, 0)  # i itself is in all of them: it says nothing about where they go
    total_E = others_EE.sum(axis=1, keepdims=True)
    mean_E = load_WE.sum(axis=0) / load_WE.sum()
    away_EE = np.where(total_E > 0, others_EE / np.maximum(total_E, 1) - mean_E, 0) * np.sqrt(weight_E)[:, None]
    directions = _main_directions(away_EE, min(NUM_DIRECTIONS, len(mean_E) - 1))
    expected = np.concatenate([mean_E + SPREAD * directions, mean_E - SPREAD * directions]).clip(min=0)
    return np.concatenate([seen_WE, expected / expected.sum(axis=1, keepdims=True)])


def _main_directions(away_NE: np.ndarray, num: int) -> np.ndarray:
    """float64 (num, E): principal axes of the rows, each as long as the standard deviation along it."""
    covariance_EE = away_NE.T @ away_NE
    start_E = np.argsort(-np.diag(covariance_EE), kind="stable")[:num]
    axes_EN = covariance_EE[:, start_E]
    for _ in range(NUM_ITERATIONS):
        axes_EN = np.linalg.qr(covariance_EE @ axes_EN)[0]
    axes: np.ndarray = (axes_EN * np.sqrt(np.einsum("en,ef,fn->n", axes_EN, covariance_EE, axes_EN).clip(min=0))).T
    return axes
