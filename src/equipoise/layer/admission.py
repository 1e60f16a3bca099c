"""Who of a decision gets to the experts, and what becomes of the others: nothing about where the experts are."""

from __future__ import annotations

from typing import Protocol

import torch

from equipoise.layer.capacity import Capacity
from equipoise.layer.overflow import Fitted, fit, spilled
from equipoise.types import RoutingDecision


class Admission(Protocol):
    """Between the router's decision and the dispatcher."""

    def admit(self, decision: RoutingDecision, training: bool) -> Fitted:
        """What is computed of the decision, what moves, spills or is lost."""
        ...


class Dropless:
    """Every assignment is computed, without a limit."""

    def admit(self, decision: RoutingDecision, training: bool) -> Fitted:
        """All of it."""
        return Fitted(decision)


class Capped:
    """Each expert takes at most its capacity; what does not fit is moved, spilled or dropped, and counted.

    shares: of the assignments, that capacities are of; None is the same for all experts.
    """

    def __init__(self, capacity: Capacity, shares: tuple[float, ...] | None = None) -> None:
        self.capacity, self.shares = capacity, shares

    def admit(self, decision: RoutingDecision, training: bool) -> Fitted:
        """What fits."""
        if not self.capacity.active(training):
            return Fitted(decision)
        return fit(decision, self.capacity, training, self.shares)


class Diverted:
    """Keeps some assignments from their experts; a stand-in computes them, with their weight. Without a capacity.

    share: of the tokens, drawn at random from torch's generator of the device; all of their assignments are diverted.
    shut_experts: their assignments are diverted.
    """

    def __init__(self, share: float, shut_experts: tuple[int, ...] = ()) -> None:
        self.share, self.shut_experts = share, shut_experts

    def admit(self, decision: RoutingDecision, training: bool) -> Fitted:
        """What is left to the experts."""
        T, device = decision.num_tokens, decision.token_ids_N.device
        if self.share in (0.0, 1.0):
            diverted_T = torch.full((T,), self.share == 1.0, device=device)
        else:
            diverted_T = torch.rand(T, device=device) < self.share
        shut_E = torch.zeros(decision.num_experts, dtype=torch.bool, device=device)
        shut_E[list(self.shut_experts)] = True
        diverted_N = diverted_T[decision.token_ids_N] | shut_E[decision.expert_ids_N]
        return Fitted(decision, ~diverted_N, spilled(decision, ~diverted_N), {"diverted": diverted_N.sum()})
