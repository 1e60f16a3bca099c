"""Expert matmuls through PyTorch's grouped_mm, differentiated by autograd: one kernel launch for all experts.

It keeps the gathered rows, the pre-activation, the activation and the outputs, several times the memory of
`ops.lean_experts`. The operator is wrapped, because its own meta kernel takes only bf16 (so fp32 would not
compile), it wants contiguous gradients, and rows past the last group come back uninitialised, in value and gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equipoise.ops.activation import activate, check_activation
from equipoise.ops.ragged import RaggedPlan, sum_rows


@torch.library.custom_op("equipoise::grouped_mm", mutates_args=())
def grouped_mm(x_RD: Tensor, weight_eHD: Tensor, ends_e: Tensor) -> Tensor:
    """(R, H): x W[e]^T for the rows of each expert; ends_e: int32 cumulative row counts. Rows past the last are 0."""
    if x_RD.shape[0] == 0:
        return x_RD.new_empty(0, weight_eHD.shape[1])
    y_RH: Tensor = torch._grouped_mm(x_RD, weight_eHD.transpose(1, 2), offs=ends_e)
    return _zero_tail(y_RH, ends_e)


@grouped_mm.register_fake
def _(x_RD: Tensor, weight_eHD: Tensor, ends_e: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], weight_eHD.shape[1])


@torch.library.custom_op("equipoise::grouped_mm_backward", mutates_args=())
def grouped_mm_backward(grad_RH: Tensor, x_RD: Tensor, weight_eHD: Tensor, ends_e: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    if x_RD.shape[0] == 0:  # the kernel refuses the strides of an empty matrix
        return torch.empty_like(x_RD), weight_eHD.new_zeros(weight_eHD.shape)
    grad_x: Tensor = torch._grouped_mm(grad_RH, weight_eHD, offs=ends_e)
    grad_w: Tensor = torch._grouped_mm(grad_RH.t(), x_RD, offs=ends_e)
    return _zero_tail(grad_x, ends_e), grad_w


@grouped_mm_backward.register_fake
def _(grad_RH: Tensor, x_RD: Tensor, weight_eHD: Tensor, ends_e: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_RD), weight_eHD.new_empty(weight_eHD.shape)  # contiguous, also for a transposed view


def _zero_tail(rows: Tensor, ends_e: Tensor) -> Tensor:
    beyond_R1 = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1) >= ends_e[-1]
    return rows.masked_fill(beyond_R1, 0)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_x, grad_w = grouped_mm_backward(grad_RH.contiguous(), *ctx.saved_tensors)
    return grad_x, grad_w, None


grouped_mm.register_autograd(_backward, setup_context=_save)


def grouped_mm_supports(x_TD: Tensor, up_eHD: Tensor, down_eDF: Tensor) -> str | None:
    """None when grouped_mm takes these tensors; else the reason why not."""
    if x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped_mm has no {x_TD.dtype} kernel"
    for name, width in (("dim", x_TD.shape[1]), ("hidden_dim", down_eDF.shape[2]), ("up", up_eHD.shape[1])):
        if width * x_TD.element_size() % 16:
            return f"grouped_mm needs strides of whole 16 bytes, {name} = {width} in {x_TD.dtype} is not"
    return None


def grouped_experts(x_TD: Tensor, plan: RaggedPlan, up_eHD: Tensor, down_eDF: Tensor, activation: str) -> Tensor:
    """y_TD: each token's weighted sum over its experts. Same signature and result as `lean_experts`.

    Raises ValueError for a dtype or width that grouped_mm does not take.
    """
    if reason := grouped_mm_supports(x_TD, up_eHD, down_eDF):
        raise ValueError(f'backend="grouped": {reason}; use backend="lean"')
    ends_e = plan.counts_e.cumsum(0).to(torch.int32)
    z_RH = grouped_mm(x_TD[plan.token_ids_R], up_eHD, ends_e)
    a_RF = activate(z_RH, check_activation(activation)) * plan.weights_R.to(x_TD.dtype).unsqueeze(1)
    y_RD = grouped_mm(a_RF, down_eDF, ends_e)
    return sum_rows(y_RD, plan.token_ids_R, plan.rows_TK, x_TD.shape[0])
