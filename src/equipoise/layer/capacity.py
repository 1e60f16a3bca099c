"""How many assignments an expert may take, who goes first when there are more, and what becomes of the others.

Capacity is ceil(factor * T * K / E), at least 1 and at most T. What does not fit is counted before anything is cut.
At inference nothing is cut unless asked for: a capacity makes a token's output depend on who else is in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Policy = Literal["position", "probability", "random"]
Overflow = Literal["drop", "next_choice", "shared"]


@dataclass(frozen=True)
class Capacity:
    """A limit on the assignments per expert.

    factor: of the fair load T K / E. A fair random router still overflows by about 0.4 / sqrt(T K / E) at factor 1
        (`equipoise.layer.drop_rate` has it exactly). None: no limit by factor, only max_tokens.
    policy: who goes first. "position": earlier tokens, and a token's better choices first (with `ExpertChoice` each
        expert's better tokens); causal as long as the overflow is not "next_choice". "probability": the largest
        combine weights. "random": drawn from torch's generator of the device. Ties go to the earlier assignment.
    overflow: what becomes of the others. "drop": they are lost, the residual stream goes on without them.
        "next_choice": they go to the token's next best expert that has room, with the weights that the router would
        have given to the experts which the token ends up with; needs a router in which tokens rank all experts.
        "shared": the shared expert's output stands in for theirs, with their weight; needs shared_experts=1 or more.
    at_inference: the factor holds in eval too.
    max_tokens: never more assignments than this per expert and batch, in training and in eval (a hard cap).
    Weights of what is kept stay as they are. Who is lost, moved or spilled is counted by reason (`DispatchPlan.drops`).
    """

    factor: float | None = 1.25
    policy: Policy = "position"
    overflow: Overflow = "drop"
    at_inference: bool = False
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.factor is not None and not self.factor > 0:
            raise ValueError(
                f"Capacity.factor: expected more than 0, got {self.factor}; for no limit at all pass capacity=None"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"Capacity.max_tokens: expected at least 1, got {self.max_tokens}")
        if self.factor is None and self.max_tokens is None:
            raise ValueError("Capacity: expected a factor, max_tokens or both; for no limit at all pass capacity=None")
        for name, known in (("policy", get_args(Policy)), ("overflow", get_args(Overflow))):
            if getattr(self, name) not in known:
                expected = f"{', '.join(known[:-1])} or {known[-1]}"
                raise ValueError(f"Capacity.{name}: expected {expected}, got {getattr(self, name)!r}")

    def limit(self, num_tokens: int, num_assignments: int, num_experts: float) -> int:
        """Assignments per expert by the factor, for num_assignments = T K assignments of T tokens.

        num_experts: E; for an expert whose fair share is another, 1 over that share.
        """
        if self.factor is None:
            return max(num_tokens, 1)
        fair = self.factor * num_assignments / num_experts
        rounded_up = math.ceil(fair * (1 - 1e-12))  # 1.1 * 100 / 10 is 11, not 11.000000000000002
        return min(max(num_tokens, 1), max(1, rounded_up))

    def active(self, training: bool) -> bool:
        """Whether anything can overflow in this mode."""
        return training or self.at_inference or self.max_tokens is not None

    def limits(self, num_tokens: int, num_assignments: int, num_experts: float, training: bool) -> tuple[int, int]:
        """(limit by the factor, limit by factor and hard cap) that hold in this mode."""
        by_factor = max(num_tokens, 1)
        if training or self.at_inference:
            by_factor = self.limit(num_tokens, num_assignments, num_experts)
        return by_factor, by_factor if self.max_tokens is None else min(by_factor, self.max_tokens)
