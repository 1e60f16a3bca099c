"""A router of many heads: each chooses K of E experts of its own, with sigmoid gates that do not compete.

Source: sigma-MoE gates as SwitchHead has them (arXiv 2312.07987 equation 7). Experts are numbered head by head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.ops.router_linear import router_linear
from equipoise.routing.router import LinearRouter, Traits, normalized
from equipoise.types import RoutingDecision


@dataclass(frozen=True)
class HeadGates:
    """num_heads heads, k_per_head experts of each."""

    num_heads: int
    k_per_head: int

    @property
    def k(self) -> int:
        """Experts per token, of all heads."""
        return self.num_heads * self.k_per_head

    @property
    def traits(self) -> Traits:
        """A bias moves the choice within a head; there is no ranking of all experts."""
        return Traits(free_choice=False, ranks=False)

    def build(self, dim: int, num_experts: int) -> HeadGatesRouter:
        """num_experts: of all heads."""
        return HeadGatesRouter(self, dim, num_experts)


class HeadGatesRouter(LinearRouter):
    """The linear router of `HeadGates`."""

    def forward(self, x_TD: Tensor, bias_E: Tensor | None = None, token_ids_T: Tensor | None = None) -> RoutingDecision:
        """Decide. A token's weights are the gates of its experts, head by head; they need not sum to anything."""
        H, K = self.config.num_heads, self.config.k_per_head
        logits_TE = router_linear(x_TD, self.weight)
        gates_TE = logits_TE.sigmoid()
        ranking_TE = logits_TE.detach() if bias_E is None else gates_TE.detach() + bias_E
        E = logits_TE.shape[1] // H
        first_H1 = torch.arange(0, H * E, E, device=x_TD.device)[:, None]
        ids_TN = (ranking_TE.view(-1, H, E).topk(K, dim=-1).indices + first_H1).flatten(1)
        return RoutingDecision.from_topk(
            ids_TN,
            gates_TE.gather(1, ids_TN),
            probs_TE=normalized(gates_TE),
            logits_TE=logits_TE,
            selection_TE=gates_TE,
        )
