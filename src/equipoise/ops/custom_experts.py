"""Expert matmuls for experts of somebody else's make: any activation, given as a function, biases, either layout.

    y = (activation(x W1^T + b1) W2^T + b2) * weight

`lean_custom_experts` keeps what `ops.lean_experts` keeps, x, z = x W1^T + b1, weights and indices, and computes the
activation again in backward, differentiated by autograd. The combine weight's gradient is ds = <dO W2^T, a> + <dO, b2>.
`grouped_custom_experts` has no loop over experts, for a GPU and for `torch.compile`, and keeps everything.
Weights that want no gradient, frozen under an adapter, cost none in the lean one: neither products nor memory.
The activation must be a function of its argument alone: it is called once more, and nothing else gets a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.ops.fresh import fresh
from equipoise.ops.grouped_experts import grouped_mm, grouped_mm_supports
from equipoise.ops.lean_experts import scales, segments
from equipoise.ops.ragged import RaggedPlan, sum_rows

Activation = Callable[[Tensor], Tensor]  # (n, H) -> (n, F), row by row


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """Stacked weights of one floating dtype. The projections may be transposed views of what is stored.

    up_eHD, down_eDF: W1 and W2. up_bias_eH, down_bias_eD: b1 and b2, both or none.
    """

    up_eHD: Tensor
    down_eDF: Tensor
    up_bias_eH: Tensor | None = None
    down_bias_eD: Tensor | None = None


def lean_custom_experts(x_TD: Tensor, plan: RaggedPlan, weights: ExpertWeights, activation: Activation) -> Tensor:
    """y_TD: each token's weighted sum over its experts. x_TD has the weights' dtype; plan.weights_R is fp32 or fp64.

    It reads the counts on the host, which waits for a GPU and has no place in a graph of `torch.compile`. Once
    differentiable.
    """
    parameters = (weights.up_eHD, weights.down_eDF, weights.up_bias_eH, weights.down_bias_eD)
    tensors = (x_TD, plan.weights_R, *parameters)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y_TD: Tensor = _LeanCustom.apply(activation, plan, *tensors)  # type: ignore[no-untyped-call]  # torch's
        return y_TD
    return _forward(x_TD, plan, weights, activation, save=False)[0]


def _forward(
    x_TD: Tensor, plan: RaggedPlan, weights: ExpertWeights, activation: Activation, save: bool
) -> tuple[Tensor, Tensor]:
    """(y_TD, z_RH): z is empty unless save. One expert at a time, as in `ops.lean_experts`."""
    up_eHD, down_eDF = weights.up_eHD, weights.down_eDF
    num_rows = len(plan.token_ids_R)
    z_RH = fresh((num_rows if save else 0, up_eHD.shape[1]), x_TD)
    y_RD = fresh((num_rows, x_TD.shape[1]), x_TD)
    end = 0
    for expert, rows, tiled in segments(plan.counts_e, num_rows, x_TD.dtype):
        x_n = x_TD.index_select(0, plan.token_ids_R[tiled])
        z_n = torch.mm(x_n, up_eHD[expert].t(), out=z_RH[tiled]) if save else torch.mm(x_n, up_eHD[expert].t())
        if weights.up_bias_eH is not None:
            z_n.add_(weights.up_bias_eH[expert])
        scale_n1 = scales(plan.weights_R, rows, tiled, x_TD.dtype)
        y_n = torch.mm(activation(z_n).to(x_TD.dtype) * scale_n1, down_eDF[expert].t(), out=y_RD[tiled])
        if weights.down_bias_eD is not None:
            y_n.addcmul_(scale_n1, weights.down_bias_eD[expert])
        end = rows.stop
    y_RD[end:].zero_()  # dropped rows
    return sum_rows(y_RD, plan.token_ids_R, plan.rows_TK, x_TD.shape[0]), z_RH


class _LeanCustom(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        plan: RaggedPlan,
        x_TD: Tensor,
        weights_R: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        up, down, up_bias, down_bias = parameters
        assert up is not None
        assert down is not None
        y_TD, z_RH = _forward(x_TD, plan, ExpertWeights(up, down, up_bias, down_bias), activation, save=True)
        ctx.save_for_backward(
            x_TD, z_RH, weights_R, plan.token_ids_R, plan.rows_TK, plan.counts_e, up, down, up_bias, down_bias
        )
        ctx.activation = activation
        return y_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, z_RH, weights_R, token_ids_R, rows_TK, counts_e, *parameters = ctx.saved_tensors
        plan = RaggedPlan(token_ids_R, weights_R, counts_e, rows_TK)
        weights = ExpertWeights(*parameters)
        wanted = ctx.needs_input_grad[4:]
        return None, None, *_backward(grads[0].contiguous(), x_TD, z_RH, plan, weights, ctx.activation, wanted)


def _backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    z_RH: Tensor,
    plan: RaggedPlan,
    weights: ExpertWeights,
    activation: Activation,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weights_R, up, down and the two biases; of the last four those that are wanted."""
    grad_x_RD, grad_weights_R = fresh((len(z_RH), x_TD.shape[1]), x_TD), torch.zeros_like(plan.weights_R)
    # Laid out like what is stored, so that a transposed view's gradient need not be copied into place.
    parameters = (weights.up_eHD, weights.down_eDF, weights.up_bias_eH, weights.down_bias_eD)
    grad_up, grad_down, grad_up_bias, grad_down_bias = (
        torch.zeros_like(each) if want and each is not None else None
        for each, want in zip(parameters, wanted, strict=True)
    )
    end = 0
    for expert, rows, tiled in segments(plan.counts_e, len(z_RH), x_TD.dtype):
        n, tokens_n = rows.stop - rows.start, plan.token_ids_R[tiled]
        scale_n1 = scales(plan.weights_R, rows, tiled, x_TD.dtype)
        grad_y_n, dtype = grad_TD.index_select(0, tokens_n), grad_weights_R.dtype
        grad_a_n = torch.mm(grad_y_n, weights.down_eDF[expert])
        with torch.enable_grad():
            z_n = z_RH[tiled].detach().requires_grad_()
            a_n = activation(z_n).to(x_TD.dtype)
        torch.sum(grad_a_n[:n] * a_n.detach()[:n], 1, dtype=dtype, out=grad_weights_R[rows])
        if weights.down_bias_eD is not None:
            grad_weights_R[rows] += torch.mv(grad_y_n[:n], weights.down_bias_eD[expert]).to(dtype)
        if grad_down_bias is not None:
            torch.sum(grad_y_n * scale_n1, 0, out=grad_down_bias[expert])
        if grad_down is not None:
            torch.mm(grad_y_n.t(), a_n.detach() * scale_n1, out=grad_down[expert])
        (grad_z_n,) = torch.autograd.grad(a_n, z_n, grad_a_n * scale_n1)
        if grad_up_bias is not None:
            torch.sum(grad_z_n, 0, out=grad_up_bias[expert])
        if grad_up is not None:
            torch.mm(grad_z_n.t(), x_TD.index_select(0, tokens_n), out=grad_up[expert])
        torch.mm(grad_z_n, weights.up_eHD[expert], out=grad_x_RD[tiled])
        end = rows.stop
    grad_x_RD[end:].zero_()
    grad_x = sum_rows(grad_x_RD, plan.token_ids_R, plan.rows_TK, x_TD.shape[0])
    return grad_x, grad_weights_R, grad_up, grad_down, grad_up_bias, grad_down_bias


def grouped_custom_experts(x_TD: Tensor, plan: RaggedPlan, weights: ExpertWeights, activation: Activation) -> Tensor:
    """y_TD, as `lean_custom_experts`. It never waits for the device.

    Raises ValueError for a dtype or width that grouped_mm does not take.
    """
    up_eHD, down_eDF = weights.up_eHD, weights.down_eDF
    if reason := grouped_mm_supports(x_TD, up_eHD, down_eDF):
        raise ValueError(f"grouped experts: {reason}; use lean_custom_experts")
    ends_e = plan.counts_e.cumsum(0)
    rows_R = torch.arange(len(plan.token_ids_R), device=x_TD.device)
    experts_R = torch.searchsorted(ends_e, rows_R, right=True).clamp(max=len(ends_e) - 1)
    z_RH = grouped_mm(x_TD[plan.token_ids_R], up_eHD, ends_e.to(torch.int32))
    if weights.up_bias_eH is not None:
        z_RH = z_RH + _row_by_row(weights.up_bias_eH, experts_R)
    y_RD = grouped_mm(activation(z_RH).to(x_TD.dtype), down_eDF, ends_e.to(torch.int32))
    if weights.down_bias_eD is not None:
        y_RD = y_RD + _row_by_row(weights.down_bias_eD, experts_R)
    weights_R = plan.weights_R.masked_fill(rows_R >= ends_e[-1], 0)  # dropped rows have a bias by now
    return sum_rows(y_RD * weights_R.to(x_TD.dtype).unsqueeze(1), plan.token_ids_R, plan.rows_TK, x_TD.shape[0])


def _row_by_row(bias_eH: Tensor, experts_R: Tensor) -> Tensor:
    """(R, H): each row's bias. Its gradient, a sum over the rows of an expert, is added up in fp32, not in bf16."""
    wide = torch.promote_types(bias_eH.dtype, torch.float32)
    return bias_eH.to(wide)[experts_R].to(bias_eH.dtype)
