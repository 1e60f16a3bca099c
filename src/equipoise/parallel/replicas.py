"""From logical experts to ranks and slots, and which copy of a replicated expert a token goes to.

The rule: the copy on the token's own rank, where there is one; else a copy on a rank that the token is sent to anyway,
for an expert that has no choice; else the copies take turns by the token's number. The first two cost no link, the
third shares the load.
"""

from __future__ import annotations

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
        copies_N = self.copies_E[expert_ids_N]
        settled_N = copies_N == 1
        needed_TR = torch.zeros(num_tokens, self.num_ranks, dtype=torch.bool, device=ranks_NM.device)
        needed_TR[token_ids_N[settled_N], ranks_NM[settled_N, 0]] = True
        there_NM = ranks_NM >= 0
        at_hand_NM = there_NM & (ranks_NM == own_rank)
        on_the_way_NM = there_NM & needed_TR[token_ids_N[:, None], ranks_NM.clamp_min(0)]
        turn_N = token_ids_N % copies_N
        pick_N = torch.where(on_the_way_NM.any(1), on_the_way_NM.long().argmax(1), turn_N)
        pick_N = torch.where(at_hand_NM.any(1), at_hand_NM.long().argmax(1), pick_N)[:, None]
        return ranks_NM.gather(1, pick_N)[:, 0], self.slots_EM[expert_ids_N].gather(1, pick_N)[:, 0]


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
