"""Dispatch and combine on one device: bring rows into expert order, and back.

Dispatchers are plain objects. On one device all rows are already here, so `dispatch` hands over x as it is with a
plan of which rows each expert reads, and the expert backend, which gathers and sums by that plan, leaves nothing for
`combine` to do. A dispatcher that spans ranks sends rows in `dispatch` and brings results home in `combine`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from equipoise.layer.capacity import Capacity
from equipoise.layer.overflow import Fitted, fit, spilled
from equipoise.ops.ragged import RaggedPlan, ragged_plan
from equipoise.types import RoutingDecision


class Dispatcher(Protocol):
    """The seam between the router's decision and the experts."""

    def dispatch(self, x_TD: Tensor, decision: RoutingDecision, training: bool) -> tuple[Tensor, RaggedPlan]:
        """(rows, plan): the token rows that this rank's experts read, and how."""
        ...

    def combine(self, y: Tensor, plan: RaggedPlan) -> Tensor:
        """y_TD from the experts' sums per row of `dispatch`."""
        ...


class DroplessDispatcher:
    """Every assignment is computed: ragged rows, no padding, no limit."""

    def dispatch(self, x_TD: Tensor, decision: RoutingDecision, training: bool) -> tuple[Tensor, RaggedPlan]:
        """x as it is, and the plan."""
        return x_TD, plan_of(decision)

    def combine(self, y: Tensor, plan: RaggedPlan) -> Tensor:
        """Nothing left to do."""
        return y


class CapacityDispatcher:
    """Each expert takes at most its capacity; what does not fit is moved, spilled or dropped, and counted."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity

    def dispatch(self, x_TD: Tensor, decision: RoutingDecision, training: bool) -> tuple[Tensor, RaggedPlan]:
        """x as it is, and the plan of what fits."""
        if not self.capacity.active(training):
            return x_TD, plan_of(decision)
        fitted = fit(decision, self.capacity, training)
        return x_TD, plan_of(fitted.decision, fitted)

    def combine(self, y: Tensor, plan: RaggedPlan) -> Tensor:
        """Nothing left to do."""
        return y


class DivertDispatcher:
    """Keeps some assignments from their experts; a stand-in computes them, with their weight. Without a capacity.

    share: of the tokens, drawn at random from torch's generator of the device; all of their assignments are diverted.
    shut_experts: their assignments are diverted.
    """

    def __init__(self, share: float, shut_experts: tuple[int, ...] = ()) -> None:
        self.share, self.shut_experts = share, shut_experts

    def dispatch(self, x_TD: Tensor, decision: RoutingDecision, training: bool) -> tuple[Tensor, RaggedPlan]:
        """x as it is, and the plan of what is left to the experts."""
        T, device = decision.num_tokens, x_TD.device
        if self.share in (0.0, 1.0):
            diverted_T = torch.full((T,), self.share == 1.0, device=device)
        else:
            diverted_T = torch.rand(T, device=device) < self.share
        shut_E = torch.zeros(decision.num_experts, dtype=torch.bool, device=device)
        shut_E[list(self.shut_experts)] = True
        diverted_N = diverted_T[decision.token_ids_N] | shut_E[decision.expert_ids_N]
        drops = {"diverted": diverted_N.sum()}
        return x_TD, plan_of(decision, Fitted(decision, ~diverted_N, spilled(decision, ~diverted_N), drops))

    def combine(self, y: Tensor, plan: RaggedPlan) -> Tensor:
        """Nothing left to do."""
        return y


def plan_of(decision: RoutingDecision, fitted: Fitted | None = None) -> RaggedPlan:
    """The rows of the decision by expert; fitted: what stays of it, None for all."""
    plan = ragged_plan(
        decision.token_ids_N,
        decision.expert_ids_N,
        decision.weights_N,
        decision.num_experts,
        top_k=decision.top_k,
        keep_N=None if fitted is None else fitted.keep_N,
    )
    return plan if fitted is None else replace(plan, drops=fitted.drops, spilled_T=fitted.spilled_T)
