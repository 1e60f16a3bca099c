"""The regulariser of ReLU routing: an L1 penalty on the combine weights, heavier on busy experts (arXiv 2412.14711).

With `SparsityCoef` it drives the mean number of active experts to k and balances their load at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from equipoise.ops.count import count_assignments
from equipoise.routing.coefficients import Coefficient, SparsityCoef
from equipoise.routing.losses import LossInputs, Scope


@dataclass(frozen=True)
class SparsityLoss:
    """E * sum_e c_e / (T k) * mean_t w_te (arXiv 2412.14711 equation 9), c_e constant. Scope: the micro-batch."""

    coef: Coefficient = field(default_factory=SparsityCoef)
    scope: ClassVar[Scope] = "micro"

    @property
    def name(self) -> str:
        """Under which the loss is logged."""
        return "sparsity"

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss, a scalar."""
        decision = inputs.decision
        T, E = max(decision.num_tokens, 1), decision.num_experts
        counts_E = count_assignments(decision.expert_ids_N, E)
        weight_of_N = (counts_E / (T * inputs.k)).to(decision.weights_N.dtype)[decision.expert_ids_N]
        return E * (weight_of_N * decision.weights_N).sum() / T
