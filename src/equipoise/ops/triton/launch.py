"""The kernels as functions of tensors: each allocates its result, sizes its grid from shapes, and launches.

Rows are those of the plan, R of them, with `Tiles` for which expert has which. All tensors are contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equipoise.ops.activation import Activation, is_gated
from equipoise.ops.count import count_assignments
from equipoise.ops.triton.blocks import Blocks
from equipoise.ops.triton.order import Tiles, power_of_two

_GROUP = 8  # tiles of rows that walk through the columns together
_ROW_BLOCK = 1024


def _options(blocks: Blocks) -> dict[str, int]:
    return {
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.cols,
        "BLOCK_K": blocks.inner,
        "GROUP": _GROUP,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _described(tensor: Tensor, *block: int) -> Any:
    """The tensor as blocks of the sizes given, one per dimension."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if tensor.data_ptr() % 16:  # a slice of something else
        tensor = tensor.clone()
    return TensorDescriptor.from_tensor(tensor, list(block))


def up_rows(
    x_TD: Tensor, token_ids_R: Tensor, up_eHD: Tensor, tiles: Tiles, activation: Activation, save: bool
) -> tuple[Tensor, Tensor]:
    """(a_RF, z_RH): the activated first product of each row, and z (empty unless save)."""
    from equipoise.ops.triton.kernels.products import up_kernel

    (num_rows,), (H, D), gated = token_ids_R.shape, up_eHD.shape[1:], is_gated(activation)
    F, blocks = H // 2 if gated else H, tiles.cut.up
    a_RF, z_RH = x_TD.new_empty(num_rows, F), x_TD.new_empty(num_rows if save else 0, H)
    up_kernel[(tiles.num_tiles * -(-F // blocks.cols),)](
        x_TD, token_ids_R, _described(up_eHD, 1, blocks.cols, blocks.inner), z_RH, a_RF, tiles.table, tiles.num_tiles,
        D, F, ACTIVATION=activation, GATED=gated, STORE_Z=save, **_options(blocks),
    )  # fmt: skip
    return a_RF, z_RH


def product_of_rows(
    rows_RK: Tensor,
    weight: Tensor,
    tiles: Tiles,
    blocks: Blocks,
    scale_R: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """(R, N): scale * rows W[e]^T for weights (e, N, K); with transposed they are (e, K, N)."""
    from equipoise.ops.triton.kernels.products import rows_kernel

    K, N = rows_RK.shape[1], weight.shape[2 if transposed else 1]
    out_RN = rows_RK.new_empty(rows_RK.shape[0], N)
    sides = (blocks.inner, blocks.cols) if transposed else (blocks.cols, blocks.inner)
    rows_kernel[(tiles.num_tiles * -(-N // blocks.cols),)](
        _described(rows_RK, blocks.rows, blocks.inner), _described(weight, 1, *sides),
        rows_RK if scale_R is None else scale_R, out_RN, tiles.table, tiles.num_tiles, N, K,
        TRANSPOSED=transposed, SCALED=scale_R is not None, **_options(blocks),
    )  # fmt: skip
    return out_RN


def activation_backward(
    grad_a_RF: Tensor, z_RH: Tensor, weights_R: Tensor, tiles: Tiles, activation: Activation
) -> tuple[Tensor, Tensor]:
    """(grad_z_RH, grad_weights_R), the last 0 for dropped rows. grad_a_RF becomes the weighted a_RF."""
    from equipoise.ops.triton.kernels.rows import activation_backward_kernel

    num_rows, F = grad_a_RF.shape
    grad_z_RH, grad_weights_R = torch.empty_like(z_RH), torch.empty_like(weights_R)
    activation_backward_kernel[(num_rows,)](
        grad_a_RF, z_RH, weights_R, grad_z_RH, grad_weights_R, tiles.ends_e, tiles.ends_e.shape[0], F,
        ACTIVATION=activation, GATED=is_gated(activation), BLOCK_F=min(_ROW_BLOCK, power_of_two(F)),
    )  # fmt: skip
    return grad_z_RH, grad_weights_R


def products_over_rows(left_RM: Tensor, right_RN: Tensor, tiles: Tiles) -> Tensor:
    """(e, M, N): left^T right over each expert's rows."""
    from equipoise.ops.triton.kernels.products import weights_kernel

    M, N, num_experts, blocks = left_RM.shape[1], right_RN.shape[1], tiles.ends_e.shape[0], tiles.cut.weights
    out_eMN = left_RM.new_empty(num_experts, M, N)
    weights_kernel[(-(-M // blocks.rows) * -(-N // blocks.cols), num_experts)](
        _described(left_RM, blocks.inner, blocks.rows), _described(right_RN, blocks.inner, blocks.cols),
        left_RM, right_RN, out_eMN, tiles.ends_e, M, N, **_options(blocks),
    )  # fmt: skip
    return out_eMN


def sum_of_rows(y_RD: Tensor, token_ids_R: Tensor, rows_TK: Tensor | None, num_tokens: int, tiles: Tiles) -> Tensor:
    """(T, D): each token's rows added up in a fixed order, the dropped ones left out.

    Without rows_TK a token's rows are found by a stable sort of token_ids_R.
    """
    from equipoise.ops.triton.kernels.rows import sum_kernel

    D, num_experts = y_RD.shape[1], tiles.ends_e.shape[0]
    out_TD = y_RD.new_empty(num_tokens, D)
    if rows_TK is None:
        rows = torch.argsort(token_ids_R, stable=True)
        token_ends_T = count_assignments(token_ids_R, num_tokens).cumsum(0)
    else:
        rows, token_ends_T = rows_TK, rows_TK
    block = min(_ROW_BLOCK, power_of_two(D))
    sum_kernel[(num_tokens, -(-D // block))](
        y_RD, rows, token_ends_T, out_TD, tiles.ends_e, num_experts, D, 0 if rows_TK is None else rows_TK.shape[1],
        RAGGED=rows_TK is None, BLOCK_D=block,
    )  # fmt: skip
    return out_TD
