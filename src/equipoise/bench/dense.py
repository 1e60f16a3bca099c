"""Dense SwiGLU blocks of the same active arithmetic: the ceiling of an MoE layer that is bound by products."""

from __future__ import annotations

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from equipoise.bench.problem import Candidate, Layer, Problem, grad_of
from equipoise.layer import FeedForward


def dense_weights(problem: Problem) -> tuple[Tensor, Tensor]:
    """(2 K F, D) and (D, K F): the first K experts side by side, so that a token meets as much arithmetic."""
    up_KHD, down_KDF = problem.up_EHD[: problem.shape.top_k], problem.down_EDF[: problem.shape.top_k]
    gate_KFD, value_KFD = up_KHD.chunk(2, dim=1)
    up_HD = torch.cat([gate_KFD.flatten(0, 1), value_KFD.flatten(0, 1)])
    return up_HD, down_KDF.transpose(0, 1).flatten(1).contiguous()


def dense_fused(problem: Problem) -> Layer:
    """SwiGLU with gate and up in one matrix."""
    up_HD, down_DF = dense_weights(problem)
    with torch.device("meta"):
        module = FeedForward(problem.shape.dim, down_DF.shape[1])
    module.gate_up_proj.weight, module.down_proj.weight = nn.Parameter(up_HD), nn.Parameter(down_DF)
    return Layer(module, module, lambda: (grad_of(module.gate_up_proj.weight), grad_of(module.down_proj.weight)))


def dense_split(problem: Problem) -> Layer:
    """SwiGLU with gate and up in a matrix each."""
    up_HD, down_DF = dense_weights(problem)
    gate, value = (nn.Parameter(half.clone()) for half in up_HD.chunk(2))
    down = nn.Parameter(down_DF)

    def forward(x_TD: Tensor) -> Tensor:
        return fn.linear(fn.silu(fn.linear(x_TD, gate)) * fn.linear(x_TD, value), down)

    module = nn.ParameterList([gate, value, down])
    return Layer(module, forward, lambda: (torch.cat([grad_of(gate), grad_of(value)]), grad_of(down)))


DENSE = (
    Candidate("dense, gate and up fused", "dense", dense_fused),
    Candidate("dense, gate and up split", "dense", dense_split),
)
