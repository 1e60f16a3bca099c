"""What the kernels need, and the error that says what is missing."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INSTEAD = 'or use another backend, such as backend="grouped"'
_MEASURED = (9, 0)  # the least compute capability on which they were, and were the fastest: docs/gpu.md


def require(device: torch.device, dtype: torch.dtype = torch.float32, widths: tuple[int, ...] = ()) -> None:
    """Raise ValueError unless triton can be imported, and its kernels run here and multiply rows of these widths."""
    if missing := _missing(device, dtype, widths):
        raise ValueError(f'backend="triton": {missing}')


def why_not_triton(x_TD: Tensor, down_eDF: Tensor) -> str:
    """Why backend="auto" does not take these kernels; "" where it does."""
    if missing := _missing(x_TD.device, x_TD.dtype, (x_TD.shape[1], down_eDF.shape[2])):
        return missing
    if x_TD.device.type != "cuda" or _capability(x_TD.device) < _MEASURED:
        return "Triton's kernels were measured on compute capability 9.0 only"
    return ""


def _missing(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str:
    if not _installed():
        return f"expected the package triton, got none; pip install 'equipoise[triton]', {_INSTEAD}"
    if dtype not in DTYPES:
        return f"expected one of {', '.join(map(str, DTYPES))}, got {dtype}; convert, {_INSTEAD}"
    if device.type != "cuda" and not _interpreted():
        return (
            f"expected tensors on a GPU, got {device}; move the layer there, set TRITON_INTERPRET=1 "
            f"before Python starts to run the kernels slowly on a CPU, {_INSTEAD}"
        )
    for width in widths:
        if width * dtype.itemsize % 16:
            return (
                f"expected rows of whole 16 bytes, got a width of {width} in {dtype}; "
                f"round it up to a multiple of {16 // dtype.itemsize}, {_INSTEAD}"
            )
    return ""


def _installed() -> bool:
    try:
        import triton  # noqa: F401 - only whether it is there
    except ImportError:
        return False
    return True


def _interpreted() -> bool:
    from equipoise.ops.triton.kernels import products

    return bool(products.INTERPRETED.value)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
