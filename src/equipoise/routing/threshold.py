"""Expert threshold routing: a token goes to every expert whose threshold its logit exceeds (arXiv 2603.11535).

The threshold follows the (1 - k/E) quantile of the expert's logits, so that it takes k/E of all tokens: the balance of
expert choice without looking ahead, since a batch is routed with thresholds of the batches before it. Causal; a token
may get any number of experts, also none. Reference: MasterGodzilla/Expert-Threshold-Routing:src/models/engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.ops.histogram import NUM_BINS, accumulate_values, upper_quantile
from equipoise.ops.router_linear import router_linear
from equipoise.routing.adaptive import Adaptive
from equipoise.routing.router import LinearRouter, Traits, check_k, normalized, refuse_bias
from equipoise.types import RoutingDecision


@dataclass(frozen=True)
class Threshold:
    """Route where the logit exceeds the threshold, weighted with the sigmoid of the logit, not normalised.

    k: experts per token on average. ema: how much of the old threshold each optimizer step keeps (the paper's is 0.999
        for 20k steps of half a million tokens); corrected for its start, as in Adam.
    warmup: updates before thresholds decide; until then every token takes its k best experts. The paper warms up with
        expert choice instead, which is not causal.
    Thresholds come from a histogram of the whole step's logits, over micro-batches and ranks, and stay as they are in
    eval.
    """

    k: int = 2
    ema: float = 0.99
    warmup: int = 20

    def __post_init__(self) -> None:
        check_k("Threshold", self.k)
        if not 0 <= self.ema < 1:
            raise ValueError(f"Threshold.ema: expected a value in [0, 1), got {self.ema}")
        if self.warmup < 1:
            raise ValueError(f"Threshold.warmup: expected at least 1, or there is no threshold yet, got {self.warmup}")

    @property
    def traits(self) -> Traits:
        """Causal; the number of experts varies between tokens."""
        return Traits(takes_bias=False, ranks=False, fixed_k=False)

    def build(self, dim: int, num_experts: int) -> ThresholdRouter:
        """The router module for inputs of size dim."""
        return ThresholdRouter(self, dim, num_experts)


class Thresholds(Adaptive):
    """State of `Threshold`: the running sum of quantiles and the number of updates (saved), a histogram of logits."""

    running_E: Tensor
    updates: Tensor
    pending_EC: Tensor

    def __init__(self, config: Threshold, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("running_E", torch.zeros(num_experts))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pending_EC", torch.zeros(num_experts, NUM_BINS, dtype=torch.int64), persistent=False)

    def start(self) -> None:
        """No thresholds yet."""

    @property
    def pending(self) -> Tensor:
        """int64 (E, bins): logits since the last update."""
        return self.pending_EC

    @property
    def warm(self) -> Tensor:
        """bool scalar: thresholds decide."""
        return self.updates >= self.config.warmup

    @property
    def thresholds_E(self) -> Tensor:
        """fp32 (E,): the running mean, corrected for its start at 0; 0 before the first update."""
        return self.running_E / (1 - self.config.ema ** self.updates.float()).clamp_min(1e-12)

    def observe(self, decision: RoutingDecision, drops: Mapping[str, Tensor] | None = None) -> None:
        """Add the logits to the histogram (once, also when the forward is recomputed)."""
        accumulate_values(self.pending_EC, decision.logits_TE.detach().float())

    def advance(self, step: int) -> None:
        """Move the thresholds towards the quantile of this step."""
        num_tokens = self.pending_EC[0].sum()
        quantile_E = upper_quantile(self.pending_EC, num_tokens * self.config.k / len(self.running_E))
        moved_E = torch.lerp(quantile_E, self.running_E, self.config.ema)
        self.running_E.copy_(torch.where(num_tokens > 0, moved_E, self.running_E))
        self.updates.add_(num_tokens > 0)


class ThresholdRouter(LinearRouter):
    """The router of `Threshold`. Its only parameter is weight (E, D)."""

    def __init__(self, config: Threshold, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self.state = Thresholds(config, num_experts)

    def forward(self, x_TD: Tensor, bias_E: Tensor | None = None, token_ids_T: Tensor | None = None) -> RoutingDecision:
        """Decide. A bias is refused; token_ids_T is not used. One host synchronisation on a GPU."""
        refuse_bias("Threshold", bias_E, "its thresholds balance it")
        logits_TE = router_linear(x_TD, self.weight)
        scores_TE = logits_TE.sigmoid()
        ranking_TE = logits_TE.detach()
        best_TE = torch.zeros_like(ranking_TE, dtype=torch.bool)
        best_TE.scatter_(1, ranking_TE.topk(self.config.k, dim=-1).indices, True)
        mask_TE = torch.where(self.state.warm, ranking_TE > self.state.thresholds_E, best_TE)
        return RoutingDecision.from_mask(mask_TE, scores_TE, probs_TE=normalized(scores_TE), logits_TE=logits_TE)
