"""What the machine can do, measured in the same run as what is compared with it: bytes read per second from memory.

A decode step reads weights once and computes next to nothing, so it can be no faster than the memory. The other
ceiling, products of dense matrices of the same active arithmetic, stands in `dense.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from equipoise.bench.harness import Clock, Spread, host_seconds, spread

GB = 1e9
BUFFER = 2**29  # bytes, more than any cache
MIN_SECONDS = 1.0


def read_bandwidth(
    num_bytes: int = BUFFER, seconds: float = MIN_SECONDS, device: str = "cpu", clock: Clock = host_seconds
) -> Spread:
    """Bytes per second that all of torch's threads together read from memory, or the GPU from its own.

    The best of three readers that torch has: a sum, a maximum, and a matrix times a vector, over a buffer that no
    cache holds. Median and percentiles are of that reader's passes.
    """
    buffer = torch.ones(num_bytes // 4, device=device)
    matrix, vector = buffer.view(-1, 4096)[: num_bytes // 16384], torch.ones(4096, device=device)
    readers: tuple[Callable[[], Tensor], ...] = (
        lambda: buffer.sum(),
        lambda: buffer.max(),
        lambda: matrix.mv(vector),
    )
    rates: list[list[float]] = [[] for _ in readers]
    for reader in readers:
        reader()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(rates[0]) < 3:
        for reader, found in zip(readers, rates, strict=True):
            found.append(buffer.nbytes / clock(reader))
    return max((spread(found) for found in rates), key=lambda rate: rate.median)


def product_rate(device: str, clock: Clock, side: int = 8192, dtype: torch.dtype = torch.bfloat16) -> Spread:
    """FLOP/s of torch's product of two square matrices of normal numbers."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        clock(lambda: left @ right)
    return spread([2 * side**3 / clock(lambda: left @ right) for _ in range(10)])
