"""st-moe-pytorch: dispatch and combine as products with one-hot tensors (T, E, capacity), as in Mesh TensorFlow.

github.com/lucidrains/st-moe-pytorch. It gets our SwiGLU experts and weights, no threshold for the second expert and
a capacity at which these tokens are not dropped: then it computes what the others do.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from equipoise.bench.problem import Candidate, Layer, LeftOutError, Problem, Shape, grad_of

MAX_ONE_HOT_BYTES = 2**29  # of one of the tensors (T, E, capacity), of which several are made
SLACK = 1.5  # capacity over the mean load


class SwiGLU(nn.Module):
    """One expert."""

    def __init__(self, up_HD: Tensor, down_DF: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up_HD), nn.Parameter(down_DF)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D)."""
        gate, value = fn.linear(x, self.up).chunk(2, dim=-1)
        return fn.linear(fn.silu(gate) * value, self.down)


def st_moe(problem: Problem) -> Layer:
    """Its MoE with its own gating."""
    shape = problem.shape
    experts = [
        SwiGLU(up.contiguous(), down.contiguous()) for up, down in zip(problem.up_EHD, problem.down_EDF, strict=True)
    ]
    factor = SLACK * shape.top_k  # its capacity is of one choice per token
    module = _package().MoE(
        dim=shape.dim, num_experts=shape.num_experts, gating_top_n=shape.top_k, experts=nn.ModuleList(experts),
        threshold_train=0.0, threshold_eval=0.0, capacity_factor_train=factor, capacity_factor_eval=factor,
        straight_through_dispatch_tensor=False,
    ).to(problem.x_TD.dtype)  # fmt: skip
    module.gate.to_gates.weight = nn.Parameter(problem.router_ED)

    def gradients() -> tuple[Tensor, ...]:
        ups, downs = [each.up.grad for each in experts], [each.down.grad for each in experts]
        assert all(grad is not None for grad in (*ups, *downs))
        return grad_of(module.gate.to_gates.weight), torch.stack(ups), torch.stack(downs)  # type: ignore[arg-type]

    return Layer(module, lambda x_TD: module(x_TD[None]).outputs[0], gradients)


def _package() -> Any:
    """Imported without what its type checker says about its hints."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module("st_moe_pytorch")


def needs_st_moe(shape: Shape, num_tokens: int, dtype: torch.dtype) -> None:
    """Raise LeftOutError where it is not there, or its one-hot tensors would be too large, or it would drop tokens."""
    try:
        _package()
    except ImportError:
        raise LeftOutError("st-moe-pytorch is not installed; pip install 'equipoise[bench]'") from None
    if shape.top_k < 2:
        raise LeftOutError("it has no top-1 routing")
    mean = num_tokens * shape.top_k / shape.num_experts
    capacity = int(SLACK * mean)
    if capacity < mean + 6 * mean**0.5:
        raise LeftOutError(f"with {num_tokens} tokens chance alone fills its capacity of {capacity}, and it drops some")
    one_hot = 4 * num_tokens * shape.num_experts * capacity
    if one_hot > MAX_ONE_HOT_BYTES:
        raise LeftOutError(
            f"its one-hot tensors (T, E, capacity) take {one_hot / 2**30:.1f} GiB each with {num_tokens} tokens "
            f"and {shape.num_experts} experts"
        )


VARIANTS = (Candidate("st-moe-pytorch", "moe", st_moe, needs_st_moe),)
