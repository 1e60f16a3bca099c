"""The router's matrix product: fp32 whatever the model's dtype or autocast, without keeping an fp32 copy of x.

Near-ties of the top-k flip in low precision, so the logits are fp32. Written the plain way, autograd would keep
x.float() for the weight's gradient: 4 T D bytes, more than the experts' own input. Here x is kept as it is, and on a
CPU converted a few thousand rows at a time: a copy of all rows of a large batch is new memory from the system each
time, and writing to it first costs a good part of the product (docs/log.md).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

ROWS_AT_ONCE = 4096


def _no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Switches autocast off, where it is on; the meta device has none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    context: AbstractContextManager[None] = torch.autocast(device.type, enabled=False)
    return context


class _RouterLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.dtype = dtype
        return _logits(x_TD, weight_ED, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TD, weight_ED = ctx.saved_tensors
        with _no_autocast(x_TD.device):
            grad_TE = grads[0].to(ctx.dtype)
            weight, size = weight_ED.to(ctx.dtype), _rows_at_once(x_TD, ctx.dtype)
            grad_x = grad_w = None
            if ctx.needs_input_grad[0]:
                grad_x = torch.cat([(rows_tE @ weight).to(x_TD.dtype) for rows_tE in torch.split(grad_TE, size)])
            if ctx.needs_input_grad[1]:
                pairs = zip(torch.split(grad_TE, size), torch.split(x_TD, size), strict=True)
                parts = [rows_tE.t() @ rows_tD.to(ctx.dtype) for rows_tE, rows_tD in pairs]
                grad_w = torch.stack(parts).sum(0).to(weight_ED.dtype)
        return grad_x, grad_w, None


def _logits(x_TD: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> Tensor:
    with _no_autocast(x_TD.device):
        weight_DE, size = weight_ED.to(dtype).t(), _rows_at_once(x_TD, dtype)
        if x_TD.shape[0] <= size:
            return x_TD.to(dtype) @ weight_DE
        return torch.cat([rows_tD.to(dtype) @ weight_DE for rows_tD in torch.split(x_TD, size)])


def _rows_at_once(x_TD: Tensor, dtype: torch.dtype) -> int:
    """How many rows to convert together: all, but for large batches of another dtype on a CPU."""
    if x_TD.device.type != "cpu" or torch.compiler.is_compiling() or x_TD.dtype == dtype:
        return max(x_TD.shape[0], 1)
    return ROWS_AT_ONCE


def router_linear(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Logits (T, E) = x W^T in fp32 (fp64 for fp64 inputs), outside any autocast."""
    dtype = torch.promote_types(torch.promote_types(x_TD.dtype, weight_ED.dtype), torch.float32)
    if not torch.is_grad_enabled():
        return _logits(x_TD, weight_ED, dtype)
    logits_TE: Tensor = _RouterLinear.apply(x_TD, weight_ED, dtype)  # type: ignore[no-untyped-call]  # torch's
    return logits_TE
