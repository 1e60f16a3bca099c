"""The part of an expert's tokens that each of its copies gets, under the rule of replicas.py, from pairs alone.

A token that needs a rank anyway draws its replicated experts there, so copies beside experts that are often chosen with
theirs get more. With g_r the chance that a token of expert e needs rank r for another expert, taken as independent:

    share_r = h + (1 - h n) ((1 - q) g_r / sum g + q / n),  q = prod (1 - g_r),  h = 1 / R

over the n ranks that hold e: h for tokens that lie there, then those that need a rank, then those with a free turn.
Needs are not independent, so the answer is half way between that and even shares: nearer to what the rule gives than
either, on most of the traffic of benchmarks/placement.py.
"""

from __future__ import annotations

import numpy as np


def shares(held_RE: np.ndarray, pairs_EE: np.ndarray | None = None) -> np.ndarray:
    """float64 (R, E): columns sum to 1. held_RE: bool, which rank holds which expert. Without pairs: even shares."""
    copies_E = held_RE.sum(axis=0)
    even_RE: np.ndarray = held_RE / copies_E
    many_e = np.flatnonzero(copies_E > 1)
    if pairs_EE is None or not len(many_e):
        return even_RE
    n_e, held_Re = copies_E[many_e], held_RE[:, many_e]
    others_eE = pairs_EE[many_e] / np.maximum(pairs_EE[many_e, many_e], 1)[:, None]
    others_eE[np.arange(len(many_e)), many_e] = 0
    misses_Re = np.where(held_Re, np.exp(-(even_RE @ others_eE.T)), 1.0)  # prod (1 - p), for many small p
    needs_Re = 1 - misses_Re
    free_e = misses_Re.prod(axis=0)
    drawn_Re = (1 - free_e) * needs_Re / np.maximum(needs_Re.sum(axis=0), 1e-12) + free_e * even_RE[:, many_e]
    home = 1 / len(held_RE)
    shared_RE = even_RE.copy()
    shared_RE[:, many_e] = held_Re * home + (1 - home * n_e) * drawn_Re
    return np.asarray((even_RE + shared_RE / shared_RE.sum(axis=0)) / 2)
