"""Grouped products over tiles of rows: what is gathered, scaled or activated on the way is fused.

Products accumulate in fp32. Offsets of rows and experts are int64: E x 2F x D passes 2^31 in large models; within one
expert's matrix they are int32. fp32 inputs are multiplied in full precision, as torch does unless told otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from equipoise.ops.triton.kernels.activation import activate, activate_backward

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def add_product(left, right, total):
    """total + left right. The interpreter (Triton 3.9) takes the bits of bf16 for integers: it gets fp32, exactly."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def in_groups(program, num_m, num_n, GROUP: tl.constexpr):
    """(tile of rows, tile of columns): GROUP tiles of rows walk through the columns together, to share the cache."""
    first = program // (GROUP * num_n) * GROUP
    size = tl.minimum(num_m - first, GROUP)
    inside = program % (GROUP * num_n)
    return first + inside % size, inside // size


@triton.jit
def up_kernel(
    x_ptr, token_ids_ptr, up_ptr, z_ptr, a_ptr, table_ptr, num_tiles, D, F,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, STORE_Z: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """a (R, F) = activation(z), z (R, H) = x[token_ids] up[e]^T; both halves of z in one program. z where wanted."""
    tile, col = in_groups(tl.program_id(0), num_tiles, tl.cdiv(F, BLOCK_N), GROUP)
    expert = tl.load(table_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(table_ptr + num_tiles + tile) + tl.arange(0, BLOCK_M)
    row_mask = row < tl.load(table_ptr + 2 * num_tiles + tile)
    token = tl.load(token_ids_ptr + row, mask=row_mask, other=0).to(tl.int64)
    n = col * BLOCK_N + tl.arange(0, BLOCK_N)
    H = 2 * F if GATED else F
    weight_ptr = up_ptr + expert * H * D
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + token[:, None] * D + k[None, :], mask=row_mask[:, None] & (k[None, :] < D), other=0.0)
        weight_mask = (n[None, :] < F) & (k[:, None] < D)
        at = n[None, :] * D + k[:, None]
        gate = add_product(x, tl.load(weight_ptr + at, mask=weight_mask, other=0.0), gate)
        if GATED:
            up = add_product(x, tl.load(weight_ptr + F * D + at, mask=weight_mask, other=0.0), up)
    mask = row_mask[:, None] & (n[None, :] < F)
    row = row.to(tl.int64)
    if STORE_Z:
        z = z_ptr + row[:, None] * H + n[None, :]
        tl.store(z, gate.to(z_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(z + F, up.to(z_ptr.dtype.element_ty), mask=mask)
    a = activate(gate, up, ACTIVATION)
    tl.store(a_ptr + row[:, None] * F + n[None, :], a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rows_kernel(
    in_ptr, weight_ptr, scale_ptr, out_ptr, table_ptr, num_tiles, N, K,
    TRANSPOSED: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (R, N) = scale * in (R, K) W[e]^T; the weights are (e, N, K), with TRANSPOSED (e, K, N)."""
    tile, col = in_groups(tl.program_id(0), num_tiles, tl.cdiv(N, BLOCK_N), GROUP)
    expert = tl.load(table_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(table_ptr + num_tiles + tile) + tl.arange(0, BLOCK_M)
    row_mask = row < tl.load(table_ptr + 2 * num_tiles + tile)
    wide = row.to(tl.int64)
    n = col * BLOCK_N + tl.arange(0, BLOCK_N)
    of_expert = weight_ptr + expert * N * K
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        rows = tl.load(in_ptr + wide[:, None] * K + k[None, :], mask=row_mask[:, None] & (k[None, :] < K), other=0.0)
        at = k[:, None] * N + n[None, :] if TRANSPOSED else n[None, :] * K + k[:, None]
        weight = tl.load(of_expert + at, mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        total = add_product(rows, weight, total)
    if SCALED:
        total *= tl.load(scale_ptr + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + wide[:, None] * N + n[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (n[None, :] < N))


@triton.jit
def grad_z_kernel(
    grad_ptr, token_ids_ptr, down_ptr, z_ptr, scale_ptr, grad_z_ptr, a_ptr, partial_ptr, table_ptr, num_tiles, D, F,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """From dO[token_ids] down[e]: grad_z (R, H), scale * a (R, F), and each column tile's part of <dO down, a> (R, n).

    a is computed again from z; the parts, one per tile of columns, add up to the gradient of the combine weight.
    """
    num_cols = tl.cdiv(F, BLOCK_N)
    tile, col = in_groups(tl.program_id(0), num_tiles, num_cols, GROUP)
    expert = tl.load(table_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(table_ptr + num_tiles + tile) + tl.arange(0, BLOCK_M)
    row_mask = row < tl.load(table_ptr + 2 * num_tiles + tile)
    token = tl.load(token_ids_ptr + row, mask=row_mask, other=0).to(tl.int64)
    n = col * BLOCK_N + tl.arange(0, BLOCK_N)
    of_expert = down_ptr + expert * D * F
    grad_a = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        grad = tl.load(grad_ptr + token[:, None] * D + k[None, :], mask=row_mask[:, None] & (k[None, :] < D), other=0.0)
        at = k[:, None] * F + n[None, :]
        weight = tl.load(of_expert + at, mask=(n[None, :] < F) & (k[:, None] < D), other=0.0)
        grad_a = add_product(grad, weight, grad_a)
    H = 2 * F if GATED else F
    wide = row.to(tl.int64)
    mask = row_mask[:, None] & (n[None, :] < F)
    at_z = wide[:, None] * H + n[None, :]
    gate = tl.load(z_ptr + at_z, mask=mask, other=0.0).to(tl.float32)
    up = gate
    if GATED:
        up = tl.load(z_ptr + at_z + F, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    a, grad_gate, grad_up = activate_backward(grad_a * scale, gate, up, ACTIVATION)
    part = tl.sum(tl.where(mask, grad_a * a, 0.0), 1)
    tl.store(partial_ptr + wide * num_cols + col, part, mask=row_mask)
    tl.store(a_ptr + wide[:, None] * F + n[None, :], (a * scale).to(a_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_z_ptr + at_z, grad_gate.to(grad_z_ptr.dtype.element_ty), mask=mask)
    if GATED:
        tl.store(grad_z_ptr + at_z + F, grad_up.to(grad_z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weights_kernel(
    left_ptr, right_ptr, token_ids_ptr, out_ptr, ends_ptr, M, N,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (e, M, N) = left^T right over the rows of each expert; zeros where it has none.

    left: (R, M), or (T, M) read through token_ids; right likewise, with N.
    """
    tile, col = in_groups(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    expert = tl.program_id(1)
    first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = col * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(first, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        mask = row < end
        wide = row.to(tl.int64)
        token = tl.load(token_ids_ptr + row, mask=mask, other=0).to(tl.int64)
        of_left = token if GATHER_LEFT else wide
        of_right = token if GATHER_RIGHT else wide
        left = tl.load(left_ptr + of_left[None, :] * M + m[:, None], mask=mask[None, :] & (m[:, None] < M), other=0.0)
        right = tl.load(
            right_ptr + of_right[:, None] * N + n[None, :], mask=mask[:, None] & (n[None, :] < N), other=0.0
        )
        total = add_product(left, right, total)
    out = out_ptr + expert.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def sum_kernel(
    y_ptr, rows_ptr, token_ends_ptr, out_ptr, ends_ptr, num_experts, D, K,
    RAGGED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (T, D): the sum of each token's rows of y, in fp32, in a fixed order, without those that were dropped.

    rows: K per token; with RAGGED token t's are rows[token_ends[t - 1]:token_ends[t]].
    """
    token = tl.program_id(0)
    num_rows = tl.load(ends_ptr + num_experts - 1)
    first, end = token.to(tl.int64) * K, token.to(tl.int64) * K + K
    if RAGGED:
        first = tl.load(token_ends_ptr + token - 1, mask=token > 0, other=0)
        end = tl.load(token_ends_ptr + token)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for at in range(first, end):
        row = tl.load(rows_ptr + at)
        width = tl.where(row < num_rows, D, 0)  # 0: a dropped row
        total += tl.load(y_ptr + row * D + d, mask=d < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)
