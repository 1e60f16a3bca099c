"""What the kernels need, and the error that says what is missing."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INSTEAD = 'or use another backend, such as backend="auto"'


def require(device: torch.device, dtype: torch.dtype = torch.float32, widths: tuple[int, ...] = ()) -> None:
    """Raise ValueError unless triton can be imported, and its kernels run here and multiply rows of these widths."""
    try:
        import triton  # noqa: F401 - only whether it is there
    except ImportError:
        raise ValueError(
            f"backend=\"triton\": expected the package triton, got none; pip install 'equipoise[triton]', {_INSTEAD}"
        ) from None
    from equipoise.ops.triton.kernels import products

    if dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise ValueError(f'backend="triton": expected one of {known}, got {dtype}; convert, {_INSTEAD}')
    if device.type != "cuda" and not products.INTERPRETED.value:
        raise ValueError(
            f'backend="triton": expected tensors on a GPU, got {device}; move the layer there, set TRITON_INTERPRET=1 '
            f"before Python starts to run the kernels slowly on a CPU, {_INSTEAD}"
        )
    for width in widths:
        if width * dtype.itemsize % 16:
            raise ValueError(
                f'backend="triton": expected rows of whole 16 bytes, got a width of {width} in {dtype}; '
                f"round it up to a multiple of {16 // dtype.itemsize}, {_INSTEAD}"
            )
