"""Active FLOPs of a model, and one width that is fitted to them."""

from __future__ import annotations

from collections.abc import Callable

from equipoise.models.config import DecoderConfig
from equipoise.models.flops import active_flops

_STEP = 8  # widths are multiples of it


def flops_per_token(config: DecoderConfig, seq_len: int = 64) -> float:
    """Multiplications and additions of products in a forward, per token (`models/flops.py`, which tests hold against
    torch's counter)."""
    return active_flops(config, seq_len).total / seq_len


def fitted(build: Callable[[int], DecoderConfig], flops: float, width: int) -> DecoderConfig:
    """The configuration whose width comes closest to so many FLOPs per token, which must be linear in the width.

    build: of a width; width: any, to begin with. Raises ValueError where no positive width does.
    """
    low, high = flops_per_token(build(width)), flops_per_token(build(2 * width))
    per_unit = (high - low) / width
    exact = width + (flops - low) / per_unit
    found = max(_STEP, round(exact / _STEP) * _STEP)
    if exact < _STEP / 2:
        raise ValueError(
            f"width: expected one that makes {flops:.0f} FLOPs per token, but everything else takes "
            f"{low - width * per_unit:.0f} already; make the rest smaller"
        )
    return build(found)
