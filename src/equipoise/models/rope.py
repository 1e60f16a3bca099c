"""Rotary positions: the angles' frequencies, plain or stretched to a longer context, and their tables.

The stretchings are those that checkpoints name in `rope_parameters` ("linear", "llama3", "yarn").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Long waves divided by `factor`, short ones left, those between in proportion (Llama 3.1,
    `transformers:modeling_rope_utils.py`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): dimensions that turn fast keep their frequency, slow ones are divided by `factor`.

    beta_fast, beta_slow: turns within original_max_seq_len between which the frequencies are blended; truncate: to
    whole dimensions. attention_factor: what tables are multiplied by; None is by the paper's rule, with mscale and
    mscale_all_dim as DeepSeek uses them, the latter in its softmax as well (`softmax_factor`).
    """

    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    @property
    def table_factor(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    @property
    def softmax_factor(self) -> float:
        """What DeepSeek's attention scores are multiplied by besides 1 / sqrt(d)."""
        return _mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling
SCALINGS: tuple[type[RopeScaling], ...] = (LinearScaling, Llama3Scaling, YarnScaling)


def rotary_tables(positions_BS: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Rotary:
    """cos and sin of the rotary angles, fp32 (B, 1, S, head_dim): both halves have the same angles, the first one's sin
    is negative, as `rotate` needs it.

    The angle of pair i at position p is p * theta^(-2i / head_dim) (RoFormer, arXiv 2104.09864, section 3.2.2), before
    scaling.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BS.device) / head_dim
    frequencies = theta**-exponents
    if scaling is not None:
        frequencies = _scaled(frequencies, theta, head_dim, scaling)
    angles = positions_BS[:, None, :, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    if isinstance(scaling, YarnScaling) and scaling.table_factor != 1.0:
        cos, sin = cos * scaling.table_factor, sin * scaling.table_factor
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x_BHSD: Tensor, rotary: Rotary) -> Tensor:
    """Turn the pair (i, i + D/2) of each head by its angle, in fp32. Hugging Face checkpoints pair halves this way."""
    cos, sin = rotary
    x_BHSD = x_BHSD.float()
    others_BHSD = x_BHSD.roll(x_BHSD.shape[-1] // 2, dims=-1)  # the halves change places
    return x_BHSD * cos + others_BHSD * sin


def _scaled(frequencies: Tensor, theta: float, head_dim: int, scaling: RopeScaling) -> Tensor:
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        turns = frequencies * scaling.original_max_seq_len / (2 * math.pi)  # within the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / scaling.factor)
    first, last = (_dim_of(turns, theta, head_dim, scaling) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=frequencies.device)
    stretched = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * (1 - stretched) + frequencies / scaling.factor * stretched


def _dim_of(turns: float, theta: float, head_dim: int, scaling: YarnScaling) -> float:
    """The pair that turns so often within the original context."""
    return head_dim * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
