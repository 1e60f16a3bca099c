"""Grouped products over tiles of rows: what is gathered, activated or scaled on the way is fused.

Products accumulate in fp32. What lies in memory as blocks is loaded through tensor descriptors, which the copy engine
of Hopper and later GPUs reads by itself (earlier ones compute addresses); what is gathered is loaded through pointers.
Beyond the edges of a matrix a descriptor gives zeros. fp32 inputs are multiplied in full precision, as torch does
unless told otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from equipoise.ops.triton.kernels.activation import activate

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


@triton.jit(do_not_specialize=["num_tiles"])
def up_kernel(
    x_ptr, token_ids_ptr, up_desc, z_ptr, a_ptr, table_ptr, num_tiles, D, F,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, STORE_Z: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """a (R, F) = activation(z), z (R, H) = x[token_ids] up[e]^T; both halves of z in one program. z where wanted."""
    tile, col = in_groups(tl.program_id(0), num_tiles, tl.cdiv(F, BLOCK_N), GROUP)
    expert = tl.load(table_ptr + tile)
    if expert < 0:
        return
    row = tl.load(table_ptr + num_tiles + tile) + tl.arange(0, BLOCK_M)
    row_mask = row < tl.load(table_ptr + 2 * num_tiles + tile)
    token = tl.load(token_ids_ptr + row, mask=row_mask, other=0).to(tl.int64)
    first = col * BLOCK_N
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + token[:, None] * D + k[None, :], mask=row_mask[:, None] & (k[None, :] < D), other=0.0)
        gate = add_product(x, up_desc.load([expert, first, start]).reshape(BLOCK_N, BLOCK_K).T, gate)
        if GATED:
            up = add_product(x, up_desc.load([expert, F + first, start]).reshape(BLOCK_N, BLOCK_K).T, up)
    n = first + tl.arange(0, BLOCK_N)
    mask = row_mask[:, None] & (n[None, :] < F)
    row = row.to(tl.int64)
    if STORE_Z:
        z = z_ptr + row[:, None] * (2 * F if GATED else F) + n[None, :]
        tl.store(z, gate.to(z_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(z + F, up.to(z_ptr.dtype.element_ty), mask=mask)
    a = activate(gate, up, ACTIVATION)
    tl.store(a_ptr + row[:, None] * F + n[None, :], a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tiles"])
def rows_kernel(
    in_desc, weight_desc, scale_ptr, out_ptr, table_ptr, num_tiles, N, K,
    TRANSPOSED: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (R, N) = scale * in (R, K) W[e]^T; the weights are (e, N, K), with TRANSPOSED (e, K, N).

    A tile's rows beyond its expert's last belong to others: they are computed, and not stored.
    """
    tile, col = in_groups(tl.program_id(0), num_tiles, tl.cdiv(N, BLOCK_N), GROUP)
    expert = tl.load(table_ptr + tile)
    if expert < 0:
        return
    first_row = tl.load(table_ptr + num_tiles + tile)
    first = col * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if TRANSPOSED:
            weight = weight_desc.load([expert, start, first]).reshape(BLOCK_K, BLOCK_N)
        else:
            weight = weight_desc.load([expert, first, start]).reshape(BLOCK_N, BLOCK_K).T
        total = add_product(in_desc.load([first_row, start]), weight, total)
    row = first_row + tl.arange(0, BLOCK_M)
    row_mask = row < tl.load(table_ptr + 2 * num_tiles + tile)
    if SCALED:
        total *= tl.load(scale_ptr + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    n = first + tl.arange(0, BLOCK_N)
    out = out_ptr + row.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (n[None, :] < N))


@triton.jit
def weights_kernel(
    left_desc, right_desc, left_ptr, right_ptr, out_ptr, ends_ptr, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (e, M, N) = left^T right over the rows of each expert, left (R, M), right (R, N); zeros where it has none.

    The last rows, fewer than a block, are loaded through pointers, with zeros in place of the next expert's.
    """
    tile, col = in_groups(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    expert = tl.program_id(1)
    first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    whole = first + (end - first) // BLOCK_K * BLOCK_K
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = col * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(first, whole, BLOCK_K):
        left = left_desc.load([start, tile * BLOCK_M])
        total = add_product(left.T, right_desc.load([start, col * BLOCK_N]), total)
    if whole < end:
        row = whole + tl.arange(0, BLOCK_K)
        mask = (row < end)[:, None]
        wide = row.to(tl.int64)[:, None]
        left = tl.load(left_ptr + wide * M + m[None, :], mask=mask & (m[None, :] < M), other=0.0)
        right = tl.load(right_ptr + wide * N + n[None, :], mask=mask & (n[None, :] < N), other=0.0)
        total = add_product(left.T, right, total)
    out = out_ptr + expert.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))
