"""What processes that each hold some experts of a layer know together: sums by expert, and one expert's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.layer import MoE
from equipoise.types import ALONE, Team


@torch.no_grad()
def by_expert(team: Team, layer: str, values_e: Tensor) -> Tensor:
    """(E,): of what each process counts for the experts that it holds, the sum; copies count together."""
    held = team.held(layer, len(values_e))
    values_E = values_e.new_zeros(held.num_experts)
    values_E.index_add_(0, torch.tensor(held.ids, dtype=torch.int64, device=values_e.device), values_e.detach())
    team.sum(values_E)
    return values_E


@torch.no_grad()
def row_of(team: Team, layer: str, weights: Tensor, expert: int) -> Tensor:
    """A copy of one expert's row of weights (e, ...), in all processes: to the bit, but that -0.0 is 0.0 over ranks."""
    held = team.held(layer, len(weights))
    row = torch.zeros_like(weights[0]) if len(weights) else weights.new_zeros(weights.shape[1:])
    for place, (id_, owned) in enumerate(zip(held.ids, held.owned, strict=True)):
        if id_ == expert and owned:
            row = weights.detach()[place].clone()
    team.sum(row)
    return row


def finite_experts(layer: MoE, name: str = "", team: Team = ALONE) -> Tensor:
    """bool (E,), on the host: the experts all of whose weights are numbers, of those that have weights.

    name: the layer's, where its experts are held by several processes.
    """
    tensors = [tensor.detach() for tensor in layer.experts.parameters()]
    broken_e = torch.stack([~torch.isfinite(tensor).flatten(1).all(1) for tensor in tensors]).any(0)
    return by_expert(team, name, broken_e.long()).cpu() == 0
