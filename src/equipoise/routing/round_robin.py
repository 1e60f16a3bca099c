"""Round robin: experts in turn, whatever the token. Perfectly balanced, and trained experts get random tokens.

A device for benchmarks and the last rung of a repair, not a router to train with. The idea is torchtitan's
`_debug_force_load_balance` (pytorch/torchtitan:torchtitan/models/common/moe.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.ops.router_linear import router_linear
from equipoise.routing.router import LinearRouter, Traits, check_k, refuse_bias
from equipoise.types import Preferences, RoutingDecision


@dataclass(frozen=True)
class RoundRobin:
    """Token t of the batch goes to the experts (t k + 0 ... k - 1) mod E, with the weights that the router gives them.

    Weights: the softmax over the chosen experts for k >= 2, the raw probability for k = 1. A token's experts depend on
    its place in the batch: when single tokens are decoded, all go to the first k experts.
    """

    k: int = 2

    def __post_init__(self) -> None:
        check_k("RoundRobin", self.k)

    @property
    def traits(self) -> Traits:
        """Balanced by construction; a token's experts depend on its place."""
        return Traits(takes_bias=False, ranks=False, batch_invariant=False, weights_sum_to=1.0 if self.k > 1 else None)

    def build(self, dim: int, num_experts: int) -> RoundRobinRouter:
        """The router module for inputs of size dim."""
        return RoundRobinRouter(self, dim, num_experts)


class RoundRobinRouter(LinearRouter):
    """The router of `RoundRobin`. Its only parameter is weight (E, D), so that it can stand in for a `TopK` router."""

    def forward(self, x_TD: Tensor, bias_E: Tensor | None = None, token_ids_T: Tensor | None = None) -> RoutingDecision:
        """Decide by place alone. A bias is refused; token_ids_T is not used."""
        refuse_bias("RoundRobin", bias_E, "which is a turn")
        logits_TE = router_linear(x_TD, self.weight)
        probs_TE = logits_TE.softmax(-1)
        (T, E), k = logits_TE.shape, self.config.k
        ids_TK = torch.arange(T * k, device=x_TD.device).view(T, k) % E
        weigh = Preferences(logits_TE.detach(), logits_TE if k > 1 else probs_TE, "softmax" if k > 1 else "raw")
        return RoutingDecision.from_topk(ids_TK, weigh.weights(ids_TK), probs_TE=probs_TE, logits_TE=logits_TE)
