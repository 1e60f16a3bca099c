"""Linear layers side by side: x W^T for several W, in one native call for the few rows of a decode step on a CPU.

Everything else is torch's own product, which is also the twin. The native call has no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from equipoise.ops.native.linear import few_rows_linear, unsupported

_MOST_ROWS = {torch.float32: 256, torch.bfloat16: 32}  # with more, torch's products are as fast


def linears(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x W^T for each W, (..., O_j). x: (..., I). weights: (O_j, I)."""
    if not is_few(x, weights):
        return tuple(F.linear(x, weight) for weight in weights)
    y_NO = few_rows_linear(x.reshape(-1, x.shape[-1]), weights)
    y = y_NO.view(*x.shape[:-1], y_NO.shape[1])
    return (y,) if len(weights) == 1 else torch.split(y, [weight.shape[0] for weight in weights], dim=-1)


def projections(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """What each layer makes of x. Those that are no plain `nn.Linear`, or are watched by hooks, are called as ever."""
    if not all(
        type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks for layer in layers
    ):
        return tuple(layer(x) for layer in layers)
    plain: Sequence[nn.Linear] = layers  # type: ignore[assignment]  # asked above
    if not is_few(x, [layer.weight for layer in plain]):
        return tuple(layer(x) for layer in plain)
    products = linears(x, [layer.weight for layer in plain])
    return tuple(y if layer.bias is None else y + layer.bias for y, layer in zip(products, plain, strict=True))


def is_few(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the native call takes them, and is faster. Never where a backward pass may come, or where torch's
    calls are looked at: by a compiler, or a mode such as the counter of FLOPs.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    if is_in_torch_dispatch_mode():
        return False
    dtype, inputs = x.dtype, x.shape[-1]
    if x.numel() > _MOST_ROWS.get(dtype, 0) * inputs or torch.is_autocast_enabled("cpu"):
        return False
    same = all(weight.dtype == dtype and weight.is_contiguous() for weight in weights)
    return same and not unsupported(inputs, dtype, x.device)
