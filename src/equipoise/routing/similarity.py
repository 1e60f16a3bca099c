"""A balancing loss that looks at the router alone: its rows are kept orthogonal (SimBal, arXiv 2506.14038).

Data-free, so exact under any split of the batch. It looks at no load: tokens that are alike still go to one expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.routing.coefficients import Coefficient
from equipoise.routing.losses import LossInputs, Scope


def router_similarity(weight_ED: Tensor) -> Tensor:
    """Sum over entries of |R R^T - I|, fp32 scalar: 0 when the E rows are orthonormal (section 3 of the paper)."""
    weight_ED = weight_ED.float() if weight_ED.dtype != torch.float64 else weight_ED
    gram_EE = weight_ED @ weight_ED.t()
    return (gram_EE - torch.eye(len(gram_EE), dtype=gram_EE.dtype, device=gram_EE.device)).abs().sum()


def check_similarity(weight_ED: Tensor | None) -> Tensor:
    """The weight, if its rows can be orthogonal. Raises ValueError."""
    if weight_ED is None:
        raise ValueError("SimilarityLoss: the router has no weight whose rows could be kept apart; remove the loss")
    E, D = weight_ED.shape
    if E > D:
        raise ValueError(f"SimilarityLoss: expected at most dim = {D} experts, got {E}: no {E} rows are orthogonal")
    return weight_ED


@dataclass(frozen=True)
class SimilarityLoss:
    """Keeps the router's rows orthonormal. Start from `TopK(init="orthogonal")`: from small rows the norm dominates.

    coef: the paper's is 0.1. Needs a router with a weight and E <= D rows, or they can't be orthogonal.
    """

    coef: Coefficient = 0.1
    scope: ClassVar[Scope] = "micro"

    @property
    def name(self) -> str:
        """Under which the loss is logged."""
        return "similarity"

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss, a scalar. Raises ValueError for a router without a weight, or with more experts than dims."""
        weight_ED = check_similarity(inputs.router_weight_ED)
        with torch.autocast(weight_ED.device.type, enabled=False):
            return router_similarity(weight_ED)
