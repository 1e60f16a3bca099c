"""Weights in fewer bits, as two published families keep them, as the bf16 numbers that they stand for.

MXFP4: blocks of 32 four-bit numbers with a power of two each (OCP Microscaling Formats v1.0, section 5; gpt-oss).
Block-wise FP8: e4m3 with an fp32 factor per 128 x 128 (DeepSeek-V3).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS, SCALES, SCALE_INV = "_blocks", "_scales", "_scale_inv"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SIDE = 128


def from_mxfp4(blocks_ERGB: Tensor, scales_ERG: Tensor) -> Tensor:
    """bf16 (E, 32 G, R), exact. blocks: uint8 (E, R, G, 16), two numbers each, the lower four bits first. scales: uint8
    (E, R, G), an exponent plus 127. Rows and columns change places: so transformers names these tensors.
    """
    values = torch.tensor([*_E2M1, *(-each for each in _E2M1)], dtype=torch.bfloat16)
    low, high = values[(blocks_ERGB & 15).long()], values[(blocks_ERGB >> 4).long()]
    numbers = torch.stack((low, high), dim=-1).flatten(-2)
    scaled = torch.ldexp(numbers, (scales_ERG.int() - 127)[..., None])
    return scaled.flatten(-2).transpose(1, 2)


def from_blocks(weight_OI: Tensor, scale_inv: Tensor) -> Tensor:
    """bf16 (O, I), rounded once. weight: float8_e4m3fn. scale_inv: fp32 (ceil(O / 128), ceil(I / 128))."""
    O, I = weight_OI.shape  # noqa: E741
    factors = scale_inv.repeat_interleave(_SIDE, 0)[:O].repeat_interleave(_SIDE, 1)[:, :I]
    return (weight_OI.float() * factors).to(torch.bfloat16)
