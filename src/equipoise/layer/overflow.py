"""Fit a decision into a capacity: who is kept, moved to another expert, spilled to the shared one, or lost.

Every assignment ends in exactly one of these, and each is counted by reason. Integers only, but for the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equipoise.layer.capacity import Capacity
from equipoise.ops.count import count_assignments
from equipoise.ops.next_choice import next_choice
from equipoise.types import RoutingDecision


@dataclass(frozen=True, eq=False)
class Fitted:
    """What is dispatched.

    decision: the router's, with moved assignments at their new experts. keep_N: bool, what is computed; None is all.
    spilled_T: fp32, the combine weight that the shared expert takes over for each token; None where nothing spills.
    drops: scalar int64 tensors by reason, see `DispatchPlan`. num_computing: the first so many experts have rows, and
    keep_N keeps theirs alone; None is all.
    """

    decision: RoutingDecision
    keep_N: Tensor | None = None
    spilled_T: Tensor | None = None
    drops: Mapping[str, Tensor] = field(default_factory=dict)
    num_computing: int | None = None


def fit(
    decision: RoutingDecision, capacity: Capacity, training: bool, shares: tuple[float, ...] | None = None
) -> Fitted:
    """Fit the decision into the capacity. No host synchronisation on a GPU, but for overflow="next_choice".

    shares: each expert's share of the assignments that the factor is of, sum 1; None is 1 / E. Not with next_choice.
    """
    N, T, E = len(decision.expert_ids_N), decision.num_tokens, decision.num_experts
    by_factor: int | Tensor
    limit: int | Tensor
    by_factor, limit = capacity.limits(T, N, E, training)
    if shares is not None:
        limits = [capacity.limits(T, N, 1 / share, training) for share in shares]
        by_factor, limit = torch.tensor(limits, device=decision.expert_ids_N.device)[decision.expert_ids_N].unbind(1)
    place_N = _places(decision, capacity)
    rank_N = _ranks(decision.expert_ids_N, place_N, E)
    keep_N = rank_N < limit
    none = keep_N.new_zeros((), dtype=torch.int64)
    drops = {"moved": none, "spilled": none}
    if capacity.overflow == "next_choice":
        assert isinstance(limit, int), "check_fit refuses next_choice with limits that differ"
        first_N = keep_N
        decision, keep_N = _moved(decision, keep_N, place_N, limit)
        drops["moved"] = (keep_N & ~first_N).sum()
    elif capacity.overflow == "shared":
        spilled_T = spilled(decision, keep_N)
        drops["spilled"] = (~keep_N).sum()
        return Fitted(decision, keep_N, spilled_T, drops | {"capacity": none, "hard_cap": none, "tokens": none})
    kept_T = torch.zeros(T, dtype=torch.int64, device=keep_N.device)
    kept_T.index_add_(0, decision.token_ids_N, keep_N.long())
    # A hard cap is to blame for what would have fitted without it.
    drops["capacity"] = (~keep_N & (rank_N >= by_factor)).sum()
    drops["hard_cap"] = (~keep_N & (rank_N < by_factor)).sum()
    drops["tokens"] = (kept_T == 0).sum()
    return Fitted(decision, keep_N, None, drops)


def spilled(decision: RoutingDecision, keep_N: Tensor) -> Tensor:
    """fp32 (T,), with gradient: the weight of each token's assignments that are not kept."""
    weights_N = torch.where(keep_N, 0.0, decision.weights_N)
    return weights_N.new_zeros(decision.num_tokens).index_add(0, decision.token_ids_N, weights_N)


def _places(decision: RoutingDecision, capacity: Capacity) -> Tensor | None:
    """int64 (N,): each assignment's place in the order of the policy, smaller first; None for their own order."""
    if capacity.policy == "position":
        return None
    N, device = len(decision.expert_ids_N), decision.expert_ids_N.device
    if capacity.policy == "probability":
        order_N = decision.weights_N.detach().argsort(descending=True, stable=True)
    else:
        order_N = torch.randperm(N, device=device)
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(N, device=device))


def _ranks(ids_N: Tensor, place_N: Tensor | None, num_experts: int) -> Tensor:
    """int64 (N,): how many assignments of the same expert go before each. Linear in N but for the sorts."""
    arange_N = torch.arange(len(ids_N), device=ids_N.device)
    by_place_N = arange_N if place_N is None else torch.empty_like(arange_N).scatter_(0, place_N, arange_N)
    order_N = by_place_N[ids_N[by_place_N].argsort(stable=True)]  # by expert, then by place
    counts_E = count_assignments(ids_N, num_experts)
    start_E = counts_E.cumsum(0) - counts_E
    return torch.empty_like(arange_N).scatter_(0, order_N, arange_N - start_E[ids_N[order_N]])


def _moved(
    decision: RoutingDecision, keep_N: Tensor, place_N: Tensor | None, limit: int
) -> tuple[RoutingDecision, Tensor]:
    """(decision, keep_N) after the auction of `next_choice`. Raises ValueError for a router that can't rank."""
    if decision.preferences is None or decision.top_k is None:
        raise ValueError(
            'Capacity.overflow: "next_choice" needs a router in which every token ranks all experts, such as TopK; '
            'use "drop" or "shared"'
        )
    K = decision.top_k
    if place_N is None:
        place_N = torch.arange(len(keep_N), device=keep_N.device)
    ids_TK, keep_TK = next_choice(
        decision.preferences.ranking_TE,
        decision.expert_ids_N.view(-1, K),
        keep_N.view(-1, K),
        place_N.view(-1, K),
        limit,
    )
    return decision.with_experts(ids_TK), keep_TK.view(-1)
