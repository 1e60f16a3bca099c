"""The experts' activation functions, forward and backward, on the pre-activation z.

swiglu: z is (n, 2F), a = silu(z[:, :F]) * z[:, F:]  (arXiv 2002.05202). gelu: z is (n, F), tanh approximation as in
GPT-2. The backward returns what the expert backward needs from one recomputation: a and a function of da.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as fn
from torch import Tensor

Activation = Literal["swiglu", "gelu"]


def check_activation(name: str) -> Activation:
    """Return name, or raise ValueError naming the known ones."""
    for known in get_args(Activation):
        if name == known:
            return known  # type: ignore[no-any-return]  # get_args is untyped
    raise ValueError(f"activation: expected one of {', '.join(get_args(Activation))}, got {name!r}")


def pre_activation_dim(hidden_dim: int, activation: Activation) -> int:
    """Width of z: 2F for a gated activation, F otherwise."""
    return 2 * hidden_dim if activation == "swiglu" else hidden_dim


def activate(z: Tensor, activation: Activation) -> Tensor:
    """a (n, F) from z; differentiable."""
    if activation == "swiglu":
        gate, up = z.chunk(2, dim=-1)
        return fn.silu(gate) * up
    return fn.gelu(z, approximate="tanh")


def recompute(z: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """(a, saved): the activation again, and the intermediate that `activate_backward` takes. No gradient."""
    if activation == "swiglu":
        gate, up = z.chunk(2, dim=-1)
        silu_gate = fn.silu(gate)
        return silu_gate * up, silu_gate
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
    grad: Tensor = torch.ops.aten.gelu_backward(grad_a, z, approximate="tanh")
    return grad
