"""The experts' activation functions, forward and backward, on the pre-activation z.

swiglu: z is (n, 2F), a = silu(z[:, :F]) * z[:, F:]  (arXiv 2002.05202). gelu: z is (n, F), tanh approximation as in
GPT-2. clamped_swiglu: as swiglu with gpt-oss's gate and limits, min(g, 7) sigmoid(1.702 g) (clamp(u, -7, 7) + 1)
(openai/gpt-oss:gpt_oss/torch/model.py). The backward returns what the expert backward needs from one recomputation: a
and a function of da.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as fn
from torch import Tensor

Activation = Literal["swiglu", "gelu", "clamped_swiglu"]
LIMIT, ALPHA = 7.0, 1.702  # of clamped_swiglu


def check_activation(name: str) -> Activation:
    """Return name, or raise ValueError naming the known ones."""
    for known in get_args(Activation):
        if name == known:
            return known  # type: ignore[no-any-return]  # get_args is untyped
    raise ValueError(f"activation: expected one of {', '.join(get_args(Activation))}, got {name!r}")


def pre_activation_dim(hidden_dim: int, activation: Activation) -> int:
    """Width of z: 2F for a gated activation, F otherwise."""
    return 2 * hidden_dim if is_gated(activation) else hidden_dim


def is_gated(activation: Activation) -> bool:
    """Whether the inner projection has two halves, the gate first."""
    return activation != "gelu"


def activate(z: Tensor, activation: Activation) -> Tensor:
    """a (n, F) from z; differentiable."""
    if activation == "swiglu":
        gate, up = z.chunk(2, dim=-1)
        return fn.silu(gate) * up
    if activation == "clamped_swiglu":
        gate, up = z.chunk(2, dim=-1)
        gate = gate.clamp(max=LIMIT)
        return gate * torch.sigmoid(ALPHA * gate) * (up.clamp(-LIMIT, LIMIT) + 1)
    return fn.gelu(z, approximate="tanh")


def recompute(z: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """(a, saved): the activation again, and the intermediate that `activate_backward` takes. No gradient."""
    if activation == "swiglu":
        gate, up = z.chunk(2, dim=-1)
        silu_gate = fn.silu(gate)
        return silu_gate * up, silu_gate
    if activation == "clamped_swiglu":
        gate, up = z.chunk(2, dim=-1)
        gate = gate.clamp(max=LIMIT)
        gated = gate * torch.sigmoid(ALPHA * gate)
        return gated * (up.clamp(-LIMIT, LIMIT) + 1), gated
    a = fn.gelu(z, approximate="tanh")
    return a, a


def activate_backward(grad_a: Tensor, z: Tensor, saved: Tensor, activation: Activation) -> Tensor:
    """dL/dz from dL/da. Overwrites grad_a."""
    if activation == "swiglu":
        gate, up = z.chunk(2, dim=-1)
        grad_z = torch.empty_like(z)
        grad_gate, grad_up = grad_z.chunk(2, dim=-1)
        torch.mul(grad_a, saved, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_a.mul_(up), gate, grad_input=grad_gate)
        return grad_z
    if activation == "clamped_swiglu":
        gate, up = z.chunk(2, dim=-1)
        share = torch.sigmoid(ALPHA * gate.clamp(max=LIMIT))
        slope = share + ALPHA * saved * (1 - share)
        grad_gate = grad_a * (up.clamp(-LIMIT, LIMIT) + 1) * slope * (gate <= LIMIT)
        return torch.cat((grad_gate, grad_a * saved * (up.abs() <= LIMIT)), dim=-1)
    grad: Tensor = torch.ops.aten.gelu_backward(grad_a, z, approximate="tanh")
    return grad
