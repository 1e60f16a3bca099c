"""Balancing losses: pure functions of the decision that was made, never of one derived again from the logits.

Each config has a name, a coefficient (a number or a schedule) and a call that gives the loss before coefficient and
share. What a loss needs beyond the decision comes as `LossInputs`. All are k-normalised, one value per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from equipoise.ops.count import count_assignments
from equipoise.routing.coefficients import Coefficient
from equipoise.types import RoutingDecision


@dataclass(frozen=True, eq=False)
class LossInputs:
    """One layer's decision and what surrounds it.

    sequence_ids_T: int64, the sequence of each token, in [0, num_sequences).
    k: experts per token, as the router's config has it. router_weight_ED: the linear router, None where there is none.
    global_counts_E: assignments of the whole global batch, or None when the decision covers it. expert_weights: what
    each expert's load counts, E numbers; None where all count 1.
    """

    decision: RoutingDecision
    sequence_ids_T: Tensor
    num_sequences: int
    k: int
    router_weight_ED: Tensor | None = None
    global_counts_E: Tensor | None = None
    expert_weights: tuple[float, ...] | None = None

    def weigh(self, shares: Tensor) -> Tensor:
        """Shares of the load (..., E), each times what its expert counts."""
        return shares if self.expert_weights is None else shares * shares.new_tensor(self.expert_weights)


Scope = Literal["micro", "sequence", "global"]


class BalanceLoss(Protocol):
    """A balancing loss: name and coefficient for logs, the tokens that it is taken over, and the value."""

    @property
    def name(self) -> str: ...  # noqa: D102 - described by the class

    @property
    def scope(self) -> Scope: ...  # noqa: D102 - described by the class

    @property
    def coef(self) -> Coefficient: ...  # noqa: D102 - described by the class

    def __call__(self, inputs: LossInputs) -> Tensor: ...  # noqa: D102 - described by the class


def switch_loss(probs_TE: Tensor, share_E: Tensor) -> Tensor:
    """E * sum_e f_e P_e with f the shares of assignments (sum 1, constant) and P_e the mean probability.

    Source: arXiv 2101.03961 equation 4, with f divided by k as in Megatron-LM and MegaBlocks. It is 1 at perfect
    balance, E when one expert has everything at k = 1. 1 is not a lower bound.
    """
    num_experts = probs_TE.shape[1]
    return num_experts * (share_E.to(probs_TE.dtype) * probs_TE.mean(0)).sum()


@dataclass(frozen=True)
class SwitchLoss:
    """Load times probability, the standard auxiliary loss (arXiv 2101.03961; sequence scope: 2412.19437 section 2.1.2).

    scope says over which tokens the load is taken:
    "micro": the micro-batch. The gradient depends on how the batch is split.
    "sequence": each sequence by itself, averaged with the sequences' numbers of tokens as weights.
    "global": the global batch (arXiv 2501.11873). Needs `BatchScope.counts` when the batch is split.
    """

    coef: Coefficient = 0.01
    scope: Scope = "micro"

    def __post_init__(self) -> None:
        if self.scope not in ("micro", "sequence", "global"):
            raise ValueError(f"SwitchLoss.scope: expected micro, sequence or global, got {self.scope!r}")

    @property
    def name(self) -> str:
        """Under which the loss is logged."""
        return f"switch_{self.scope}"

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss, a scalar."""
        decision = inputs.decision
        if decision.num_tokens == 0:
            return decision.probs_TE.sum()
        if self.scope == "sequence":
            return _sequence_loss(inputs)
        counts_E = inputs.global_counts_E if self.scope == "global" else None
        if counts_E is None:
            counts_E = count_assignments(decision.expert_ids_N, decision.num_experts)
        return switch_loss(decision.probs_TE, inputs.weigh(counts_E / counts_E.sum().clamp_min(1)))


def _sequence_loss(inputs: LossInputs) -> Tensor:
    decision, B = inputs.decision, inputs.num_sequences
    T, E = decision.probs_TE.shape
    sequence_ids_N = inputs.sequence_ids_T[decision.token_ids_N]
    counts_BE = count_assignments(sequence_ids_N * E + decision.expert_ids_N, B * E).view(B, E)
    share_BE = inputs.weigh(counts_BE / counts_BE.sum(1, keepdim=True).clamp_min(1))
    # sum_s T_s/T * E * sum_e f_se P_se, with T_s P_se the plain sum of probabilities over the sequence
    share_TE = share_BE.to(decision.probs_TE.dtype)[inputs.sequence_ids_T]
    return E * (share_TE * decision.probs_TE).sum() / T


def coefficient_of_variation_squared(values_E: Tensor) -> Tensor:
    """Variance (biased) over squared mean. `torch.var`'s default is unbiased and would inflate it by E/(E-1)."""
    mean = values_E.mean()
    return values_E.var(unbiased=False) / (mean * mean).clamp_min(torch.finfo(values_E.dtype).tiny)


@dataclass(frozen=True)
class ImportanceLoss:
    """CV^2 over experts of the summed combine weights (arXiv 1701.06538 section 4). Scope: the micro-batch."""

    coef: Coefficient = 0.1
    scope: ClassVar[Scope] = "micro"

    @property
    def name(self) -> str:
        """Under which the loss is logged."""
        return "importance"

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss, a scalar."""
        decision = inputs.decision
        importance_E = decision.weights_N.new_zeros(decision.num_experts)
        return coefficient_of_variation_squared(importance_E.index_add(0, decision.expert_ids_N, decision.weights_N))


@dataclass(frozen=True)
class LoadLoss:
    """CV^2 over experts of a smooth estimate of the load (arXiv 1701.06538 appendix A). Scope: the micro-batch.

    Load_e = sum_t Phi((z_te - threshold_te) / noise_std): the chance that expert e is selected under Gaussian noise
    on its logit. The threshold is in logit units (a widely copied implementation takes probabilities there): for a
    selected expert the best logit that was left out, for the others the lowest that was selected. A router with noise
    of its own (`NoisyTopK`) gives thresholds with the noise that was drawn, and its standard deviations.
    noise_std: of the logits, for routers without noise; None means 1/E.
    """

    coef: Coefficient = 0.1
    noise_std: float | None = None
    scope: ClassVar[Scope] = "micro"

    @property
    def name(self) -> str:
        """Under which the loss is logged."""
        return "load"

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss, a scalar. Raises ValueError for routers without a fixed number of experts per token."""
        decision = inputs.decision
        if decision.top_k is None:
            raise ValueError("LoadLoss: needs a router with a fixed number of experts per token, such as TopK")
        T, E = decision.logits_TE.shape
        if decision.top_k == E or T == 0:
            return decision.logits_TE.sum() * 0.0  # everybody is selected: the load can't vary
        logits_TE, noisy_TE = decision.logits_TE, decision.logits_TE.detach()
        std: float | Tensor = self.noise_std if self.noise_std is not None else 1.0 / E
        if decision.noise_std_TE is not None:
            noisy_TE, std = decision.selection_TE.detach(), decision.noise_std_TE
        selected_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
        selected_TE[decision.token_ids_N, decision.expert_ids_N] = True
        best_left_out_T1 = noisy_TE.masked_fill(selected_TE, float("-inf")).amax(1, keepdim=True)
        last_selected_T1 = noisy_TE.masked_fill(~selected_TE, float("inf")).amin(1, keepdim=True)
        threshold_TE = torch.where(selected_TE, best_left_out_T1, last_selected_T1)
        load_E = torch.special.ndtr((logits_TE - threshold_TE) / std).sum(0)
        return coefficient_of_variation_squared(load_E)


@dataclass(frozen=True)
class ZLoss:
    """Mean over tokens of logsumexp(z)^2 (arXiv 2202.08906 equation 5). Exact under any split of the batch.

    It keeps logits small. It is not a balancing loss: a collapsed router with small logits has a small z-loss.
    """

    coef: Coefficient = 0.001
    scope: ClassVar[Scope] = "micro"

    @property
    def name(self) -> str:
        """Under which the loss is logged."""
        return "z"

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss, a scalar."""
        logits_TE = inputs.decision.logits_TE
        return logits_TE.logsumexp(-1).square().sum() / max(logits_TE.shape[0], 1)
