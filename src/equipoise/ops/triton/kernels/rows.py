"""What is done to rows between the products, bound by memory: the activation's backward, and the sum over a token."""

from __future__ import annotations

import triton
import triton.language as tl

from equipoise.ops.triton.kernels.activation import activate_backward


@triton.jit
def activation_backward_kernel(
    grad_a_ptr, z_ptr, scale_ptr, grad_z_ptr, grad_scale_ptr, ends_ptr, num_experts, F,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """A row: from grad_a = dO down[e], the gradient of the scaled experts' output by a: grad_z, <grad_a, a>, scale * a.

    The last takes the place of grad_a; a is computed again from z. Rows beyond the last expert's get a gradient of 0
    for their scale, and nothing else.
    """
    row = tl.program_id(0)
    if row >= tl.load(ends_ptr + num_experts - 1):
        tl.store(grad_scale_ptr + row, 0.0)
        return
    scale = tl.load(scale_ptr + row).to(tl.float32)
    wide = row.to(tl.int64)
    total = tl.zeros((BLOCK_F,), dtype=tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        mask = f < F
        at_a = grad_a_ptr + wide * F + f
        at_z = wide * (2 * F if GATED else F) + f
        grad_a = tl.load(at_a, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(z_ptr + at_z, mask=mask, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up = tl.load(z_ptr + at_z + F, mask=mask, other=0.0).to(tl.float32)
        a, grad_gate, grad_up = activate_backward(grad_a * scale, gate, up, ACTIVATION)
        total += grad_a * a
        tl.store(at_a, (a * scale).to(grad_a_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_z_ptr + at_z, grad_gate.to(grad_z_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(grad_z_ptr + at_z + F, grad_up.to(grad_z_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_scale_ptr + row, tl.sum(total, 0).to(grad_scale_ptr.dtype.element_ty))


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
