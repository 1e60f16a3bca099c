"""How many assignments an expert may take, and who has to go when there are more.

Capacity is ceil(factor * T * K / E), at least 1 and at most T. Drops are counted before anything is cut. At inference
nothing is dropped unless asked for: a capacity makes a token's output depend on who else is in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from equipoise.ops.count import count_assignments
from equipoise.types import RoutingDecision


@dataclass(frozen=True)
class Capacity:
    """A limit on the assignments per expert, and the policy that picks who is dropped beyond it.

    factor: of the fair load T K / E. A fair random router still drops about 0.4 / sqrt(T K / E) at factor 1.
    policy: "position" keeps earlier tokens, and a token's better choices first; the only one that is causal.
        "probability" keeps the largest combine weights. "random" draws from torch's generator of the device.
        Ties go to the earlier assignment.
    at_inference: drop in eval too (a hard cap).
    The weights of what is kept stay as they are; a token whose assignments are all dropped gets 0 from the routed
    experts, and goes on in the residual stream.
    """

    factor: float = 1.25
    policy: Literal["position", "probability", "random"] = "position"
    at_inference: bool = False

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(
                f"Capacity.factor: expected more than 0, got {self.factor}; for no limit at all pass capacity=None"
            )
        if self.policy not in ("position", "probability", "random"):
            raise ValueError(f"Capacity.policy: expected position, probability or random, got {self.policy!r}")

    def limit(self, num_tokens: int, num_assignments: int, num_experts: int) -> int:
        """Assignments per expert for num_assignments = T K assignments of T tokens."""
        fair = self.factor * num_assignments / num_experts
        rounded_up = math.ceil(fair * (1 - 1e-12))  # 1.1 * 20 / 2 is 11, not 11.000000000000002
        return min(max(num_tokens, 1), max(1, rounded_up))


def kept_assignments(decision: RoutingDecision, capacity: Capacity) -> Tensor:
    """bool (N,): the assignments that fit. Linear in N but for the sorts; no host synchronisation."""
    ids_N = decision.expert_ids_N
    N, E = len(ids_N), decision.num_experts
    by_priority_N = torch.arange(N, device=ids_N.device)
    if capacity.policy == "probability":
        by_priority_N = decision.weights_N.detach().argsort(descending=True, stable=True)
    elif capacity.policy == "random":
        by_priority_N = torch.randperm(N, device=ids_N.device)
    order_N = by_priority_N[ids_N[by_priority_N].argsort(stable=True)]  # by expert, then by priority
    counts_E = count_assignments(ids_N, E)
    start_E = counts_E.cumsum(0) - counts_E
    rank_N = torch.arange(N, device=ids_N.device) - start_E[ids_N[order_N]]
    fits_N = rank_N < capacity.limit(decision.num_tokens, N, E)
    return torch.empty_like(fits_N).scatter_(0, order_N, fits_N)


def count_drops(decision: RoutingDecision, keep_N: Tensor) -> dict[str, Tensor]:
    """Scalar int64 tensors: "capacity" assignments dropped, "tokens" that lost every assignment."""
    kept_T = torch.zeros(decision.num_tokens, dtype=torch.int64, device=keep_N.device)
    kept_T.index_add_(0, decision.token_ids_N, keep_N.long())
    return {"capacity": (~keep_N).sum(), "tokens": (kept_T == 0).sum()}
