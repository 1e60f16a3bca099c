"""State that adapts once per optimizer step to what was routed: biases, thresholds, coefficients.

Each training forward is observed once, also when it is recomputed; what was observed adds up over micro-batches and
ranks; `update` turns it into the next state. Never in eval. The loop calls `equipoise.layer.reduce_and_update`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from equipoise.types import RoutingDecision


class Adaptive(nn.Module, ABC):
    """Buffers that adapt. State is saved in checkpoints; `pending`, what was seen since the last update, is not."""

    frozen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frozen", torch.tensor(False))

    @property
    @abstractmethod
    def pending(self) -> Tensor:
        """What to sum over ranks before `update`."""

    @abstractmethod
    def observe(self, decision: RoutingDecision, drops: Mapping[str, Tensor] | None = None) -> None:
        """Add a training forward's decision to `pending`. drops: see `DispatchPlan.drops`."""

    @abstractmethod
    def advance(self, step: int) -> None:
        """Move the state by what is pending. Called by `update`, without gradients."""

    @abstractmethod
    def start(self) -> None:
        """Set the state of a new run."""

    @torch.no_grad()
    def update(self, step: int = 0) -> None:
        """Once per optimizer step, for its number: move the state, unless frozen, and start counting anew."""
        kept = {name: buffer for name, buffer in self.named_buffers() if name not in self._non_persistent_buffers_set}
        before = {name: buffer.clone() for name, buffer in kept.items()}
        self.advance(step)
        for name, buffer in kept.items():
            buffer.copy_(torch.where(self.frozen, before[name], buffer))
        self.pending.zero_()

    @torch.no_grad()
    def reset(self) -> None:
        """As new: nothing observed, not frozen."""
        for buffer in self.buffers():
            buffer.zero_()
        self.start()

    def freeze(self) -> None:
        """Keep the state as it is from now on, as DeepSeek-V3 does at the end of pre-training. Saved in checkpoints."""
        self.frozen.fill_(True)

    def unfreeze(self) -> None:
        """Adapt again."""
        self.frozen.fill_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but stay fp32 when it is cast: in bf16 a bias of 1 would swallow steps of 1e-3."""
        moved: Self = super()._apply(_keep_dtype(fn), recurse)  # type: ignore[no-untyped-call]  # torch's
        return moved


def _keep_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """fn for `nn.Module._apply`, which moves and casts: the move without the cast."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved
