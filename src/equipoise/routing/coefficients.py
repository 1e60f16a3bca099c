"""Coefficients of balancing losses: a number, a schedule, or one that adapts to what the layer does, layer by layer.

An adaptive coefficient is an `Adaptive`: fp32 state in checkpoints, moved once per optimizer step from sums over
micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from equipoise.ops.count import accumulate
from equipoise.routing.adaptive import Adaptive
from equipoise.routing.schedules import Schedule
from equipoise.types import RoutingDecision

SPARSITY_RANGE = (1e-12, 1e6)


class AdaptiveCoef(Adaptive):
    """A coefficient that adapts: value, fp32 scalar; pending_2, float64 (2,), what it follows, and out of how much."""

    value: Tensor
    pending_2: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(()))
        self.register_buffer("pending_2", torch.zeros(2, dtype=torch.float64), persistent=False)

    @property
    def pending(self) -> Tensor:
        """float64 (2,)."""
        return self.pending_2


@runtime_checkable
class AdaptiveCoefConfig(Protocol):
    """A frozen dataclass that says which adaptive coefficient, with which options."""

    def build(self, num_experts: int, top_k: int) -> AdaptiveCoef:
        """Its state, for one layer."""
        ...


Coefficient = float | Schedule | AdaptiveCoefConfig


@dataclass(frozen=True)
class DropRateCoef:
    """A coefficient that follows the layer's drop rate (Skywork-MoE, arXiv 2406.06563 section 3.2).

    alpha <- beta alpha + (1 - beta) min(slope * drop rate, maximum), starting from 0: no push where nothing is dropped.
    Assignments beyond the capacity count, whether they were lost, moved or spilled. Needs a `Capacity`.
    """

    slope: float = 0.2
    maximum: float = 0.01
    beta: float = 0.99

    def __post_init__(self) -> None:
        for name in ("slope", "maximum"):
            if not getattr(self, name) > 0:
                raise ValueError(f"DropRateCoef.{name}: expected more than 0, got {getattr(self, name)}")
        if not 0 <= self.beta < 1:
            raise ValueError(f"DropRateCoef.beta: expected a value in [0, 1), got {self.beta}")

    def build(self, num_experts: int, top_k: int) -> DropRateCoefState:
        """Its state, for one layer."""
        return DropRateCoefState(self)


class DropRateCoefState(AdaptiveCoef):
    """State of `DropRateCoef`; pending: assignments without room, and all assignments."""

    def __init__(self, config: DropRateCoef) -> None:
        super().__init__()
        self.config = config

    def start(self) -> None:
        """From 0."""

    def observe(self, decision: RoutingDecision, drops: Mapping[str, Tensor] | None = None) -> None:
        """Count the assignments that found no room."""
        if not drops:
            raise ValueError("DropRateCoef: the layer drops nothing; give it a capacity, or a constant coefficient")
        overflow = torch.stack([count for reason, count in drops.items() if reason != "tokens"]).sum()
        seen = torch.stack([overflow, overflow.new_full((), len(decision.expert_ids_N))])
        accumulate(self.pending_2, seen.double())

    def advance(self, step: int) -> None:
        """Move towards what the drop rate asks for."""
        config, (overflow, total) = self.config, self.pending_2
        target = (config.slope * overflow / total.clamp_min(1)).clamp_max(config.maximum).float()
        moved = torch.lerp(target, self.value, config.beta)
        self.value.copy_(torch.where(total > 0, moved, self.value))


@dataclass(frozen=True)
class SparsityCoef:
    """A coefficient that keeps a ReLU router sparse (ReMoE, arXiv 2412.14711 section 3.3).

    After each step it is multiplied with `factor` where tokens used more than k experts on average, else divided by
    it. initial: before the first step; far too small at first on purpose, so that training starts nearly dense.
    Per layer; the reference implementation has one coefficient for all layers. It stays between 1e-12 and 1e6, so that
    it can turn around where its target is out of reach.
    """

    initial: float = 1e-8
    factor: float = 1.2

    def __post_init__(self) -> None:
        if not self.initial > 0:
            raise ValueError(f"SparsityCoef.initial: expected more than 0, got {self.initial}")
        if not self.factor > 1:
            raise ValueError(f"SparsityCoef.factor: expected more than 1, got {self.factor}")

    def build(self, num_experts: int, top_k: int) -> SparsityCoefState:
        """Its state, for one layer."""
        return SparsityCoefState(self, top_k)


class SparsityCoefState(AdaptiveCoef):
    """State of `SparsityCoef`; pending: assignments, and tokens."""

    def __init__(self, config: SparsityCoef, top_k: int) -> None:
        super().__init__()
        self.config, self.top_k = config, top_k
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """From `initial`."""
        self.value.fill_(self.config.initial)

    def observe(self, decision: RoutingDecision, drops: Mapping[str, Tensor] | None = None) -> None:
        """Count assignments and tokens."""
        seen = [float(len(decision.expert_ids_N)), float(decision.num_tokens)]
        accumulate(self.pending_2, self.pending_2.new_tensor(seen))

    def advance(self, step: int) -> None:
        """Up when too many experts are active, down when too few."""
        assignments, tokens = self.pending_2
        factor = torch.where(assignments > self.top_k * tokens, self.config.factor, 1 / self.config.factor)
        moved = (self.value * factor).clamp(*SPARSITY_RANGE)
        self.value.copy_(torch.where(tokens > 0, moved, self.value))
