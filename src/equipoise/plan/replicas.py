"""Which replica a token goes to. One rule, for whoever scores or dispatches; and its slow twin.

For each token, whose home is the rank that it lies on:

1. An expert that its home holds is computed there.
2. An expert that one rank holds is computed on that rank.
3. An expert of whose ranks the token needs one for 1 or 2 is computed there: on the first from its turn on, going round
   its n ranks in ascending order from the one of number (token's index mod n).
4. The others follow in the order in which the token names them. What 3 or an earlier one of 4 has made a rank of theirs
   needed for goes there, as in 3. All else is shared so that the tokens of one home load ranks as evenly as
   they can (levels.py), with what 1 to 3 bring: consecutive ones of an expert to one copy.

So a replica costs no further rank where one will do, and what is left makes up for what is uneven today. It depends on
the tokens of one home alone: ranks need not ask each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from equipoise.plan.levels import ONE, copy_of, levelled, levelled_reference
from equipoise.types import Placement

HOME_BLOCK = 16  # consecutive tokens on one rank, where nobody says which


def homes(num_tokens: int, num_ranks: int) -> np.ndarray:
    """int64 (T,): where tokens lie when nobody says: in blocks of 16, from rank to rank and round again."""
    return np.arange(num_tokens) // HOME_BLOCK % num_ranks


@dataclass(frozen=True, eq=False)
class Copies:
    """ranks_EX: int64, of each expert's copies in ascending order, -1 beyond the last. num_E: int64, how many."""

    ranks_EX: np.ndarray
    num_E: np.ndarray
    num_ranks: int


def copies_in(placement: Placement) -> Copies:
    """Which ranks hold each expert."""
    ranks_by_expert: list[list[int]] = [[] for _ in range(placement.num_experts)]
    for rank, experts in enumerate(placement.slots):
        for expert in experts:
            ranks_by_expert[expert].append(rank)
    num_E = np.array([len(ranks) for ranks in ranks_by_expert], dtype=np.int64)
    ranks_EX = np.full((len(num_E), int(num_E.max(initial=1))), -1, dtype=np.int64)
    for expert, ranks in enumerate(ranks_by_expert):
        ranks_EX[expert, : len(ranks)] = ranks
    return Copies(ranks_EX, num_E, placement.num_ranks)


def ranks_of_choices(placement: Placement, ids_TK: np.ndarray, homes_T: np.ndarray) -> np.ndarray:
    """int64 (T, K): the rank on which each of a token's experts is computed; -1 where its id is -1.

    ids_TK: logical experts, -1 for none. homes_T: each token's rank. A token's index is its row. The tokens of a home
    are one batch.
    """
    copies = copies_in(placement)
    T, K = ids_TK.shape
    there_TK = ids_TK >= 0
    at_home_TK = (copies.ranks_EX[ids_TK] == homes_T[:, None, None]).any(axis=2) & there_TK
    single_TK = (copies.num_E[ids_TK] == 1) & there_TK
    ranks_TK = np.where(single_TK, copies.ranks_EX[ids_TK, 0], -1)
    ranks_TK[at_home_TK] = np.broadcast_to(homes_T[:, None], (T, K))[at_home_TK]
    tokens_n, k_n = np.nonzero(there_TK & (ranks_TK < 0))
    if not len(tokens_n):
        return ranks_TK
    needed_TR = np.zeros((T, placement.num_ranks + 1), dtype=bool)  # the last column: of no rank
    needed_TR[np.arange(T)[:, None], ranks_TK] = True
    needed_TR[:, -1] = False
    drawn_n = _drawn(needed_TR, tokens_n, ids_TK[tokens_n, k_n], copies)
    ranks_TK[tokens_n, k_n] = drawn_n
    free_n = drawn_n < 0
    needed_TR[tokens_n[~free_n], drawn_n[~free_n]] = True
    tokens_n, k_n = tokens_n[free_n], k_n[free_n]
    part_n = _by_parts(ranks_TK, homes_T, (tokens_n, ids_TK[tokens_n, k_n]), copies)
    for k in range(K):
        now_n = k_n == k
        tokens_m = tokens_n[now_n]
        drawn_m = _drawn(needed_TR, tokens_m, ids_TK[tokens_m, k], copies)
        ranks_m = np.where(drawn_m < 0, part_n[now_n], drawn_m)
        ranks_TK[tokens_m, k] = ranks_m
        needed_TR[tokens_m, ranks_m] = True
    return ranks_TK


def _drawn(needed_TR: np.ndarray, tokens_n: np.ndarray, ids_n: np.ndarray, copies: Copies) -> np.ndarray:
    """int64 (n,): of each expert's ranks the first from the token's turn on that it needs; -1 where it needs none."""
    # places beyond the last copy come round a second time
    round_nX = (tokens_n[:, None] + np.arange(copies.ranks_EX.shape[1])) % copies.num_E[ids_n, None]
    ranks_nX = copies.ranks_EX[ids_n[:, None], round_nX]
    needed_nX = needed_TR[tokens_n[:, None], ranks_nX]
    first_n = ranks_nX[np.arange(len(ids_n)), needed_nX.argmax(axis=1)]
    found: np.ndarray = np.where(needed_nX.any(axis=1), first_n, -1)
    return found


def _by_parts(
    ranks_TK: np.ndarray, homes_T: np.ndarray, free: tuple[np.ndarray, np.ndarray], copies: Copies
) -> np.ndarray:
    """int64 (n,): ranks of what is free, by levelled parts. ranks_TK: -1 there. free: its tokens and experts."""
    tokens_n, ids_n = free
    R, E = copies.num_ranks, len(copies.num_E)
    settled_TK = ranks_TK >= 0
    homes_TK = np.broadcast_to(homes_T[:, None], ranks_TK.shape)
    load_HR = np.bincount(homes_TK[settled_TK] * R + ranks_TK[settled_TK], minlength=R * R).reshape(R, R)
    group_n = homes_T[tokens_n] * E + ids_n
    free_HE = np.bincount(group_n, minlength=R * E).reshape(R, E)
    many_e = np.flatnonzero(copies.num_E > 1)
    part_HeX = levelled(copies.ranks_EX[many_e], free_HE[:, many_e], load_HR)
    part_nX = part_HeX[homes_T[tokens_n], np.searchsorted(many_e, ids_n)]
    copy_n = copy_of(_places_in(group_n), free_HE.reshape(-1)[group_n], part_nX, copies.num_E[ids_n])
    ranks: np.ndarray = copies.ranks_EX[ids_n, copy_n]
    return ranks


def _places_in(group_n: np.ndarray) -> np.ndarray:
    """int64 (n,): how many of the same group come before."""
    order_n = np.argsort(group_n, kind="stable")
    place_n = np.empty_like(order_n)
    place_n[order_n] = np.arange(len(order_n)) - np.searchsorted(group_n[order_n], group_n[order_n])
    return place_n


# -------------------------------------------------------------------------------------------------- the slow twin


def ranks_of_choices_reference(placement: Placement, ids_TK: np.ndarray, homes_T: np.ndarray) -> np.ndarray:
    """The rule in its own words, token by token."""
    ranks_TK = np.full(ids_TK.shape, -1, dtype=np.int64)
    holders = {expert: placement.ranks_of(expert) for expert in range(placement.num_experts)}
    for home in range(placement.num_ranks):
        choices = [
            Choice(token, k, expert)
            for token in np.flatnonzero(homes_T == home).tolist()
            for k, expert in enumerate(ids_TK[token].tolist())
            if expert >= 0
        ]
        for choice, rank in _of_one_home(home, choices, holders, placement.num_ranks).items():
            ranks_TK[choice.token, choice.k] = rank
    return ranks_TK


class Choice(NamedTuple):
    """A token's k-th expert."""

    token: int
    k: int
    expert: int


def _of_one_home(
    home: int, choices: Sequence[Choice], holders: Mapping[int, tuple[int, ...]], num_ranks: int
) -> dict[Choice, int]:
    settled: dict[Choice, int] = {}
    for choice in choices:
        if home in holders[choice.expert]:
            settled[choice] = home
        elif len(holders[choice.expert]) == 1:
            settled[choice] = holders[choice.expert][0]
    needed = {choice.token: _needed(choice.token, settled) for choice in choices}
    for choice in choices:
        rank = _first_from_turn(choice, holders, needed[choice.token])
        if choice not in settled and rank is not None:
            settled[choice] = rank
    free = [choice for choice in choices if choice not in settled]
    load_R = [sum(rank == each for each in settled.values()) for rank in range(num_ranks)]
    parts = _parts_reference(free, holders, load_R)
    for choice in free:
        rank = _first_from_turn(choice, holders, _needed(choice.token, settled))
        settled[choice] = parts[choice] if rank is None else rank
    return settled


def _needed(token: int, settled: Mapping[Choice, int]) -> set[int]:
    return {rank for choice, rank in settled.items() if choice.token == token}


def _first_from_turn(choice: Choice, holders: Mapping[int, tuple[int, ...]], needed: set[int]) -> int | None:
    ranks = holders[choice.expert]
    turn = choice.token % len(ranks)
    return next((rank for rank in ranks[turn:] + ranks[:turn] if rank in needed), None)


def _parts_reference(
    free: Sequence[Choice], holders: Mapping[int, tuple[int, ...]], load_R: list[int]
) -> dict[Choice, int]:
    experts = [expert for expert, ranks in holders.items() if len(ranks) > 1]
    mine = {expert: [choice for choice in free if choice.expert == expert] for expert in experts}
    parts = levelled_reference([list(holders[e]) for e in experts], [len(mine[e]) for e in experts], load_R)
    found = {}
    for expert, part in zip(experts, parts, strict=True):
        for place, choice in enumerate(mine[expert]):
            middle = (2 * place + 1) * ONE // (2 * len(mine[expert]))
            copy = sum(until <= middle for until in accumulate(part))
            found[choice] = holders[expert][min(copy, len(part) - 1)]
    return found
