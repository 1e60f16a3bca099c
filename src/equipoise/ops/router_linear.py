"""The router's matrix product: fp32 whatever the model's dtype or autocast, without keeping an fp32 copy of x.

Near-ties of the top-k flip in low precision, so the logits are fp32. Written the plain way, autograd would keep
x.float() for the weight's gradient: 4 T D bytes, more than the experts' own input. Here x is kept as it is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def _no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Switches autocast off; the meta device has none."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    context: AbstractContextManager[None] = torch.autocast(device.type, enabled=False)
    return context


class _RouterLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.dtype = dtype
        with _no_autocast(x_TD.device):
            return x_TD.to(dtype) @ weight_ED.to(dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TD, weight_ED = ctx.saved_tensors
        with _no_autocast(x_TD.device):
            grad_TE = grads[0].to(ctx.dtype)
            grad_x = (grad_TE @ weight_ED.to(ctx.dtype)).to(x_TD.dtype) if ctx.needs_input_grad[0] else None
            grad_w = (grad_TE.t() @ x_TD.to(ctx.dtype)).to(weight_ED.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None


def router_linear(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Logits (T, E) = x W^T in fp32 (fp64 for fp64 inputs), outside any autocast."""
    dtype = torch.promote_types(torch.promote_types(x_TD.dtype, weight_ED.dtype), torch.float32)
    logits_TE: Tensor = _RouterLinear.apply(x_TD, weight_ED, dtype)  # type: ignore[no-untyped-call]  # torch's
    return logits_TE
