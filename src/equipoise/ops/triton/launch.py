"""The kernels as functions of tensors: each allocates its result, sizes its grid from shapes, and launches.

Rows are those of the plan, R of them, with `Tiles` for which expert has which. All tensors are contiguous.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from equipoise.ops.activation import Activation, is_gated
from equipoise.ops.count import count_assignments
from equipoise.ops.triton.order import Tiles, power_of_two

_GROUP = 8  # tiles of rows that walk through the columns together
_SUM_BLOCK = 1024


def _kernels() -> ModuleType:
    from equipoise.ops.triton.kernels import products

    return products


def _options(tiles: Tiles) -> dict[str, int]:
    blocks = tiles.blocks
    return {
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.cols,
        "BLOCK_K": blocks.inner,
        "GROUP": _GROUP,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def up_rows(
    x_TD: Tensor, token_ids_R: Tensor, up_eHD: Tensor, tiles: Tiles, activation: Activation, save: bool
) -> tuple[Tensor, Tensor]:
    """(a_RF, z_RH): the activated first product of each row, and z (empty unless save)."""
    (num_rows,), (H, D), gated = token_ids_R.shape, up_eHD.shape[1:], is_gated(activation)
    F = H // 2 if gated else H
    a_RF, z_RH = x_TD.new_empty(num_rows, F), x_TD.new_empty(num_rows if save else 0, H)
    grid = (tiles.num_tiles * -(-F // tiles.blocks.cols),)
    _kernels().up_kernel[grid](
        x_TD, token_ids_R, up_eHD, z_RH, a_RF, tiles.table, tiles.num_tiles, D, F,
        ACTIVATION=activation, GATED=gated, STORE_Z=save, **_options(tiles),
    )  # fmt: skip
    return a_RF, z_RH


def product_of_rows(
    rows_RK: Tensor, weight: Tensor, tiles: Tiles, scale_R: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """(R, N): scale * rows W[e]^T for weights (e, N, K); with transposed they are (e, K, N)."""
    N = weight.shape[2 if transposed else 1]
    out_RN = rows_RK.new_empty(rows_RK.shape[0], N)
    grid = (tiles.num_tiles * -(-N // tiles.blocks.cols),)
    _kernels().rows_kernel[grid](
        rows_RK, weight, rows_RK if scale_R is None else scale_R, out_RN, tiles.table, tiles.num_tiles,
        N, rows_RK.shape[1], TRANSPOSED=transposed, SCALED=scale_R is not None, **_options(tiles),
    )  # fmt: skip
    return out_RN


def grad_z_rows(
    grad_TD: Tensor, token_ids_R: Tensor, down_eDF: Tensor, z_RH: Tensor, weights_R: Tensor, tiles: Tiles,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_z_RH, weighted a_RF, grad_weights_R), the last in the dtype of weights_R; 0 for dropped rows."""
    (num_rows,), (D, F) = token_ids_R.shape, down_eDF.shape[1:]
    num_cols = -(-F // tiles.blocks.cols)
    grad_z_RH, a_RF = torch.empty_like(z_RH), z_RH.new_empty(num_rows, F)
    parts = torch.zeros(num_rows, num_cols, dtype=torch.float32, device=z_RH.device)
    _kernels().grad_z_kernel[(tiles.num_tiles * num_cols,)](
        grad_TD, token_ids_R, down_eDF, z_RH, weights_R, grad_z_RH, a_RF, parts, tiles.table, tiles.num_tiles, D, F,
        ACTIVATION=activation, GATED=is_gated(activation), **_options(tiles),
    )  # fmt: skip
    return grad_z_RH, a_RF, parts.sum(1).to(weights_R.dtype)


def products_over_rows(
    left: Tensor,
    right: Tensor,
    token_ids_R: Tensor,
    tiles: Tiles,
    gather_left: bool = False,
    gather_right: bool = False,
) -> Tensor:
    """(e, M, N): left^T right over each expert's rows. What is gathered has a row per token, else one per row."""
    M, N, num_experts = left.shape[1], right.shape[1], tiles.ends_e.shape[0]
    side = max(64, tiles.blocks.rows)
    out_eMN = left.new_empty(num_experts, M, N)
    options = _options(tiles) | {"BLOCK_M": side, "BLOCK_N": 64, "BLOCK_K": min(64, max(16, tiles.blocks.rows))}
    grid = (-(-M // side) * -(-N // 64), num_experts)
    _kernels().weights_kernel[grid](
        left, right, token_ids_R, out_eMN, tiles.ends_e, M, N, GATHER_LEFT=gather_left, GATHER_RIGHT=gather_right,
        **options,
    )  # fmt: skip
    return out_eMN


def sum_of_rows(y_RD: Tensor, token_ids_R: Tensor, rows_TK: Tensor | None, num_tokens: int, tiles: Tiles) -> Tensor:
    """(T, D): each token's rows added up in a fixed order, the dropped ones left out.

    Without rows_TK a token's rows are found by a stable sort of token_ids_R.
    """
    D, num_experts = y_RD.shape[1], tiles.ends_e.shape[0]
    out_TD = y_RD.new_empty(num_tokens, D)
    if rows_TK is None:
        rows = torch.argsort(token_ids_R, stable=True)
        token_ends_T = count_assignments(token_ids_R, num_tokens).cumsum(0)
    else:
        rows, token_ends_T = rows_TK, rows_TK
    block = min(_SUM_BLOCK, power_of_two(D))
    _kernels().sum_kernel[(num_tokens, -(-D // block))](
        y_RD, rows, token_ends_T, out_TD, tiles.ends_e, num_experts, D, 0 if rows_TK is None else rows_TK.shape[1],
        RAGGED=rows_TK is None, BLOCK_D=block,
    )  # fmt: skip
    return out_TD
