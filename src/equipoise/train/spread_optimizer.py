"""The optimizer's state of a model that is spread over ranks, in logical coordinates: to a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from equipoise.disk.checkpoint import JSON, group_file
from equipoise.disk.rows import read_rows, shapes
from equipoise.parallel import ExpertParallel
from equipoise.parallel.checkpoint import Share, own_rows, shares_of
from equipoise.train.snapshot import parameters_of, unpack_optimizer

GROUP = "optimizer"


def optimizer_shares(
    parallel: ExpertParallel, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> dict[str, Share]:
    """This rank's part of each tensor of `pack_optimizer`: moments have the rows of their parameter."""
    parameters, layer_of = parameters_of(optimizer), _layers(parallel)
    layers = {}
    for name, tensor in tensors.items():
        parameter = parameters[_index(name)]
        if id(parameter) in layer_of and tensor.shape == parameter.shape:
            layers[name] = layer_of[id(parameter)]
    return shares_of(parallel, tensors, layers)


def logical_shapes(parallel: ExpertParallel, optimizer: torch.optim.Optimizer) -> list[list[int]]:
    """Of the parameters, as one process would have them."""
    layer_of = _layers(parallel)
    logical = []
    for parameter in parameters_of(optimizer):
        shape = list(parameter.shape)
        if layer := layer_of.get(id(parameter)):
            shape[0] = parallel.placements[layer].num_experts
        logical.append(shape)
    return logical


def restore_optimizer(
    path: Path, parallel: ExpertParallel, optimizer: torch.optim.Optimizer, described: Mapping[str, JSON]
) -> None:
    """From a verified checkpoint, this rank's part. Raises ValueError when it is of another model."""
    parameters, layer_of = parameters_of(optimizer), _layers(parallel)
    expected = logical_shapes(parallel, optimizer)
    if described["shapes"] != expected:
        raise ValueError(
            f"the optimizer has parameters of shapes {expected}, the checkpoint's has {described['shapes']}: build the "
            "model and the optimizer with the checkpoint's config"
        )
    file = group_file(path, GROUP)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes(file).items():
        index = _index(name)
        parameter, has_rows = parameters[index], list(shape) == expected[index]
        if has_rows and id(parameter) in layer_of:
            tensors[name] = read_rows(file, name, parallel.slots(layer_of[id(parameter)]))
        elif has_rows and isinstance(parameter, DTensor):
            local = read_rows(file, name, own_rows(parameter))
            tensors[name] = DTensor.from_local(
                local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
            )
        else:
            tensors[name] = read_rows(file, name, None)
    local_shapes = [list(parameter.shape) for parameter in parameters]
    unpack_optimizer(optimizer, tensors, dict(described) | {"shapes": local_shapes})


def _layers(parallel: ExpertParallel) -> dict[int, str]:
    return {id(parameter): layer for layer, parameter in parallel.expert_parameters.values()}


def _index(name: str) -> int:
    """Of the parameter that a tensor of `pack_optimizer` belongs to: "state.3.exp_avg" is of number 3."""
    return int(name.split(".")[1])
