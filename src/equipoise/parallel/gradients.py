"""Gradients of a model that is spread over ranks: complete them, and bound their norm.

Each rank's backward gives its part of the gradient of the sum over all tokens. Dense parameters need the sum over all
ranks. An expert has seen the tokens of its whole expert group: it needs the sum over the groups, and over its copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from equipoise.parallel.apply import ExpertParallel
from equipoise.parallel.exchange import sum_over
from equipoise.parallel.shard import is_sharded

_BUCKET = 2**22  # elements


@torch.no_grad()
def sum_gradients(parallel: ExpertParallel) -> None:
    """Complete all gradients, in place. Parameters without a gradient get zeros: ranks must not differ in that."""
    ranks = parallel.ranks
    _sum_all(_grads(p for p in _dense(parallel) if not is_sharded(p)), ranks.world)
    own = _grads(parameter for _, parameter in parallel.expert_parameters.values())
    if ranks.config.data > 1:
        _sum_all(own, ranks.data)
    for name, parameter in parallel.expert_parameters.values():
        _sum_copies(parallel, name, parameter)


def _dense(parallel: ExpertParallel) -> list[nn.Parameter]:
    """All parameters but the experts'."""
    experts = {id(parameter) for _, parameter in parallel.expert_parameters.values()}
    return [parameter for parameter in parallel.model.parameters() if id(parameter) not in experts]


def _squared(x: Tensor) -> Tensor:
    return x.double().square().sum()


def _grads(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    grads = []
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
    return grads


def _sum_all(grads: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """In buckets of one type: few messages, little memory."""
    bucket: list[Tensor] = []
    for grad in grads:
        if bucket and (bucket[0].dtype != grad.dtype or sum(g.numel() for g in bucket) + grad.numel() > _BUCKET):
            _sum_bucket(bucket, group)
            bucket = []
        bucket.append(grad)
    if bucket:
        _sum_bucket(bucket, group)


def _sum_bucket(grads: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    sum_over(flat, group, "the sum of gradients")
    for grad, part in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def replicated(parallel: ExpertParallel, layer: str) -> list[int]:
    """The experts of a layer that more than one rank holds, in ascending order."""
    placement = parallel.placements[layer]
    return [expert for expert in range(placement.num_experts) if len(placement.ranks_of(expert)) > 1]


def _sum_copies(parallel: ExpertParallel, layer: str, parameter: nn.Parameter) -> None:
    """Copies of an expert have seen different tokens; they get the same gradient, and stay the same."""
    shared = replicated(parallel, layer)
    if not shared or parameter.grad is None:
        return
    slots = parallel.slots(layer)
    held = [(row, slots.index(expert)) for row, expert in enumerate(shared) if expert in slots]
    total = parameter.new_zeros(len(shared), *parameter.shape[1:])
    for row, slot in held:
        total[row] = parameter.grad[slot]
    sum_over(total, parallel.ranks.expert, f"{layer}: the sum of gradients over copies of experts")
    for row, slot in held:
        parameter.grad[slot] = total[row]


@torch.no_grad()
def clip_gradients(parallel: ExpertParallel, max_norm: float) -> float:
    """Scale complete gradients so that their norm over the whole model is at most max_norm; return it as it was.

    Each logical expert counts once, however many copies it has. The same on all ranks.
    """
    device = parallel.ranks.mesh.device_type
    everywhere, sharded, own = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
    for parameter in _dense(parallel):
        if isinstance(parameter.grad, DTensor):
            sharded += _squared(parameter.grad.to_local())
        elif parameter.grad is not None:
            everywhere += _squared(parameter.grad)
    for name, parameter in parallel.expert_parameters.values():
        if parameter.grad is not None:
            first = _first_held(parallel, name)
            own += _squared(parameter.grad if len(first) == len(parameter) else parameter.grad[first])
    parallel.ranks.sum(sharded)
    sum_over(own, parallel.ranks.expert, "the norm of gradients")
    norm = float((everywhere + sharded + own).sqrt())
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for parameter in parallel.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
    return norm


def _first_held(parallel: ExpertParallel, layer: str) -> list[int]:
    """The slots whose expert has its first copy on this rank."""
    placement, own = parallel.placements[layer], parallel.ranks.expert_rank
    return [slot for slot, expert in enumerate(parallel.slots(layer)) if placement.ranks_of(expert)[0] == own]
