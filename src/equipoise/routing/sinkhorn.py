"""Sinkhorn routing: in training the k best experts of a balanced version of the logits (NVIDIA/Megatron-LM).

The balanced matrix decides who goes where; weights come from the logits as they are. In eval it is plain top-k, so
the model is used with other choices than it was trained with. Not causal in training: the balance of the batch
depends on all its tokens. Reference: megatron/core/transformer/moe/router.py:sinkhorn_load_balancing; ours iterates
a fixed number of times in the log domain, where it can't overflow.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from equipoise.ops.router_linear import router_linear
from equipoise.ops.sinkhorn import sinkhorn_log
from equipoise.routing.router import LinearRouter, Traits, check_k, refuse_bias
from equipoise.types import Preferences, RoutingDecision


@dataclass(frozen=True)
class Sinkhorn:
    """Configuration. Weights: the sigmoid of the logit for k = 1, else the softmax over all experts, raw.

    iterations: of row and column normalisation. allow_future: accept it in a causal model; the loss it reaches in
    training is then not the loss at generation.
    """

    k: int = 1
    iterations: int = 20
    allow_future: bool = False

    def __post_init__(self) -> None:
        check_k("Sinkhorn", self.k)
        if self.iterations < 1:
            raise ValueError(f"Sinkhorn.iterations: expected at least 1, got {self.iterations}")

    @property
    def traits(self) -> Traits:
        """Balanced by construction in training, and not causal there."""
        return Traits(causal=False, allow_future=self.allow_future, takes_bias=False)

    def build(self, dim: int, num_experts: int) -> SinkhornRouter:
        """The router module for inputs of size dim."""
        return SinkhornRouter(self, dim, num_experts)


class SinkhornRouter(LinearRouter):
    """The router of `Sinkhorn`. Its only parameter is weight (E, D)."""

    def forward(self, x_TD: Tensor, bias_E: Tensor | None = None, token_ids_T: Tensor | None = None) -> RoutingDecision:
        """Decide; in training over all T tokens together. A bias is refused; token_ids_T is not used."""
        refuse_bias("Sinkhorn", bias_E, "which is balanced already")
        config = self.config
        logits_TE = router_linear(x_TD, self.weight)
        ranking_TE = logits_TE.detach()
        if self.training:
            ranking_TE = sinkhorn_log(ranking_TE, config.iterations)
        probs_TE = logits_TE.softmax(-1)
        preferences = Preferences(ranking_TE, logits_TE.sigmoid() if config.k == 1 else probs_TE, "raw")
        ids_TK = ranking_TE.topk(config.k, dim=-1).indices
        return RoutingDecision.from_topk(
            ids_TK,
            preferences.weights(ids_TK),
            probs_TE=probs_TE,
            logits_TE=logits_TE,
            preferences=preferences,
        )
