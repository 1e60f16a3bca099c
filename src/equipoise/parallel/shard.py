"""FSDP2 for the dense part of a model: weights, gradients and optimizer state sharded over all ranks.

Experts are left out: they are spread over ranks already. Gradients are summed, not averaged, as everywhere here.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from equipoise.parallel.apply import ExpertParallel


def shard_dense(parallel: ExpertParallel, blocks: list[nn.Module]) -> None:
    """Shard everything but experts, block by block; call it before the optimizer is built.

    blocks: the modules whose weights are gathered together for their forward, in order, such as a decoder's layers.
    """
    mesh = init_device_mesh(parallel.ranks.mesh.device_type, (parallel.ranks.size,))
    experts = {parameter for _, parameter in parallel.expert_parameters.values()}
    for module in (*blocks, parallel.model):
        fully_shard(module, mesh=mesh, ignored_params=experts)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether FSDP2 has taken it over: its gradient is complete after backward."""
    return isinstance(parameter, DTensor)
