"""How the copies of experts share tokens that may go to any of them, so that ranks are as level as they can be.

Part of the rule of replicas.py. Each expert's parts are scaled by how full their ranks are, over and over: a rank with
twice the mean load gets half the part. Whole numbers throughout, so that every machine and device finds the same.
"""

from __future__ import annotations

import numpy as np

ONE = 1 << 16  # the whole of an expert's tokens
ROUNDS = 24  # the fullest rank is then within some 4 % of the best there is
SCALE, MOST = 256, 16  # of the factor of a round: its unit, and what a part may grow by at most


def levelled(ranks_eX: np.ndarray, free_He: np.ndarray, load_HR: np.ndarray) -> np.ndarray:
    """int64 (H, e, X): the part of each copy, of ONE, for H batches that know nothing of each other.

    ranks_eX: of each expert's copies, -1 beyond the last. free_He: its tokens that may go to any of them. load_HR: what
    ranks have anyway. All int64; up to some 10^8 assignments in a batch.
    """
    (H, R), there_eX = load_HR.shape, ranks_eX >= 0
    places_HeX = np.where(there_eX, ranks_eX, R) + (R + 1) * np.arange(H)[:, None, None]
    mean_H11 = ((load_HR.sum(axis=1) + free_He.sum(axis=1)) * ONE // R)[:, None, None]
    part_HeX = np.broadcast_to(_normalised(there_eX.astype(np.int64)), places_HeX.shape)
    fixed_HR = np.pad(load_HR * ONE, ((0, 0), (0, 1)))  # the last column: of no rank
    for _ in range(ROUNDS):
        load_HR1 = fixed_HR.copy().reshape(-1)
        np.add.at(load_HR1, places_HeX, part_HeX * free_He[:, :, None])
        factor_HeX = np.minimum(mean_H11 * SCALE // np.maximum(load_HR1[places_HeX], 1), MOST * SCALE)
        part_HeX = _normalised(np.maximum(part_HeX * factor_HeX, 1) * there_eX)
    return part_HeX


def _normalised(part_eX: np.ndarray) -> np.ndarray:
    """Nearly ONE in total."""
    scaled: np.ndarray = part_eX * ONE // part_eX.sum(axis=-1, keepdims=True)
    return scaled


def copy_of(place_n: np.ndarray, of_n: np.ndarray, part_nX: np.ndarray, copies_n: np.ndarray) -> np.ndarray:
    """int64 (n,): which copy, from 0, takes the token in a place (from 0) of the of_n that an expert's copies share."""
    until_nX = part_nX.cumsum(axis=1)
    turn_n = (2 * place_n + 1) * ONE // (2 * of_n)
    copy_n: np.ndarray = np.minimum((until_nX <= turn_n[:, None]).sum(axis=1), copies_n - 1)
    return copy_n


def levelled_reference(ranks_eX: list[list[int]], free_e: list[int], load_R: list[int]) -> list[list[int]]:
    """The slow twin, of one batch, in its own words. ranks_eX: as long as there are copies."""
    mean = (sum(load_R) + sum(free_e)) * ONE // len(load_R)
    parts = [[ONE // len(ranks)] * len(ranks) for ranks in ranks_eX]
    for _ in range(ROUNDS):
        load = [amount * ONE for amount in load_R]
        for ranks, free, part in zip(ranks_eX, free_e, parts, strict=True):
            for rank, share in zip(ranks, part, strict=True):
                load[rank] += share * free
        for ranks, part in zip(ranks_eX, parts, strict=True):
            for copy, rank in enumerate(ranks):
                part[copy] = max(part[copy] * min(mean * SCALE // max(load[rank], 1), MOST * SCALE), 1)
            total = sum(part)
            part[:] = [share * ONE // total for share in part]
    return parts
