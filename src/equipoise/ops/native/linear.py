"""The binding of linear.cpp: a few rows times one or more weights in one call, fp32 or bf16, without gradients.

Its twin is torch's own product. A row's result has the same bits alone, among others, and on any number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from equipoise.ops.native.build import load

NEEDS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
MOST_ROWS = 64  # with more, torch's products of many rows are faster
_STEPS = {torch.float32: 16, torch.bfloat16: 32}  # numbers in a register


@cache
def _library() -> ctypes.CDLL | None:
    library = load("linear.cpp", NEEDS).library
    if library is not None:
        i, n, p = ctypes.c_int, ctypes.c_long, ctypes.c_void_p
        library.equipoise_linear.argtypes = (i, i, n, n, p, n, i, p, p, p)
        library.equipoise_linear.restype = None
    return library


@cache
def unsupported(inputs: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why weights of so many inputs can't be multiplied here; "" if they can. The first question compiles."""
    if device.type != "cpu":
        return f"native code is for the CPU, got {device}"
    step = _STEPS.get(dtype)
    if step is None:
        return f"no native code for {dtype}"
    if inputs % step:
        return f"the native code takes inputs in multiples of {step}, got {inputs}"
    return load("linear.cpp", NEEDS).reason if _library() is None else ""


def few_rows_linear(x_NI: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """(N, O) in x's dtype: x W^T for each W (O_j, I), side by side. Sizes are those of `unsupported`."""
    library = _library()
    assert library is not None
    if x_NI.stride(1) != 1:
        x_NI = x_NI.contiguous()
    (N, I), count = x_NI.shape, len(weights)  # noqa: E741 - the letter of linear.cpp
    sizes = [weight.shape[0] for weight in weights]
    y_NO = x_NI.new_empty(N, sum(sizes))
    library.equipoise_linear(
        x_NI.dtype == torch.bfloat16,
        torch.get_num_threads(),
        N,
        I,
        x_NI.data_ptr(),
        x_NI.stride(0),
        count,
        (ctypes.c_void_p * count)(*[weight.data_ptr() for weight in weights]),
        (ctypes.c_long * count)(*sizes),
        y_NO.data_ptr(),
    )
    return y_NO
