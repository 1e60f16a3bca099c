"""How full ranks get under the rule of replicas.py, from loads and pairs alone.

With g_r the chance that a token of expert e needs rank r for another expert, taken as independent, of its tokens

    h = 1 / R                                  lie on each rank that holds it, and stay there,
    (1 - h n) (1 - q) g_r / sum g              are drawn to rank r, which they need anyway,
    (1 - h n) q,  q = prod (1 - g_r)           are free, and are shared so that ranks are level (levels.py),

over the n ranks that hold e. All homes' tokens are levelled as one batch; each home by itself does a little worse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.plan.levels import ONE, levelled

UNITS = 1 << 24  # of the load of a window, for levelling in whole numbers


@dataclass(frozen=True, eq=False)
class Fixed:
    """What does not depend on how full ranks are. part_RE: of each expert's tokens, those whose rank is given. free_E:
    the rest of them. many_e, ranks_eX: experts with several copies, and where, -1 beyond the last.
    """

    part_RE: np.ndarray
    free_E: np.ndarray
    many_e: np.ndarray
    ranks_eX: np.ndarray


def fixed_parts(held_RE: np.ndarray, pairs_EE: np.ndarray | None = None) -> Fixed:
    """held_RE: bool, which rank holds which expert. Without pairs nothing is drawn, all that is not at home is free."""
    copies_E = held_RE.sum(axis=0)
    many_e = np.flatnonzero(copies_E > 1)
    part_RE, free_E = held_RE.astype(np.float64), np.zeros(len(copies_E))
    if not len(many_e):
        return Fixed(part_RE, free_E, many_e, np.zeros((0, 1), dtype=np.int64))
    n_e, held_Re, home = copies_E[many_e], held_RE[:, many_e], 1 / len(held_RE)
    needs_Re = np.zeros(held_Re.shape)
    if pairs_EE is not None:
        others_eE = pairs_EE[many_e] / np.maximum(pairs_EE[many_e, many_e], 1)[:, None]
        others_eE[np.arange(len(many_e)), many_e] = 0
        # prod (1 - p), for many small p
        needs_Re = np.where(held_Re, 1 - np.exp(-(even_parts(held_RE) @ others_eE.T)), 0.0)
    free_e = (1 - needs_Re).prod(axis=0)
    away_e = 1 - home * n_e
    drawn_Re = (1 - free_e) * needs_Re / np.maximum(needs_Re.sum(axis=0), 1e-12)
    part_RE[:, many_e] = held_Re * home + away_e * drawn_Re
    free_E[many_e] = away_e * free_e
    experts_n, ranks_n = np.nonzero(held_Re.T)
    ranks_eX = np.full((len(many_e), int(n_e.max())), -1, dtype=np.int64)
    ranks_eX[experts_n, np.arange(len(ranks_n)) - np.searchsorted(experts_n, experts_n)] = ranks_n
    return Fixed(part_RE, free_E, many_e, ranks_eX)


def even_parts(held_RE: np.ndarray) -> np.ndarray:
    """float64 (R, E): as if copies had equal parts of their expert's tokens. held_RE: bool."""
    return np.asarray(held_RE / held_RE.sum(axis=0))


def rank_loads(fixed: Fixed, load_WE: np.ndarray) -> np.ndarray:
    """float64 (W, R): each rank's part of each window's load."""
    share_WE = load_WE / load_WE.sum(axis=1, keepdims=True)
    load_WR = share_WE @ fixed.part_RE.T
    if not len(fixed.many_e):
        return np.asarray(load_WR)
    free_We = (share_WE * fixed.free_E)[:, fixed.many_e]
    whole_We, whole_WR = (np.rint(each * UNITS).astype(np.int64) for each in (free_We, load_WR))
    moved_WeX = levelled(fixed.ranks_eX, whole_We, whole_WR) / ONE * free_We[:, :, None]
    windows_W11 = np.arange(len(load_WR))[:, None, None]
    there_eX = fixed.ranks_eX >= 0
    np.add.at(load_WR, (windows_W11, np.where(there_eX, fixed.ranks_eX, 0)), np.where(there_eX, moved_WeX, 0.0))
    return np.asarray(load_WR)
