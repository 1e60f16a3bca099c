"""From logical experts to ranks and slots, and which copy of a replicated expert a token goes to.

The rule is that of `equipoise.plan.replicas`, by which placements are scored, on tensors and for the tokens
of one rank: the copy that is at home; the only copy; the first from the token's turn on that lies on a rank which the
token needs anyway; and what may go to any is shared so that this rank's tokens load all ranks as evenly as they can.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.plan.levels import ONE, levelled
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
        """(rank, slot) of each assignment, int64 (N,). own_rank: where the tokens are.

        With copies, waits for the device: how many tokens are free to go where they like is counted on the host.
        """
        ranks_NM = self.ranks_EM[expert_ids_N]
        if ranks_NM.shape[1] == 1:
            return ranks_NM[:, 0], self.slots_EM[expert_ids_N][:, 0]
        chosen_N = torch.where(self.copies_E[expert_ids_N] == 1, ranks_NM[:, 0], -1)
        chosen_N[(ranks_NM == own_rank).any(1)] = own_rank
        needed_TR = torch.zeros(num_tokens, self.num_ranks + 1, dtype=torch.bool, device=ranks_NM.device)
        needed_TR[token_ids_N, chosen_N] = True
        needed_TR[:, -1] = False  # of no rank
        open_n = (chosen_N < 0).nonzero()[:, 0]
        chosen_N[open_n] = self._drawn(token_ids_N[open_n], expert_ids_N[open_n], needed_TR)
        needed_TR[token_ids_N[open_n], chosen_N[open_n]] = True
        needed_TR[:, -1] = False
        free_n = open_n[chosen_N[open_n] < 0]
        free_n = free_n[token_ids_N[free_n].argsort(stable=True)]
        part_n = self._by_parts(expert_ids_N[free_n], chosen_N)
        for some in _by_turn(token_ids_N[free_n]):
            now = free_n[some]
            drawn_n = self._drawn(token_ids_N[now], expert_ids_N[now], needed_TR)
            chosen_N[now] = torch.where(drawn_n < 0, part_n[some], drawn_n)
            needed_TR[token_ids_N[now], chosen_N[now]] = True
        place_N = (ranks_NM == chosen_N[:, None]).long().argmax(1, keepdim=True)
        return chosen_N, self.slots_EM[expert_ids_N].gather(1, place_N)[:, 0]

    def _drawn(self, token_ids_n: Tensor, expert_ids_n: Tensor, needed_TR: Tensor) -> Tensor:
        """int64 (n,): the rank of each, from its turn on the first that is needed; -1 where none is."""
        most = self.ranks_EM.shape[1]
        places_nM = (token_ids_n[:, None] + torch.arange(most, device=token_ids_n.device)) % self.copies_E[
            expert_ids_n, None
        ]
        round_nM = self.ranks_EM[expert_ids_n].gather(1, places_nM)
        needed_nM = needed_TR[token_ids_n[:, None], round_nM]
        first_n = round_nM.gather(1, needed_nM.long().argmax(1, keepdim=True))[:, 0]
        return torch.where(needed_nM.any(1), first_n, -1)

    def _by_parts(self, expert_ids_n: Tensor, chosen_N: Tensor) -> Tensor:
        """int64 (n,): the rank of each of those that are free, in order of tokens. chosen_N: -1 for them."""
        device = chosen_N.device
        num_E = torch.bincount(expert_ids_n, minlength=len(self.copies_E))
        load_R = torch.bincount(chosen_N + 1, minlength=self.num_ranks + 1)[1:]
        some_e = num_E.nonzero()[:, 0]
        ranks_eM, num_e, load_R = self.ranks_EM[some_e].cpu(), num_E[some_e].cpu(), load_R.cpu()
        (part_eM,) = levelled(ranks_eM.numpy(), num_e.numpy()[None], load_R.numpy()[None])
        until_EM = torch.zeros_like(self.ranks_EM)
        until_EM[some_e] = torch.from_numpy(part_eM.cumsum(1)).to(device)
        order_n = expert_ids_n.argsort(stable=True)
        sorted_n = expert_ids_n[order_n]
        place_n = torch.arange(len(order_n), device=device) - torch.searchsorted(sorted_n, sorted_n)
        turn_n = (2 * place_n + 1) * ONE // (2 * num_E[sorted_n])
        copy_n = (until_EM[sorted_n] <= turn_n[:, None]).sum(1).minimum(self.copies_E[sorted_n] - 1)
        ranks_n = torch.empty_like(sorted_n)
        ranks_n[order_n] = self.ranks_EM[sorted_n, copy_n]
        return ranks_n


def _by_turn(token_ids_n: Tensor) -> Iterator[Tensor]:
    """Indices of the first of each token, then the second of each, and so on. token_ids_n: ascending."""
    turn_n = torch.arange(len(token_ids_n), device=token_ids_n.device) - torch.searchsorted(token_ids_n, token_ids_n)
    for turn in range(int(turn_n.max()) + 1 if len(turn_n) else 0):
        yield (turn_n == turn).nonzero()[:, 0]


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
