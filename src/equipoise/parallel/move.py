"""Give experts to other ranks between two steps: weights and optimizer state travel, the model computes the same.

Balancers, routers and counts speak of logical experts and notice nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from equipoise.parallel.apply import ExpertParallel, check_placements
from equipoise.types import Placement


@torch.no_grad()
def move_experts(
    parallel: ExpertParallel, placements: Mapping[str, Placement], optimizer: torch.optim.Optimizer | None = None
) -> ExpertParallel:
    """Put other placements in force, on all ranks together. optimizer: of the model, whose state goes along.

    Without replicas a token's output keeps its bits while its experts are at most two; a sum over more, or over the
    batches of replicas, is added up in another order. Raises ValueError for placements that do not fit the model.
    """
    check_placements(
        placements, {name: layer.num_experts for name, layer in parallel.layers.items()}, parallel.ranks.config.expert
    )
    for layer, parameter in parallel.expert_parameters.values():
        before, after = parallel.placements[layer], placements[layer]
        if before == after:
            continue
        old_shape = parameter.shape
        parameter.data = _moved(parameter.data, before, after, parallel)
        parameter.grad = None
        if optimizer is not None:
            move = partial(_moved, before=before, after=after, parallel=parallel)
            _move_state(optimizer, parameter, old_shape, move)
    return parallel.placed(placements)


def _move_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, shape: torch.Size, move: Callable[[Tensor], Tensor]
) -> None:
    """What the optimizer keeps per element of the parameter goes with it; a step count stays."""
    state = optimizer.state.get(parameter, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            state[name] = move(value)


def _moved(rows: Tensor, before: Placement, after: Placement, parallel: ExpertParallel) -> Tensor:
    """This rank's rows under the new placement; each comes from the first rank that held it, or is here already."""
    own, world = parallel.ranks.expert_rank, before.num_ranks
    old = before.slots[own]
    to_send: list[int] = []
    send = [0] * world
    for rank in range(world):
        for expert in _needed(before, after, rank):
            if before.ranks_of(expert)[0] == own:
                to_send.append(old.index(expert))
                send[rank] += 1
    needed = _needed(before, after, own)
    by_source = sorted(needed, key=lambda expert: (before.ranks_of(expert)[0], needed.index(expert)))
    receive = [sum(before.ranks_of(expert)[0] == rank for expert in needed) for rank in range(world)]
    came = rows.new_empty(len(needed), *rows.shape[1:])
    dist.all_to_all_single(came, rows[to_send].contiguous(), receive, send, group=parallel.ranks.expert)
    parts = [rows[old.index(e)] if e in old else came[by_source.index(e)] for e in after.slots[own]]
    return torch.stack(parts) if parts else rows[:0].clone()


def _needed(before: Placement, after: Placement, rank: int) -> list[int]:
    """The experts that a rank has to get, in the order of its new slots."""
    return [expert for expert in after.slots[rank] if expert not in before.slots[rank]]
