"""Which replica a token goes to. One rule, for whoever plans, scores or dispatches; and its slow twin.

For each token, whose home is the rank that it lies on:

1. An expert that its home holds is computed there.
2. An expert that one rank holds is computed on that rank.
3. The others follow in the order in which the token names them. Each has a turn, one of its n ranks in ascending order:
   the one of number (token's index mod n). From the turn on, going round, it takes the first rank that the token needs
   anyway, for rule 1, 2 or an earlier expert of rule 3; and its turn, where there is none.

So a replica costs no further rank where one will do, and what is left is spread evenly. It depends on the token alone:
ranks agree on it without a word.
"""

from __future__ import annotations

import numpy as np

from equipoise.types import Placement

HOME_BLOCK = 16  # consecutive tokens on one rank, where nobody says which


def homes(num_tokens: int, num_ranks: int) -> np.ndarray:
    """int64 (T,): where tokens lie when nobody says: in blocks of 16, from rank to rank and round again."""
    return np.arange(num_tokens) // HOME_BLOCK % num_ranks


def ranks_of_choices(placement: Placement, ids_TK: np.ndarray, homes_T: np.ndarray) -> np.ndarray:
    """int64 (T, K): the rank on which each of a token's experts is computed; -1 where its id is -1.

    ids_TK: logical experts, -1 for none. homes_T: each token's rank. A token's index is its row.
    """
    ranks_EX, copies_E = _ranks_of_experts(placement)
    held_ER = np.zeros((len(copies_E), placement.num_ranks), dtype=bool)
    held_ER[np.repeat(np.arange(len(copies_E)), copies_E), ranks_EX[ranks_EX >= 0]] = True
    T, K = ids_TK.shape
    every_T, there_TK = np.arange(T), ids_TK >= 0
    at_home_TK = held_ER[ids_TK, homes_T[:, None]] & there_TK
    single_TK = (copies_E[ids_TK] == 1) & there_TK
    ranks_TK = np.where(single_TK, ranks_EX[ids_TK, 0], -1)
    ranks_TK[at_home_TK] = np.broadcast_to(homes_T[:, None], (T, K))[at_home_TK]
    if ranks_EX.shape[1] == 1:
        return ranks_TK
    needed_TR = np.zeros((T, placement.num_ranks + 1), dtype=bool)  # the last column: of no rank
    needed_TR[every_T[:, None], ranks_TK] = True
    needed_TR[:, -1] = False
    for k in range(K):
        tokens_t = np.flatnonzero(there_TK[:, k] & (ranks_TK[:, k] < 0))
        ids_t = ids_TK[tokens_t, k]
        n_t = copies_E[ids_t]
        # the ranks from the turn on, round again; places beyond the last copy come round a second time
        round_tX = (tokens_t[:, None] + np.arange(ranks_EX.shape[1])) % n_t[:, None]
        ranks_tX = ranks_EX[ids_t[:, None], round_tX]
        first_t = needed_TR[tokens_t[:, None], ranks_tX].argmax(axis=1)  # 0, the turn, where none is needed
        ranks_t = ranks_tX[np.arange(len(tokens_t)), first_t]
        ranks_TK[tokens_t, k] = ranks_t
        needed_TR[tokens_t, ranks_t] = True
    return ranks_TK


def ranks_of_choices_reference(placement: Placement, ids_TK: np.ndarray, homes_T: np.ndarray) -> np.ndarray:
    """The slow twin: the rule in its own words, token by token."""
    ranks_TK = np.full(ids_TK.shape, -1, dtype=np.int64)
    for token, (ids, home) in enumerate(zip(ids_TK.tolist(), homes_T.tolist(), strict=True)):
        chosen: dict[int, int] = {}
        for expert in ids:
            holders = placement.ranks_of(expert)
            if home in holders:
                chosen[expert] = home
            elif len(holders) == 1:
                chosen[expert] = holders[0]
        for expert in ids:
            if expert >= 0 and expert not in chosen:
                holders = placement.ranks_of(expert)
                turn = token % len(holders)
                in_turn = holders[turn:] + holders[:turn]
                chosen[expert] = next((rank for rank in in_turn if rank in chosen.values()), in_turn[0])
        ranks_TK[token] = [chosen.get(expert, -1) for expert in ids]
    return ranks_TK


def _ranks_of_experts(placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """int64 (E, X): the ranks of each expert, ascending, -1 beyond its copies; int64 (E,): its copies."""
    ranks_by_expert: list[list[int]] = [[] for _ in range(placement.num_experts)]
    for rank, experts in enumerate(placement.slots):
        for expert in experts:
            ranks_by_expert[expert].append(rank)
    copies_E = np.array([len(ranks) for ranks in ranks_by_expert], dtype=np.int64)
    ranks_EX = np.full((len(copies_E), int(copies_E.max(initial=1))), -1, dtype=np.int64)
    for expert, ranks in enumerate(ranks_by_expert):
        ranks_EX[expert, : len(ranks)] = ranks
    return ranks_EX, copies_E
