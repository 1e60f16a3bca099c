"""The lean path on a GPU: the result of `lean_experts`, and the same tensors kept for backward, by Triton kernels.

Saved: x, the pre-activation z, the combine weights and index vectors (arXiv 2512.14080 section 3). Forward launches the
tile table, the first product with gather and activation, the second with the combine weight, and the sum of a token's
rows; backward the same way back, and one product per weight gradient. Rows of x and of the gradient are gathered into
memory in backward, for as long as they are used: two products read them, and read blocks faster than rows from
everywhere. Nothing waits for the host. The slow twins are `ops.reference.experts` and `ops.lean_experts`. Backward is
once differentiable. Measured: docs/gpu.md.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from equipoise.ops.activation import check_activation
from equipoise.ops.lean_experts import Operators, experts_by, fake_backward, fake_forward
from equipoise.ops.ragged import RaggedPlan
from equipoise.ops.triton import launch
from equipoise.ops.triton.needs import require
from equipoise.ops.triton.order import tiles_of


@torch.library.custom_op("equipoise::triton_forward", mutates_args=())
def triton_forward(
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
    require(x_TD.device, x_TD.dtype, (x_TD.shape[1], down_eDF.shape[2]))
    kind, num_rows = check_activation(activation), token_ids_R.shape[0]
    if num_rows == 0 or x_TD.shape[0] == 0:
        return x_TD.new_zeros(x_TD.shape), x_TD.new_empty(num_rows if save else 0, up_eHD.shape[1])
    tiles = tiles_of(counts_e, num_rows, x_TD.element_size())
    a_RF, z_RH = launch.up_rows(x_TD, token_ids_R, up_eHD, tiles, kind, save)
    y_RD = launch.product_of_rows(a_RF, down_eDF, tiles, tiles.cut.down, scale_R=weights_R)
    return launch.sum_of_rows(y_RD, token_ids_R, rows_TK, x_TD.shape[0], tiles), z_RH


triton_forward.register_fake(fake_forward)


@torch.library.custom_op("equipoise::triton_backward", mutates_args=())
def triton_backward(
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
    require(x_TD.device, x_TD.dtype, (x_TD.shape[1], down_eDF.shape[2]))
    kind, num_rows = check_activation(activation), token_ids_R.shape[0]
    if num_rows == 0 or x_TD.shape[0] == 0:
        return tuple(t.new_zeros(t.shape) for t in (x_TD, weights_R, up_eHD, down_eDF))  # type: ignore[return-value]
    tiles = tiles_of(counts_e, num_rows, x_TD.element_size())
    cut = tiles.cut
    grad_y_RD = grad_TD.index_select(0, token_ids_R)
    a_RF = launch.product_of_rows(grad_y_RD, down_eDF, tiles, cut.grad_a, transposed=True)
    grad_z_RH, grad_weights_R = launch.activation_backward(a_RF, z_RH, weights_R, tiles, kind)
    grad_down = launch.products_over_rows(grad_y_RD, a_RF, tiles)
    del grad_y_RD, a_RF
    grad_up = launch.products_over_rows(grad_z_RH, x_TD.index_select(0, token_ids_R), tiles)
    grad_x_RD = launch.product_of_rows(grad_z_RH, up_eHD, tiles, cut.grad_x, transposed=True)
    grad_x_TD = launch.sum_of_rows(grad_x_RD, token_ids_R, rows_TK, x_TD.shape[0], tiles)
    return grad_x_TD, grad_weights_R, grad_up, grad_down


triton_backward.register_fake(fake_backward)


def triton_experts(x_TD: Tensor, plan: RaggedPlan, up_eHD: Tensor, down_eDF: Tensor, activation: str) -> Tensor:
    """y_TD: each token's weighted sum over its experts. Same signature and result as `lean_experts`.

    x_TD, up_eHD, down_eDF share one dtype, fp32, bf16 or fp16, and are on a GPU, or anywhere under TRITON_INTERPRET=1.
    Raises ValueError where triton is missing, or can't run on these tensors.
    """
    x_TD, up_eHD, down_eDF = x_TD.contiguous(), up_eHD.contiguous(), down_eDF.contiguous()
    if plan.rows_TK is not None:
        plan = replace(plan, rows_TK=plan.rows_TK.contiguous())
    return experts_by(Operators(triton_forward, triton_backward), x_TD, plan, up_eHD, down_eDF, activation)
