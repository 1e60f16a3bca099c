"""Where a model computes, by the names that commands have for it."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. Raises ValueError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: expected cpu, auto, or cuda where torch finds a GPU, got {name!r}; try --device cpu")
    return torch.device(name)
