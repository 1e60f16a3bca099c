"""What the kernels need, and the error that says what is missing."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INSTEAD = 'or use another backend, such as backend="auto"'


def require(x: Tensor) -> None:
    """Raise ValueError unless triton can be imported, and run kernels on x's device and dtype."""
    try:
        import triton
    except ImportError:
        raise ValueError(
            f"backend=\"triton\": expected the package triton, got none; pip install 'equipoise[triton]', {_INSTEAD}"
        ) from None
    from equipoise.ops.triton.kernels import products

    if x.dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise ValueError(f'backend="triton": expected one of {known}, got {x.dtype}; convert, {_INSTEAD}')
    interpreted = not isinstance(products.rows_kernel, triton.JITFunction)
    if x.device.type != "cuda" and not interpreted:
        raise ValueError(
            f'backend="triton": expected tensors on a GPU, got {x.device}; move the layer there, set TRITON_INTERPRET=1 '
            f"before Python starts to run the kernels slowly on a CPU, {_INSTEAD}"
        )
