"""Floating-point types by the names that commands, checkpoints of others and measurements have for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(name: str) -> torch.dtype | None:
    """The type of that name; None for "auto", which leaves it as it is. Raises ValueError for another."""
    if name == "auto":
        return None
    if name not in DTYPES:
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
