"""Large uninitialised tensors on a CPU that do not cost a page fault for every 4 KB.

NumPy asks the kernel for huge pages for large arrays, torch's allocator does not by default. First writing to 67 MB
took about 4 ms in an array of NumPy's and 24 ms in a tensor of torch's (docs/log.md).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_LARGE = 4 * 2**20  # bytes; below, NumPy asks for no huge pages (numpy:numpy/_core/src/multiarray/alloc.c)
_ALIGNMENT = 64  # bytes, as torch has it: vector loads that cross cache lines are slow


def fresh(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of `shape`, with the dtype and device of `like`."""
    num_bytes = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or num_bytes < _LARGE:
        return like.new_empty(shape)
    block = torch.from_numpy(np.empty(num_bytes + _ALIGNMENT, dtype=np.uint8))
    start = -block.data_ptr() % _ALIGNMENT
    return block[start : start + num_bytes].view(like.dtype).view(shape)
