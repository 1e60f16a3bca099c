"""Find another expert for assignments whose expert was full: rounds of an auction over each token's ranking.

In each round every assignment without a place asks for the best-ranked expert of its token that has room and that the
token does not use yet; an expert takes as many as it has room for, by priority. Whoever is turned away asks again in
the next round: the expert that turned it away is full by then, so there are at most E rounds, and few in practice.
The number of rounds depends on the data: on a GPU the host waits for each. Integers only; no gradient passes here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.ops.count import count_assignments


@torch.library.custom_op("equipoise::next_choice", mutates_args=())
def next_choice(
    ranking_TE: Tensor, ids_TK: Tensor, keep_TK: Tensor, place_TK: Tensor, limit: int
) -> tuple[Tensor, Tensor]:
    """(ids_TK, keep_TK): int64 and bool, where each assignment ends up, and whether it found a place.

    ranking_TE: fp32; -inf marks experts that a token may not use. ids_TK: int64, the tokens' choices.
    keep_TK: bool, those that fit already. place_TK: int64, smaller goes first. limit: assignments per expert.
    """
    ids_TK, keep_TK = ids_TK.clone(), keep_TK.clone()
    num_experts, K = ranking_TE.shape[1], ids_TK.shape[1]
    room_E = limit - count_assignments(ids_TK[keep_TK], num_experts)
    seeking_M = (~keep_TK).view(-1).nonzero()[:, 0]
    seeking_M = seeking_M[place_TK.view(-1)[seeking_M].argsort()]
    token_M = seeking_M // K
    # Experts out of reach: not allowed, chosen before (also where it was turned away), and later: full.
    open_ME = ranking_TE[token_M].scatter(1, ids_TK[token_M], float("-inf"))
    while len(seeking_M):
        open_ME = open_ME.masked_fill(room_E <= 0, float("-inf"))
        best_M, asked_M = open_ME.max(1)
        first_M = _first_of_its_token(token_M) & (best_M > float("-inf"))
        rank_M = _rank_within(torch.where(first_M, asked_M, num_experts), num_experts + 1)
        taken_M = first_M & (rank_M < room_E[asked_M])
        ids_TK.view(-1)[seeking_M[taken_M]] = asked_M[taken_M]
        keep_TK.view(-1)[seeking_M[taken_M]] = True
        room_E -= count_assignments(asked_M[taken_M], num_experts)
        used_TE = _used(token_M, asked_M, taken_M, open_ME)
        left_M = (~taken_M & (best_M > float("-inf"))).nonzero()[:, 0]
        seeking_M, token_M, open_ME = seeking_M[left_M], token_M[left_M], used_TE[left_M]
    return ids_TK, keep_TK


@next_choice.register_fake
def _(ranking_TE: Tensor, ids_TK: Tensor, keep_TK: Tensor, place_TK: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(ids_TK), torch.empty_like(keep_TK)


def _first_of_its_token(token_M: Tensor) -> Tensor:
    """bool (M,): one assignment of each token per round, or two would ask for the same expert."""
    order_M = token_M.argsort(stable=True)
    sorted_M = token_M[order_M]
    starts_M = torch.ones_like(sorted_M, dtype=torch.bool)
    starts_M[1:] = sorted_M[1:] != sorted_M[:-1]
    return torch.empty_like(starts_M).scatter_(0, order_M, starts_M)


def _rank_within(ids_M: Tensor, num_ids: int) -> Tensor:
    """int64 (M,): how many earlier entries have the same id."""
    order_M = ids_M.argsort(stable=True)
    counts = count_assignments(ids_M, num_ids)
    start = counts.cumsum(0) - counts
    rank_M = torch.arange(len(ids_M), device=ids_M.device) - start[ids_M[order_M]]
    return torch.empty_like(rank_M).scatter_(0, order_M, rank_M)


def _used(token_M: Tensor, asked_M: Tensor, taken_M: Tensor, open_ME: Tensor) -> Tensor:
    """open_ME with an expert closed to all assignments of the token that has just got it."""
    num_tokens = int(token_M.max()) + 1
    got_T = torch.full((num_tokens,), -1, dtype=torch.int64, device=token_M.device)
    got_T[token_M[taken_M]] = asked_M[taken_M]
    got_M = got_T[token_M]
    closed_ME = torch.arange(open_ME.shape[1], device=open_ME.device) == got_M[:, None]
    return open_ME.masked_fill(closed_ME, float("-inf"))
