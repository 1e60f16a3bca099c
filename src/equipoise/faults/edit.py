"""Rows of a live tensor that a fault has changed: what they would be without it, also after further training.

An element that is bit for bit as the fault left it goes back to the bits it had. From one that training has moved
since, what the fault did is taken out. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Undo = Callable[[Tensor, Tensor, Tensor], Tensor]
GONE = 0.5  # of the change's length: nearer than that to the clean rows, the change is not there any more


def subtracted(now: Tensor, clean: Tensor, left: Tensor) -> Tensor:
    """Without what was really added: what rounding made of it, not what was meant."""
    return (now.double() - (left.double() - clean.double())).to(now.dtype)


class Edit:
    """Rows of the tensor that `read` returns. rows: int64. undo: (now, clean, left) -> the clean rows of now.

    clean: what the rows were before the last change. left: what it made of them.
    A reload or a repair may have put back rows without the change: where they are nearer to the clean rows than half
    the change is long, there is nothing to take out, and they stay as they are.
    """

    def __init__(self, read: Callable[[], Tensor], rows: Tensor, undo: Undo = subtracted) -> None:
        self._read, self._rows, self._undo = read, rows, undo
        self._clean: Tensor | None = None
        self._left: Tensor | None = None

    @torch.no_grad()
    def put(self, change: Callable[[Tensor, bool], Tensor]) -> None:
        """Replace the rows by change(clean rows, whether an earlier change is still in them)."""
        self._clean, still = self._without()
        left = change(self._clean, still).to(self._clean.dtype)
        self._write(left)
        self._left = left

    @torch.no_grad()
    def holds(self, change: Callable[[Tensor, bool], Tensor]) -> bool:
        """Whether the rows could be replaced so, every finite number by a finite number. Writes nothing."""
        clean, still = self._without()
        left = change(clean, still).to(clean.dtype)
        return bool((left.isfinite() | ~clean.isfinite()).all())

    @torch.no_grad()
    def take_out(self) -> None:
        """Write the clean rows."""
        clean, _ = self._without()
        self._write(clean)
        self._clean = self._left = None

    def _without(self) -> tuple[Tensor, bool]:
        tensor = self._read().detach()
        now = tensor[self._rows.to(tensor.device)]
        if self._clean is None or self._left is None:
            return now, False
        clean, left = self._clean.to(now.device), self._left.to(now.device)
        if torch.dist(now.double(), clean.double()) < GONE * torch.dist(left.double(), clean.double()):
            return now, False
        return torch.where(now == left, clean, self._undo(now, clean, left)), True

    def _write(self, rows: Tensor) -> None:
        tensor = self._read()
        tensor[self._rows.to(tensor.device)] = rows
