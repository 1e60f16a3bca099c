"""The binding of paged.cpp: attention of one new token of each sequence over keys and values in blocks, where they lie.

No gradients. Its twin is what `serve.paged_cache` does without it: copy the blocks, fill up, mask, let torch attend. A
sequence's result has the same bits alone, among others, and on any number of threads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from equipoise.ops.native.build import load

NEEDS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
_STEP = 16  # numbers in a register
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Where B sequences are. blocks_BM: int64, of each; those after its last token are not read. ends_B: int64, tokens
    of each, the new one included. size: tokens of a block."""

    blocks_BM: Tensor
    ends_B: Tensor
    size: int


@cache
def _library() -> ctypes.CDLL | None:
    library = load("paged.cpp", NEEDS).library
    if library is not None:
        i, n, p = ctypes.c_int, ctypes.c_long, ctypes.c_void_p
        library.equipoise_paged.argtypes = (i, i, *(7 * (n,)), ctypes.c_float, p, p, p, p, n, n, p, p)
        library.equipoise_paged.restype = None
    return library


@cache
def unsupported(width: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why keys of heads so wide can't be attended to here; "" if they can. The first question compiles."""
    if device.type != "cpu":
        return f"native code is for the CPU, got {device}"
    if dtype not in _DTYPES:
        return f"no native code for {dtype}"
    if width % _STEP:
        return f"the native code takes heads in multiples of {_STEP}, got {width}"
    return load("paged.cpp", NEEDS).reason if _library() is None else ""


def paged_attention(
    q_BHD: Tensor, both_S2HD: Tensor, where: Blocks, window: int | None = None, sinks_H: Tensor | None = None
) -> Tensor:
    """(B, H, D) in q's dtype: what each query sees in its sequence. Scores are divided by the root of D.

    q_BHD: heads of one key/value head lie side by side; its last dim must be contiguous. both_S2HD: keys and values by
    slot, contiguous, in q's dtype. window, sinks_H: see `models.attend.Sight`. Sizes are those of `unsupported`.
    """
    library = _library()
    assert library is not None
    B, H, D = q_BHD.shape
    out_BHD = q_BHD.new_empty(B, H, D)
    sinks_H = None if sinks_H is None else sinks_H.float().contiguous()
    library.equipoise_paged(
        q_BHD.dtype == torch.bfloat16,
        torch.get_num_threads(),
        B,
        H,
        both_S2HD.shape[2],
        D,
        where.size,
        where.blocks_BM.shape[1],
        window or 0,
        D**-0.5,
        None if sinks_H is None else sinks_H.data_ptr(),
        where.blocks_BM.data_ptr(),
        where.ends_B.data_ptr(),
        q_BHD.data_ptr(),
        q_BHD.stride(0),
        q_BHD.stride(1),
        both_S2HD.data_ptr(),
        out_BHD.data_ptr(),
    )
    return out_BHD
