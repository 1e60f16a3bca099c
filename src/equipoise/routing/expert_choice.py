"""Expert choice: each expert takes the tokens that score highest for it (arXiv 2202.09368 section 3).

Perfectly balanced, no loss, no balancer. A token may get any number of experts, also none. Not causal: whether a
token is taken depends on the tokens after it, which leaks the future into a language model's training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.ops.router_linear import router_linear
from equipoise.routing.router import LinearRouter, Traits, check_k, refuse_bias
from equipoise.types import RoutingDecision


@dataclass(frozen=True)
class ExpertChoice:
    """Each expert takes its ceil(T k / E) best tokens of the batch, weighted with the softmax over experts, raw.

    k: experts per token on average. allow_future: accept it in a causal model; the loss it reaches in training is then
    not the loss at generation.
    """

    k: int = 2
    allow_future: bool = False

    def __post_init__(self) -> None:
        check_k("ExpertChoice", self.k)

    @property
    def traits(self) -> Traits:
        """Balanced by construction, and not causal."""
        return Traits(
            causal=False,
            allow_future=self.allow_future,
            takes_bias=False,
            ranks=False,
            fixed_k=False,
            batch_invariant=False,
        )

    def build(self, dim: int, num_experts: int) -> ExpertChoiceRouter:
        """The router module for inputs of size dim."""
        return ExpertChoiceRouter(self, dim, num_experts)


class ExpertChoiceRouter(LinearRouter):
    """The router of `ExpertChoice`. Its only parameter is weight (E, D)."""

    def forward(self, x_TD: Tensor, bias_E: Tensor | None = None, token_ids_T: Tensor | None = None) -> RoutingDecision:
        """Decide over all T tokens together. A bias is refused; token_ids_T is not used."""
        refuse_bias("ExpertChoice", bias_E, "every expert takes the same number of tokens")
        logits_TE = router_linear(x_TD, self.weight)
        probs_TE = logits_TE.softmax(-1)
        T, E = probs_TE.shape
        size = min(T, math.ceil(T * self.config.k / E))
        weights_EC, token_ids_EC = probs_TE.t().topk(size, dim=-1)
        return RoutingDecision(
            token_ids_N=token_ids_EC.reshape(-1),
            expert_ids_N=torch.arange(E, device=x_TD.device).repeat_interleave(size, output_size=E * size),
            weights_N=weights_EC.reshape(-1),
            probs_TE=probs_TE,
            logits_TE=logits_TE,
            selection_TE=logits_TE,
        )
