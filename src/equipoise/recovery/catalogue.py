"""Every repair by its name: what `Action.kind` may say, and what a policy may ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from equipoise.recovery import actions, weights
from equipoise.recovery.actions import Apply


@dataclass(frozen=True)
class Repair:
    """One line of the table.

    tolerance: how much the held-out loss may rise by it, in nats per token, before it is undone at once. summary: for
    people. judged_by: what says that it helped. "alert": the alert is resolved. The others leave the router as it is,
    so the alert goes on: "load", what the busiest expert still computes; "loss", a lower held-out loss than before.
    """

    apply: Apply
    summary: str
    tolerance: float = 0.05
    judged_by: Literal["alert", "load", "loss"] = "alert"

    @property
    def last_resort(self) -> bool:
        """It keeps a server going at any price in quality: a human is called all the same."""
        return math.isinf(self.tolerance)


REPAIRS: Mapping[str, Repair] = {
    "quantile_bias": Repair(actions.apply_quantile_bias, "a selection bias that makes the recent traffic even"),
    "boost": Repair(actions.apply_boost, "balancing losses and steps of the bias count ten times as much"),
    "temperature": Repair(
        actions.apply_temperature, "divides the logits by how much wider than known-good they are", judged_by="loss"
    ),
    "next_choice": Repair(
        actions.apply_next_choice, "a capacity; what does not fit goes to the next best expert", judged_by="load"
    ),
    "spill": Repair(actions.apply_spill, "a capacity; what does not fit goes to the dense path", judged_by="load"),
    "reseed": Repair(weights.apply_reseed, "dead or broken experts become noisy copies of the busiest"),
    "lr_cut": Repair(weights.apply_lr_cut, "halves the learning rate"),
    "router_rollback": Repair(weights.apply_router_rollback, "the layer's known-good router and bias"),
    "full_rollback": Repair(weights.apply_full_rollback, "all weights of the known-good checkpoint"),
    "shut_expert": Repair(actions.apply_shut_expert, "one expert gets no tokens; the dense path does its part", 0.5),
    "dense": Repair(actions.apply_dense, "the dense path in place of the layer's experts", math.inf),
    "round_robin": Repair(actions.apply_round_robin, "experts in turn, whatever the token", math.inf),
}
