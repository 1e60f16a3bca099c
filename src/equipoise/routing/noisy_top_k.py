"""Noisy top-k: learned Gaussian noise on the logits, and a softmax over the k that stay (arXiv 1701.06538 section 2.1).

Noise in training only. `LoadLoss` takes its thresholds from the noisy logits, in logit units; a widely copied
implementation (davidmrau/mixture-of-experts:moe.py) compares logits with probabilities there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from equipoise.ops.router_linear import router_linear
from equipoise.routing.router import Router, Traits, check_k, init_linear
from equipoise.types import Preferences, RoutingDecision


@dataclass(frozen=True)
class NoisyTopK:
    """H = x W + N(0, 1) softplus(x W_noise); weights are the softmax over the k largest H of a token.

    k: at least 2, or the weight is the constant 1 and the router gets no gradient from the task. init_std: of both
    weights; the paper's 0 starts with equal logits, so that the noise alone, of standard deviation ln 2, decides.
    """

    k: int = 2
    init_std: float = 0.0

    def __post_init__(self) -> None:
        check_k("NoisyTopK", self.k)
        if self.k == 1:
            raise ValueError(
                "NoisyTopK.k: 1 makes every weight the constant 1, so the router gets no gradient from the task; use "
                "k >= 2, or Switch"
            )
        if self.init_std < 0:
            raise ValueError(f"NoisyTopK.init_std: expected 0 or more, got {self.init_std}")

    @property
    def traits(self) -> Traits:
        """As token choice, with weights that sum to 1."""
        return Traits(weights_sum_to=1.0)

    def build(self, dim: int, num_experts: int) -> NoisyTopKRouter:
        """The router module for inputs of size dim."""
        return NoisyTopKRouter(self, dim, num_experts)


class NoisyTopKRouter(Router):
    """The router of `NoisyTopK`. Parameters: weight and noise_weight, (E, D)."""

    weight: Tensor

    def __init__(self, config: NoisyTopK, dim: int, num_experts: int) -> None:
        super().__init__()
        check_k("NoisyTopK", config.k, num_experts)
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, dim))
        self.init_weights(0.02)

    def init_weights(self, std: float) -> None:
        """Draw both weights with the config's init_std; the model's std is not used."""
        init_linear(self.weight, self.config.init_std)
        init_linear(self.noise_weight, self.config.init_std)

    def forward(self, x_TD: Tensor, bias_E: Tensor | None = None, token_ids_T: Tensor | None = None) -> RoutingDecision:
        """Decide. bias_E (E,) fp32 is added for the selection only; token_ids_T is not used."""
        logits_TE = router_linear(x_TD, self.weight)
        noisy_TE, std_TE = logits_TE, None
        if self.training:
            std_TE = fn.softplus(router_linear(x_TD, self.noise_weight)) + 1e-2  # never so small that Phi is a step
            noisy_TE = logits_TE + torch.randn_like(logits_TE) * std_TE
        ranking_TE = noisy_TE.detach() if bias_E is None else noisy_TE.detach() + bias_E
        preferences = Preferences(ranking_TE, noisy_TE, "softmax")
        ids_TK = ranking_TE.topk(self.config.k, dim=-1).indices
        return RoutingDecision.from_topk(
            ids_TK,
            preferences.weights(ids_TK),
            probs_TE=logits_TE.softmax(-1),
            logits_TE=logits_TE,
            selection_TE=noisy_TE,
            preferences=preferences,
            noise_std_TE=std_TE,
        )
