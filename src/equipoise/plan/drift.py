"""How loads drift: which experts' loads grow together when the mix of the traffic wanders, and how far.

When more tokens come that choose expert i, then so does the load of all that those tokens choose beside it. So pairs
tell in which directions the load can go, also where it has not yet been: those in which the loads of "the tokens that
choose i" lie around the load of all. How far it goes is taken from the windows, beyond what chance explains.
"""

from __future__ import annotations

import numpy as np


def drift_covariance(load_WE: np.ndarray, pairs_EE: np.ndarray | None, num_pair_tokens: int) -> np.ndarray:
    """float64 (E, E): covariance of the experts' shares of the load over time.

    Its directions: the covariance over experts i, weighted by load, of the load shares of the tokens that choose i.
    Its size: the variance of the windows, less what it would be for tokens drawn at random, summed over all experts.
    Zero without pairs, with one window, and where windows differ by chance alone.
    """
    num_windows, num_experts = load_WE.shape
    if pairs_EE is None or num_windows < 2 or not num_pair_tokens:
        return np.zeros((num_experts, num_experts))
    others_EE = pairs_EE.astype(np.float64)
    top_k = np.trace(others_EE) / num_pair_tokens
    weight_E = np.diag(others_EE) / max(np.trace(others_EE), 1.0)
    np.fill_diagonal(others_EE, 0)  # i itself is in all of them: it says nothing about where they go
    total_E1 = others_EE.sum(axis=1, keepdims=True)
    mean_E = load_WE.sum(axis=0) / load_WE.sum()
    away_EE = np.where(total_E1 > 0, others_EE / np.maximum(total_E1, 1) - mean_E, 0) * np.sqrt(weight_E)[:, None]
    direction_EE = away_EE.T @ away_EE
    wanders = _variance_of_windows(load_WE, top_k)
    return np.asarray(direction_EE * max(wanders, 0.0) / max(np.trace(direction_EE), 1e-12))


def _variance_of_windows(load_WE: np.ndarray, top_k: float) -> float:
    """Of the load shares, summed over experts, minus that of as many tokens of top_k experts drawn at random."""
    share_WE = load_WE / load_WE.sum(axis=1, keepdims=True)
    tokens_W = load_WE.sum(axis=1) / max(top_k, 1e-12)
    by_chance = (1 / max(top_k, 1e-12) - (share_WE.mean(axis=0) ** 2).sum()) * (1 / tokens_W).mean()
    return float(share_WE.var(axis=0, ddof=1).sum() - by_chance)
