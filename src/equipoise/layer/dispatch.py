"""Dispatch and combine: bring what was admitted to where its experts are, and the results home.

`LocalDispatcher` is for one device. All rows are already here, so it hands over x as it is with a plan of which rows
each expert reads, and the expert backend, which gathers and sums by that plan, leaves nothing for `combine` to do.
A dispatcher that spans ranks sends rows in `dispatch` and brings sums home in `combine`; both may still be under way
when they return, so that other work can be done meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from equipoise.layer.overflow import Fitted
from equipoise.ops.ragged import RaggedPlan, Sort, ragged_plan
from equipoise.types import DispatchPlan

T_co = TypeVar("T_co", covariant=True)


class UnderWay(Protocol[T_co]):
    """Something that was started, on this rank or with others."""

    def wait(self) -> T_co:
        """The result. Call it once."""
        ...


@dataclass(frozen=True, eq=False)
class Here(Generic[T_co]):
    """A result that is there already."""

    result: T_co

    def wait(self) -> T_co:
        """The result."""
        return self.result


class Dispatched(Protocol):
    """What this rank's experts are to compute. rows: token rows. plan: which of them each expert reads."""

    @property
    def rows(self) -> Tensor: ...  # noqa: D102 - described by the class

    @property
    def plan(self) -> RaggedPlan: ...  # noqa: D102 - described by the class

    def combine(self, y: Tensor) -> UnderWay[Tensor]:
        """y_TD of the tokens that were dispatched here, from the experts' sums per row."""
        ...


class Dispatcher(Protocol):
    """The seam between what was decided and the experts."""

    def dispatch(self, x_TD: Tensor, fitted: Fitted) -> Sequence[UnderWay[Dispatched]]:
        """Start to bring tokens to their experts, in one or more chunks of consecutive tokens, in order."""
        ...


@dataclass(frozen=True, eq=False)
class Local:
    """Rows that have not moved. See `Dispatched`."""

    rows: Tensor
    plan: RaggedPlan

    def combine(self, y: Tensor) -> UnderWay[Tensor]:
        """Nothing left to do."""
        return Here(y)


@dataclass(frozen=True)
class LocalDispatcher:
    """All experts are on this device. sort: who sorts assignments by expert, None for `ragged_plan`'s choice."""

    sort: Sort | None = None

    def dispatch(self, x_TD: Tensor, fitted: Fitted) -> Sequence[UnderWay[Dispatched]]:
        """x as it is, and the plan."""
        return (Here(Local(x_TD, plan_of(fitted, self.sort))),)


@dataclass(frozen=True, eq=False)
class WholePlan:
    """The plans of all chunks as one, for observers. See `DispatchPlan`."""

    counts_e: Tensor
    drops: Mapping[str, Tensor]


def whole_plan(plans: Sequence[RaggedPlan]) -> DispatchPlan:
    """What all chunks come to. What was dropped, was so before they were cut."""
    if len(plans) == 1:
        return plans[0]
    return WholePlan(torch.stack([plan.counts_e for plan in plans]).sum(0), plans[0].drops)


def plan_of(fitted: Fitted, sort: Sort | None = None) -> RaggedPlan:
    """The rows of what is computed, by expert that computes."""
    decision = fitted.decision
    return ragged_plan(
        decision.token_ids_N,
        decision.expert_ids_N,
        decision.weights_N,
        decision.num_experts if fitted.num_computing is None else fitted.num_computing,
        top_k=decision.top_k,
        keep_N=fitted.keep_N,
        drops=fitted.drops,
        sort=sort,
    )
