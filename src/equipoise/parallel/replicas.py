"""From logical experts to ranks and slots, and which copy of a replicated expert a token goes to.

The rule is that of `equipoise.plan.replicas`, by which placements are planned and scored, on tensors and for the tokens
of one rank: the copy that is at home; the only copy; else, in the order in which the token names them, the first copy
from the token's turn on that lies on a rank which the token needs anyway, and its turn where there is none. The first
two cost no link more, turns share the load.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.types import Placement


@dataclass(frozen=True, eq=False)
class SlotTable:
    """A placement as tensors. ranks_EM, slots_EM: int64, the M copies of each expert in order of ranks, -1 where there
    are fewer; slots count from 0 on each rank. copies_E: int64. num_ranks: of the group.
    """

    ranks_EM: Tensor
    slots_EM: Tensor
    copies_E: Tensor
    num_ranks: int

    def choose(
        self, token_ids_N: Tensor, expert_ids_N: Tensor, num_tokens: int, own_rank: int
    ) -> tuple[Tensor, Tensor]:
        """(rank, slot) of each assignment, int64 (N,). own_rank: where the tokens are."""
        ranks_NM = self.ranks_EM[expert_ids_N]
        if ranks_NM.shape[1] == 1:
            return ranks_NM[:, 0], self.slots_EM[expert_ids_N][:, 0]
        chosen_N = torch.where(self.copies_E[expert_ids_N] == 1, ranks_NM[:, 0], -1)
        chosen_N[(ranks_NM == own_rank).any(1)] = own_rank
        needed_TR = torch.zeros(num_tokens, self.num_ranks, dtype=torch.bool, device=ranks_NM.device)
        settled_N = chosen_N >= 0
        needed_TR[token_ids_N[settled_N], chosen_N[settled_N]] = True
        for some in _by_turn(token_ids_N, ~settled_N):
            chosen_N[some] = self._go_round(token_ids_N[some], expert_ids_N[some], needed_TR)
            needed_TR[token_ids_N[some], chosen_N[some]] = True
        place_N = (ranks_NM == chosen_N[:, None]).long().argmax(1, keepdim=True)
        return chosen_N, self.slots_EM[expert_ids_N].gather(1, place_N)[:, 0]

    def _go_round(self, token_ids_n: Tensor, expert_ids_n: Tensor, needed_TR: Tensor) -> Tensor:
        """int64 (n,): the rank of each, from its turn on the first that is needed, else its turn."""
        most = self.ranks_EM.shape[1]
        places_nM = (token_ids_n[:, None] + torch.arange(most, device=token_ids_n.device)) % self.copies_E[
            expert_ids_n, None
        ]
        round_nM = self.ranks_EM[expert_ids_n].gather(1, places_nM)
        first_n1 = needed_TR[token_ids_n[:, None], round_nM].long().argmax(1, keepdim=True)
        return round_nM.gather(1, first_n1)[:, 0]


def _by_turn(token_ids_N: Tensor, open_N: Tensor) -> Iterator[Tensor]:
    """Indices of what is open: the first of each token, then the second of each, and so on."""
    index_n = open_N.nonzero()[:, 0]
    order_n = index_n[token_ids_N[index_n].argsort(stable=True)]
    tokens_n = token_ids_N[order_n]
    begins_n = torch.searchsorted(tokens_n, tokens_n)  # where the token's own begin
    turn_n = torch.arange(len(tokens_n), device=tokens_n.device) - begins_n
    for turn in range(int(turn_n.max()) + 1 if len(turn_n) else 0):
        yield order_n[turn_n == turn]


def slot_table(placement: Placement, device: torch.device | str = "cpu") -> SlotTable:
    """Where each logical expert's copies are."""
    places: list[list[tuple[int, int]]] = [[] for _ in range(placement.num_experts)]
    for rank, experts in enumerate(placement.slots):
        for slot, expert in enumerate(experts):
            places[expert].append((rank, slot))
    most = max(map(len, places))
    padded = torch.tensor([copies + [(-1, -1)] * (most - len(copies)) for copies in places], device=device)
    copies_E = torch.tensor([len(copies) for copies in places], device=device)
    return SlotTable(padded[..., 0].contiguous(), padded[..., 1].contiguous(), copies_E, placement.num_ranks)
