"""Expert matmuls that keep almost nothing for the backward pass.

Saved: x, the pre-activation z, the combine weights and index vectors: 2 T D + 4 T K F bytes in bf16 with SwiGLU.
Recomputed: the gathered rows and the activation. Never kept: the experts' outputs, because the combine weight's
gradient is  ds = <dO W2^T, a>  row by row (arXiv 2512.14080; Dao-AILab/sonic-moe:sonicmoe/functional/__init__.py).
The slow twin is `ops.reference.experts`. Backward is once differentiable.

One expert at a time: its rows are gathered, multiplied and activated while they are still in the cache, and
temporaries are small enough for the allocator to reuse (a fresh large block costs more in page faults than the
arithmetic done on it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equipoise.ops.activation import activate, activate_backward, check_activation, recompute
from equipoise.ops.fresh import fresh
from equipoise.ops.ragged import RaggedPlan, sum_rows

_TILE = 32  # rows


def segments(counts_e: Tensor, num_rows: int, dtype: torch.dtype) -> Iterator[tuple[int, slice, slice]]:
    """(expert, its rows, the same rounded up to a whole tile) for each expert that has rows, in ascending order.

    A low-precision product on a CPU is compiled anew for each number of rows, which takes longer than the product
    itself, and experts never have the same number twice. In tiles there are few numbers. The rows beyond its own
    belong to the next expert: they are computed with weight 0, and overwritten when it is that expert's turn.
    """
    tile = _TILE if dtype in (torch.bfloat16, torch.float16) else 1
    start = 0
    for expert, count in enumerate(counts_e.tolist()):
        if count:
            tiled = count if count < tile else -(-count // tile) * tile
            yield expert, slice(start, start + count), slice(start, min(start + tiled, num_rows))
        start += count


def scales(weights_R: Tensor, rows: slice, tiled: slice, dtype: torch.dtype) -> Tensor:
    """(n, 1): the weights of `rows`, and 0 for the rest of their tiles."""
    weights_n = weights_R[rows].to(dtype)
    return torch.nn.functional.pad(weights_n, (0, tiled.stop - rows.stop)).unsqueeze(1)


@torch.library.custom_op("equipoise::lean_forward", mutates_args=())
def lean_forward(
    x_TD: Tensor,
    weights_R: Tensor,
    up_eHD: Tensor,
    down_eDF: Tensor,
    token_ids_R: Tensor,
    rows_TK: Tensor | None,
    counts_e: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """(y_TD, z_RH): weighted sum of the experts' outputs, and the pre-activation (empty unless save)."""
    kind = check_activation(activation)
    num_rows = token_ids_R.shape[0]
    z_RH = fresh((num_rows if save else 0, up_eHD.shape[1]), x_TD)
    y_RD = fresh((num_rows, x_TD.shape[1]), x_TD)
    end = 0
    for expert, rows, tiled in segments(counts_e, num_rows, x_TD.dtype):
        x_n = x_TD.index_select(0, token_ids_R[tiled])
        z_n = torch.mm(x_n, up_eHD[expert].t(), out=z_RH[tiled]) if save else torch.mm(x_n, up_eHD[expert].t())
        a_n = activate(z_n, kind).mul_(scales(weights_R, rows, tiled, x_TD.dtype))
        torch.mm(a_n, down_eDF[expert].t(), out=y_RD[tiled])
        end = rows.stop
    y_RD[end:].zero_()  # dropped rows
    return sum_rows(y_RD, token_ids_R, rows_TK, x_TD.shape[0]), z_RH


@lean_forward.register_fake
def fake_forward(
    x_TD: Tensor,
    weights_R: Tensor,
    up_eHD: Tensor,
    down_eDF: Tensor,
    token_ids_R: Tensor,
    rows_TK: Tensor | None,
    counts_e: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """What `lean_forward` returns, without values."""
    return torch.empty_like(x_TD), x_TD.new_empty(token_ids_R.shape[0] if save else 0, up_eHD.shape[1])


@torch.library.custom_op("equipoise::lean_backward", mutates_args=())
def lean_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    z_RH: Tensor,
    weights_R: Tensor,
    up_eHD: Tensor,
    down_eDF: Tensor,
    token_ids_R: Tensor,
    rows_TK: Tensor | None,
    counts_e: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, up and down."""
    kind = check_activation(activation)
    num_rows = token_ids_R.shape[0]
    grad_x_RD = fresh((num_rows, x_TD.shape[1]), x_TD)
    grad_weights_R = torch.zeros_like(weights_R)
    grad_up, grad_down = fresh(up_eHD.shape, up_eHD), fresh(down_eDF.shape, down_eDF)
    idle, end = set(range(up_eHD.shape[0])), 0
    for expert, rows, tiled in segments(counts_e, num_rows, x_TD.dtype):
        tokens_n, z_n, scale_n1 = token_ids_R[tiled], z_RH[tiled], scales(weights_R, rows, tiled, x_TD.dtype)
        grad_y_n = grad_TD.index_select(0, tokens_n)
        grad_a_n = torch.mm(grad_y_n, down_eDF[expert])
        a_n, saved_n = recompute(z_n, kind)
        n = rows.stop - rows.start
        torch.sum(grad_a_n[:n] * a_n[:n], 1, dtype=weights_R.dtype, out=grad_weights_R[rows])
        torch.mm(grad_y_n.t(), a_n.mul_(scale_n1), out=grad_down[expert])
        grad_z_n = activate_backward(grad_a_n.mul_(scale_n1), z_n, saved_n, kind)
        torch.mm(grad_z_n, up_eHD[expert], out=grad_x_RD[tiled])
        torch.mm(grad_z_n.t(), x_TD.index_select(0, tokens_n), out=grad_up[expert])
        idle.discard(expert)
        end = rows.stop
    for expert in idle:  # a zero gradient, not None and not garbage: optimizers and reductions expect one
        grad_up[expert].zero_()
        grad_down[expert].zero_()
    grad_x_RD[end:].zero_()
    return sum_rows(grad_x_RD, token_ids_R, rows_TK, x_TD.shape[0]), grad_weights_R, grad_up, grad_down


@lean_backward.register_fake
def fake_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    z_RH: Tensor,
    weights_R: Tensor,
    up_eHD: Tensor,
    down_eDF: Tensor,
    token_ids_R: Tensor,
    rows_TK: Tensor | None,
    counts_e: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `lean_backward` returns, without values."""
    return (
        torch.empty_like(x_TD),
        torch.empty_like(weights_R),
        torch.empty_like(up_eHD),
        torch.empty_like(down_eDF),
    )


class _LeanExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operators: Operators,
        x_TD: Tensor,
        weights_R: Tensor,
        up_eHD: Tensor,
        down_eDF: Tensor,
        token_ids_R: Tensor,
        rows_TK: Tensor | None,
        counts_e: Tensor,
        activation: str,
    ) -> Tensor:
        y_TD, z_RH = operators.forward(
            x_TD, weights_R, up_eHD, down_eDF, token_ids_R, rows_TK, counts_e, activation, save=True
        )
        ctx.save_for_backward(x_TD, z_RH, weights_R, up_eHD, down_eDF, token_ids_R, rows_TK, counts_e)
        ctx.activation, ctx.operator = activation, operators.backward
        return y_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.operator(grads[0].contiguous(), *ctx.saved_tensors, ctx.activation)
        return None, *gradients, None, None, None, None


class Operators(NamedTuple):
    """A forward and the backward that belongs to it, of the signatures of `lean_forward` and `lean_backward`."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def lean_experts(x_TD: Tensor, plan: RaggedPlan, up_eHD: Tensor, down_eDF: Tensor, activation: str) -> Tensor:
    """y_TD: each token's weighted sum over its experts. H = 2F for swiglu, F for gelu.

    x_TD, up_eHD, down_eDF share one floating dtype (fp16 has no fast CPU path); plan.weights_R is fp32 or fp64.
    """
    return experts_by(Operators(lean_forward, lean_backward), x_TD, plan, up_eHD, down_eDF, activation)


def experts_by(
    operators: Operators, x_TD: Tensor, plan: RaggedPlan, up_eHD: Tensor, down_eDF: Tensor, activation: str
) -> Tensor:
    """The same by other operators that keep the same for backward."""
    args = (x_TD, plan.weights_R, up_eHD, down_eDF, plan.token_ids_R, plan.rows_TK, plan.counts_e, activation)
    if torch.is_grad_enabled() and any(t.requires_grad for t in args[:4] if isinstance(t, Tensor)):
        y_TD: Tensor = _LeanExperts.apply(operators, *args)  # type: ignore[no-untyped-call]  # torch's
    else:
        y_TD, _ = operators.forward(*args, save=False)
    return y_TD
