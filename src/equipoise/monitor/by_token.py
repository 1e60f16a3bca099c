"""Assignments in any order, as a table with a row per token. On the host, for whoever reads or keeps choices."""

from __future__ import annotations

import numpy as np


def by_token(token_ids_N: np.ndarray, expert_ids_N: np.ndarray, num_tokens: int) -> np.ndarray:
    """(T, K) of expert_ids_N's type: each token's experts in the order in which they are named, then -1.

    K: the most that a token has. token_ids_N: in [0, num_tokens).
    """
    order_N = np.argsort(token_ids_N, kind="stable")
    token_ids_N, expert_ids_N = token_ids_N[order_N], expert_ids_N[order_N]
    counts_T = np.bincount(token_ids_N, minlength=num_tokens)
    places_N = np.arange(len(token_ids_N)) - np.repeat(np.cumsum(counts_T) - counts_T, counts_T)
    ids_TK = np.full((num_tokens, int(counts_T.max(initial=0))), -1, dtype=expert_ids_N.dtype)
    ids_TK[token_ids_N, places_N] = expert_ids_N
    return ids_TK
