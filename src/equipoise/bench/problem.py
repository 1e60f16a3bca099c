"""What is compared: a layer's size, the tokens and weights that every variant gets, and what a variant is.

All MoE variants hold the same weights and route the same tokens alike. Nothing is timed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as fn
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """A layer's size: D, F, E and K of the shape letters."""

    name: str
    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int

    def flops(self, num_tokens: int) -> int:
        """Multiplications and additions of the experts' forward, two per weight and token that uses it."""
        return 2 * num_tokens * self.top_k * 3 * self.dim * self.hidden_dim


SHAPES = {
    "coarse": Shape("coarse", dim=1024, hidden_dim=2048, num_experts=8, top_k=2),
    "fine": Shape("fine", dim=512, hidden_dim=256, num_experts=64, top_k=8),
    "olmoe": Shape("olmoe", dim=2048, hidden_dim=1024, num_experts=64, top_k=8),
    "decode": Shape("decode", dim=2048, hidden_dim=1024, num_experts=64, top_k=8),
    "qwen3": Shape("qwen3", dim=2048, hidden_dim=768, num_experts=128, top_k=8),  # 30B-A3B
    "mixtral": Shape("mixtral", dim=4096, hidden_dim=14336, num_experts=8, top_k=2),  # 8x7B
}


def parse_shape(text: str) -> Shape:
    """A name of `SHAPES`, or four numbers D,F,E,K. Raises ValueError for anything else."""
    if text in SHAPES:
        return SHAPES[text]
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.strip().isdigit() and int(number) > 0 for number in numbers):
        raise ValueError(f"shape: expected {', '.join(SHAPES)}, or D,F,E,K as in 512,256,64,8; got {text!r}")
    dim, hidden_dim, num_experts, top_k = map(int, numbers)
    if top_k > num_experts:
        raise ValueError(f"shape: expected at most E={num_experts} experts per token, got K={top_k} in {text!r}")
    return Shape(text, dim, hidden_dim, num_experts, top_k)


def tiny(shape: Shape) -> Shape:
    """One of the same name that takes no time."""
    experts = min(shape.num_experts, 8)
    return Shape(shape.name, 64, 64, experts, min(shape.top_k, experts // 2))


@dataclass(frozen=True, eq=False)
class Problem:
    """What every variant gets: tokens, the gradient of the output, and the weights, all of one dtype."""

    shape: Shape
    x_TD: Tensor
    grad_TD: Tensor
    router_ED: Tensor
    up_EHD: Tensor
    down_EDF: Tensor

    def float(self) -> Problem:
        """The same numbers in fp32."""
        tensors = (self.x_TD, self.grad_TD, self.router_ED, self.up_EHD, self.down_EDF)
        return Problem(self.shape, *(tensor.float() for tensor in tensors))


def make_problem(shape: Shape, num_tokens: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Problem:
    """Normal tokens, of which those are kept whose K-th and next logits differ by more than bf16 rounds away.

    So a router that computes its logits in bf16 decides as one in fp32 does. The load is near even.
    """
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(size, generator=random, device=device).mul_(std).to(dtype)

    E, D, F = shape.num_experts, shape.dim, shape.hidden_dim
    router_ED = normal(E, D, std=0.02)
    x_TD = normal(2 * num_tokens, D)
    best = (x_TD.float() @ router_ED.float().t()).topk(min(shape.top_k + 1, E), dim=-1).values
    clear_T = best[:, -2] - best[:, -1] > 2**-6 * best[:, -2].abs() if shape.top_k < E else best[:, 0] == best[:, 0]
    x_TD = x_TD[clear_T][:num_tokens].clone()
    assert len(x_TD) == num_tokens, "more than half of the tokens are near a tie; draw more of them"
    up_EHD, down_EDF = normal(E, 2 * F, D, std=0.02), normal(E, D, F, std=0.02)
    return Problem(shape, x_TD, normal(num_tokens, D), router_ED, up_EHD, down_EDF)


def described(problem: Problem, num_tokens: int) -> str:
    """The title of a table."""
    shape = problem.shape
    sizes = f"T={num_tokens} D={shape.dim} F={shape.hidden_dim} E={shape.num_experts} K={shape.top_k}"
    return f"{shape.name}: {sizes}, {str(problem.x_TD.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, eq=False)
class Layer:
    """A built variant. forward: (T, D) -> (T, D). gradients: of router, up and down (dense: up and down)."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    gradients: Callable[[], tuple[Tensor, ...]]


class LeftOutError(Exception):
    """This variant can't run here; the message says why and what would help."""


class Check(Protocol):
    """Raises LeftOutError when a variant can't be built for such a shape, so many tokens and such a type."""

    def __call__(self, shape: Shape, num_tokens: int, dtype: torch.dtype) -> None: ...  # noqa: D102


def always(shape: Shape, num_tokens: int, dtype: torch.dtype) -> None:
    """Can be built."""


@dataclass(frozen=True)
class Candidate:
    """A variant before it is built.

    computes: what it is compared with, a key of `TWINS`; variants of one kind must agree. trains: whether it has a
    backward pass. device: the only kind of device that it is for, as in "cuda"; None for any.
    """

    name: str
    computes: str
    build: Callable[[Problem], Layer]
    check: Check = always
    trains: bool = True
    device: str | None = None


# ---------------------------------------------------------------------------------------------- the plain reference


def plain_moe(problem: Problem) -> Layer:
    """A loop over experts in nothing but autograd: what the MoE variants are checked against, in fp32."""
    router, up, down = (nn.Parameter(w) for w in (problem.router_ED, problem.up_EHD, problem.down_EDF))

    def forward(x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = (x_TD @ router.t()).softmax(-1).topk(problem.shape.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        y_TD = torch.zeros_like(x_TD)
        for expert in range(problem.shape.num_experts):
            tokens, slots = (ids_TK == expert).nonzero(as_tuple=True)
            gate, value = (x_TD[tokens] @ up[expert].t()).chunk(2, dim=-1)
            out = (fn.silu(gate) * value) @ down[expert].t()
            y_TD = y_TD.index_add(0, tokens, out * weights_TK[tokens, slots, None])
        return y_TD

    module = nn.ParameterList([router, up, down])
    return Layer(module, forward, lambda: (grad_of(router), grad_of(up), grad_of(down)))


def grad_of(parameter: Tensor) -> Tensor:
    """Its gradient."""
    assert parameter.grad is not None, "the backward pass has not run"
    return parameter.grad
