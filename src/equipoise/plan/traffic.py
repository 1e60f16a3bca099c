"""What is known about a layer's routing, for planning: load by window of time, who is chosen with whom, the choices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_PAIR_TOKENS = 8192  # evenly spaced: enough for 256 x 256 pairs, and it is quick


@dataclass(frozen=True, eq=False)
class Traffic:
    """One layer over some time. Raises ValueError for arrays that do not fit each other.

    load_WE: int64, assignments by window, in order of time, and expert; every window has some. pairs_EE: int64,
    symmetric: tokens that chose both experts, on the diagonal those that chose the one; of num_pair_tokens tokens.
    ids_TK: the choices in order of time, -1 for none; windows are its `np.array_split`. None: not known.
    """

    layer: str
    load_WE: np.ndarray
    pairs_EE: np.ndarray | None = None
    num_pair_tokens: int = 0
    ids_TK: np.ndarray | None = None

    def __post_init__(self) -> None:
        _check_load(self.layer, self.load_WE)
        if self.pairs_EE is not None:
            _check_pairs(self.layer, self.pairs_EE, self.num_pair_tokens, self.num_experts)

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.load_WE.shape[1])

    @property
    def windows(self) -> list[np.ndarray]:
        """int64 (t, K) each: the choices by window; empty where they are not known."""
        return [] if self.ids_TK is None else np.array_split(self.ids_TK, len(self.load_WE))


def traffic_of_ids(layer: str, ids_TK: np.ndarray, num_experts: int, num_windows: int = 8) -> Traffic:
    """Traffic of recorded choices in order of time, cut into windows of equally many tokens.

    ids_TK: integers, -1 for none; no token names an expert twice. Raises ValueError for anything else.
    """
    ids_TK = np.asarray(ids_TK)
    if ids_TK.ndim != 2 or ids_TK.dtype.kind not in "iu":
        raise ValueError(
            f"layer {layer}: expected expert ids as integers of shape (tokens, k), got {ids_TK.dtype} of shape "
            f"{ids_TK.shape}"
        )
    ids_TK = ids_TK.astype(np.int64)
    if num_windows < 1 or len(ids_TK) < num_windows:
        raise ValueError(
            f"layer {layer}: expected at least one token in each of {num_windows} windows, got {len(ids_TK)} tokens; "
            "record more, or ask for fewer windows"
        )
    if ids_TK.size and not -1 <= ids_TK.min() <= ids_TK.max() < num_experts:
        raise ValueError(
            f"layer {layer}: expected expert ids from 0 to {num_experts - 1}, or -1 for none, got {ids_TK.min()} to "
            f"{ids_TK.max()}; check the number of experts"
        )
    in_order_TK = np.sort(ids_TK, axis=1)
    num_repeated = int(((np.diff(in_order_TK, axis=1) == 0) & (in_order_TK[:, 1:] >= 0)).any(axis=1).sum())
    if num_repeated:
        raise ValueError(
            f"layer {layer}: expected different experts for each token, {num_repeated} tokens name one twice; "
            "leave out rows that stand for tokens that were not routed"
        )
    load_WE = np.stack(
        [np.bincount(part[part >= 0], minlength=num_experts) for part in np.array_split(ids_TK, num_windows)]
    )
    sample_TK = ids_TK[:: -(-len(ids_TK) // MAX_PAIR_TOKENS)]
    return Traffic(layer, load_WE, pairs_of_ids(sample_TK, num_experts), len(sample_TK), ids_TK)


def pairs_of_ids(
    ids_TK: np.ndarray, num_experts: int, next_TK: np.ndarray | None = None, num_next: int | None = None
) -> np.ndarray:
    """int64 (E, E'): tokens that chose expert i, and expert j; j of the next layer, where its choices are given."""
    chosen_TE = _one_hot(ids_TK, num_experts)
    next_TE = chosen_TE if next_TK is None else _one_hot(next_TK, num_next or num_experts)
    return np.asarray(np.rint(chosen_TE.T @ next_TE), dtype=np.int64)  # exact in float32 up to 2^24 tokens


def _one_hot(ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
    chosen_TE = np.zeros((len(ids_TK), num_experts + 1), dtype=np.float32)
    chosen_TE[np.arange(len(ids_TK))[:, None], ids_TK] = 1  # -1 is the last column
    return chosen_TE[:, :-1]


def _check_load(layer: str, load_WE: np.ndarray) -> None:
    if load_WE.ndim != 2 or not load_WE.size or load_WE.dtype.kind not in "iu":
        raise ValueError(
            f"layer {layer}: expected load as whole numbers of shape (windows, experts), got {load_WE.dtype} of shape "
            f"{load_WE.shape}"
        )
    if load_WE.min() < 0:
        window, expert = np.unravel_index(load_WE.argmin(), load_WE.shape)
        raise ValueError(
            f"layer {layer}: expected counts of 0 and more, got {load_WE.min()} for expert {expert} in window "
            f"{window}; the record is damaged, or counts overflowed where they were made"
        )
    empty = np.flatnonzero(load_WE.sum(axis=1) == 0).tolist()
    if empty:
        raise ValueError(
            f"layer {layer}: expected assignments in every window, got none in {empty}; leave those windows out"
        )


def _check_pairs(layer: str, pairs_EE: np.ndarray, num_tokens: int, num_experts: int) -> None:
    if pairs_EE.shape != (num_experts, num_experts):
        raise ValueError(
            f"layer {layer}: expected pairs of {num_experts} x {num_experts} experts, got shape {pairs_EE.shape}"
        )
    if pairs_EE.min() < 0 or (pairs_EE != pairs_EE.T).any():
        raise ValueError(f"layer {layer}: expected pairs that are symmetric and 0 or more; the record is damaged")
    if pairs_EE.max() > num_tokens:
        raise ValueError(
            f"layer {layer}: expected pairs of at most {num_tokens} tokens, got {pairs_EE.max()}; check num_pair_tokens"
        )
