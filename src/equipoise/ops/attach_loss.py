"""Give a layer's own loss a gradient without carrying it to the top of the model.

The loss is attached to the layer's output: forward is the identity, backward sends the gradient 1 into the loss.
No list of losses travels through the model, and nothing hangs on a module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)


def attach_loss(output: Tensor, loss: Tensor) -> Tensor:
    """Return output unchanged; when a gradient flows back through it, loss (a scalar) receives the gradient 1.

    The gradient of the loss does not depend on what is done with the output afterwards: scale the loss itself (by
    its coefficient and by the micro-batch's share of the global batch) before attaching it. The mechanism is
    Megatron-LM's MoEAuxLossAutoScaler (NVIDIA/Megatron-LM:megatron/core/transformer/moe/moe_utils.py), without its
    global scale.
    """
    if loss.dim() != 0:
        raise ValueError(f"attach_loss: loss must be a scalar, got shape {tuple(loss.shape)}; reduce it first")
    attached: Tensor = _AttachLoss.apply(output, loss)  # type: ignore[no-untyped-call]  # torch's
    return attached
