"""The layers that are compared: equipoise, dense blocks of the same active arithmetic, and transformers' MoE block.

All MoE variants hold the same weights and route the same tokens alike. A further peer is one function here and one
line in `VARIANTS`. Nothing is timed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from equipoise import MoE, TopK
from equipoise.layer import FeedForward
from equipoise.layer.experts import BackendName

MAX_COPIED_BYTES = 2 * 2**30  # a variant that copies more weights than this per call is left out


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
}


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


def make_problem(shape: Shape, num_tokens: int, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Normal tokens, of which those are kept whose K-th and next logits differ by more than bf16 rounds away.

    So a router that computes its logits in bf16 decides as one in fp32 does. The load is near even.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(size, generator=random).mul_(std).to(dtype)

    E, D, F = shape.num_experts, shape.dim, shape.hidden_dim
    router_ED = normal(E, D, std=0.02)
    x_TD = normal(2 * num_tokens, D)
    best = (x_TD.float() @ router_ED.float().t()).topk(min(shape.top_k + 1, E), dim=-1).values
    clear_T = best[:, -2] - best[:, -1] > 2**-6 * best[:, -2].abs() if shape.top_k < E else best[:, 0] == best[:, 0]
    x_TD = x_TD[clear_T][:num_tokens].clone()
    assert len(x_TD) == num_tokens, "more than half of the tokens are near a tie; draw more of them"
    up_EHD, down_EDF = normal(E, 2 * F, D, std=0.02), normal(E, D, F, std=0.02)
    return Problem(shape, x_TD, normal(num_tokens, D), router_ED, up_EHD, down_EDF)


@dataclass(frozen=True, eq=False)
class Layer:
    """A built variant. forward: (T, D) -> (T, D). gradients: of router, up and down (dense: up and down)."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    gradients: Callable[[], tuple[Tensor, ...]]


class LeftOutError(Exception):
    """This variant can't run here; the message says why and what would help."""


@dataclass(frozen=True)
class Candidate:
    """A variant before it is built. computes: "moe" or "dense"; variants of one kind must agree.

    check: raises LeftOutError when it can't be built for this problem with so many tokens.
    """

    name: str
    computes: str
    build: Callable[[Problem], Layer]
    check: Callable[[Shape, int, torch.dtype], None] = lambda shape, num_tokens, dtype: None


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
    return Layer(module, forward, lambda: (_grad(router), _grad(up), _grad(down)))


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "the backward pass has not run"
    return parameter.grad


# ---------------------------------------------------------------------------------------------- equipoise


def equipoise_moe(problem: Problem, backend: BackendName) -> Layer:
    """`equipoise.MoE` with one of its backends."""
    shape = problem.shape
    with torch.device("meta"):
        module = MoE(shape.dim, shape.hidden_dim, shape.num_experts, router=TopK(k=shape.top_k), backend=backend)
    module.router.weight = nn.Parameter(problem.router_ED)
    module.experts.gate_up_proj = nn.Parameter(problem.up_EHD)
    module.experts.down_proj = nn.Parameter(problem.down_EDF)
    weights = (module.router.weight, module.experts.gate_up_proj, module.experts.down_proj)
    return Layer(module, module, lambda: tuple(_grad(weight) for weight in weights))


# ---------------------------------------------------------------------------------------------- dense blocks


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
    return Layer(module, module, lambda: (_grad(module.gate_up_proj.weight), _grad(module.down_proj.weight)))


def dense_split(problem: Problem) -> Layer:
    """SwiGLU with gate and up in a matrix each."""
    up_HD, down_DF = dense_weights(problem)
    gate, value = (nn.Parameter(half.clone()) for half in up_HD.chunk(2))
    down = nn.Parameter(down_DF)

    def forward(x_TD: Tensor) -> Tensor:
        return fn.linear(fn.silu(fn.linear(x_TD, gate)) * fn.linear(x_TD, value), down)

    module = nn.ParameterList([gate, value, down])
    return Layer(module, forward, lambda: (torch.cat([_grad(gate), _grad(value)]), _grad(down)))


# ---------------------------------------------------------------------------------------------- transformers


def transformers_block(problem: Problem, implementation: str) -> Layer:
    """transformers' Qwen3-MoE block, router included.

    Its experts are Mixtral's; its router casts the combine weights to the model's dtype, where Mixtral's leaves them
    in fp32 and makes the weighted sum of bf16 outputs the slower for it.
    """
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    shape = problem.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.dim,
        moe_intermediate_size=shape.hidden_dim,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    block.gate.weight = nn.Parameter(problem.router_ED)
    block.experts.gate_up_proj = nn.Parameter(problem.up_EHD)
    block.experts.down_proj = nn.Parameter(problem.down_EDF)
    weights = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    return Layer(block, lambda x_TD: block(x_TD[None])[0], lambda: tuple(_grad(weight) for weight in weights))


def needs_transformers(shape: Shape, num_tokens: int, dtype: torch.dtype) -> None:
    """Raise LeftOutError when the package is not there or too old."""
    try:
        from transformers import __version__ as version
    except ImportError:
        raise LeftOutError("transformers is not installed; pip install 'equipoise[bench]'") from None
    if int(version.split(".")[0]) < 5:
        raise LeftOutError(f"expected transformers 5 or newer, got {version}; pip install 'equipoise[bench]'")


def needs_memory_for_copies(shape: Shape, num_tokens: int, dtype: torch.dtype) -> None:
    """The same for an implementation that copies an expert's weights for each assignment."""
    needs_transformers(shape, num_tokens, dtype)
    copied = num_tokens * shape.top_k * 2 * shape.dim * shape.hidden_dim * dtype.itemsize
    if copied > MAX_COPIED_BYTES:
        raise LeftOutError(
            f"it copies weights for each assignment, {copied / 2**30:.0f} GiB with {num_tokens} {shape.name} tokens"
        )


VARIANTS = (
    Candidate("equipoise lean", "moe", partial(equipoise_moe, backend="lean")),
    Candidate("equipoise native", "moe", partial(equipoise_moe, backend="native")),  # lean where it can't run
    Candidate("equipoise grouped", "moe", partial(equipoise_moe, backend="grouped")),
    Candidate("dense, gate and up fused", "dense", dense_fused),
    Candidate("dense, gate and up split", "dense", dense_split),
    *(
        Candidate(f"transformers {name}", "moe", partial(transformers_block, implementation=name), check)
        for name, check in (
            ("eager", needs_transformers),
            ("grouped_mm", needs_transformers),
            ("batched_mm", needs_memory_for_copies),
        )
    ),
)
