"""How products are cut into blocks. All follows from shapes; `python -m benchmarks.gpu_blocks` found the figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

_WITHOUT_A_GPU = 96 * 1024  # bytes; the interpreter has no limit
_BARRIERS = 2048  # bytes, and what else the compiler adds


@dataclass(frozen=True)
class Blocks:
    """rows x cols of the result per program, `inner` of the summed dimension at a time, `stages` of them on the way."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int

    def fitting(self, itemsize: int, matrices: int, shared_bytes: int) -> Blocks:
        """With as many stages as the shared memory holds; `matrices` weights' blocks per block of rows."""
        stage = (self.rows + matrices * self.cols) * self.inner * itemsize
        return replace(self, stages=max(1, min(self.stages, shared_bytes // stage)))


@dataclass(frozen=True)
class Cut:
    """The blocks of each product. Those over rows share `rows`, of which the table of tiles is made.

    up: first product, whose blocks of two matrices lie side by side; down: second; grad_a, grad_x: backward by the
    weights; weights: gradients of the weights, whose summed dimension is rows.
    """

    up: Blocks
    down: Blocks
    grad_a: Blocks
    grad_x: Blocks
    weights: Blocks

    @property
    def rows(self) -> int:
        """Of a tile."""
        return self.up.rows


def cut_for(num_rows: int, num_experts: int, itemsize: int, shared_bytes: int) -> Cut:
    """Rows of a tile follow the mean load, so that few rows are masked; stages what the shared memory holds."""
    mean = num_rows // max(1, num_experts)
    rows = 16 if mean <= 16 else 32 if mean <= 32 else 64 if mean <= 64 or itemsize == 4 else 128
    if rows == 128:
        up, down, grad = Blocks(rows, 128, 64, 8, 4), Blocks(rows, 128, 64, 4, 3), Blocks(rows, 256, 64, 8, 4)
        weights = Blocks(128, 128, 32, 4, 4)
    else:
        up = down = grad = Blocks(rows, 64, 32 if itemsize == 4 else 128 if rows == 16 else 64, 4, 4)
        weights = Blocks(64, 64, max(16, min(64, rows)), 4, 3)
    up, down, grad, weights = (
        blocks.fitting(itemsize, matrices, shared_bytes)
        for blocks, matrices in ((up, 2), (down, 1), (grad, 1), (weights, 1))
    )
    return Cut(up, down, grad, grad, weights)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block of the GPU may have; a guess for a GPU where there is none."""
    if device.type != "cuda":
        return _WITHOUT_A_GPU
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", _WITHOUT_A_GPU)) - _BARRIERS
