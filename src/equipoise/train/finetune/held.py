"""What the optimizer holds for a weight of the model: the weight, some of its experts, or a low-rank addition to it.

The model always has plain, whole weights, so that everything that reads or repairs them by name goes on working:
checkpoints, known-good records, the monitor, serving. After backward `pull` hands the weight's gradient on to what is
held; after the optimizer's step `push` writes it into the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Held(Protocol):
    """For one weight."""

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What the optimizer gets."""
        ...

    def pull(self) -> None:
        """Take the weight's gradient over."""
        ...

    def push(self) -> None:
        """Bring the weight in line."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the weight itself and the optimizer's state."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` returned; the model's weights are there already."""
        ...


class Whole:
    """The weight itself."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.parameters = (weight,)

    def pull(self) -> None:
        """It has its gradient."""

    def push(self) -> None:
        """It has been changed."""

    def tensors(self) -> dict[str, Tensor]:
        """Nothing more."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """There is nothing."""


class Rows:
    """Some experts of a stacked weight (E, ...): the others have no optimizer state and no decay, and keep their bits.

    experts: in [0, E), ascending, at least one.
    """

    def __init__(self, weight: nn.Parameter, experts: Sequence[int]) -> None:
        self._weight = weight
        self._experts = torch.tensor(list(experts), device=weight.device)
        self._rows = nn.Parameter(weight.detach()[self._experts])
        self.parameters = (self._rows,)

    @torch.no_grad()
    def pull(self) -> None:
        """Rows of the gradient; and of the weight, which a repair may have replaced since."""
        self.load({})
        gradient = self._weight.grad
        self._rows.grad = None if gradient is None else gradient[self._experts]
        self._weight.grad = None

    @torch.no_grad()
    def push(self) -> None:
        """Into their places."""
        self._weight[self._experts] = self._rows

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: they are rows of the weight."""
        return {}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """From the weight."""
        self._rows.copy_(self._weight[self._experts])


class LowRank:
    """A low-rank addition: weight = base + scale * b a, with b (..., out, r) and a (..., r, in) (arXiv 2106.09685).

    Each expert of a stacked weight (E, out, in) has factors of its own. b begins at 0, so that the model begins as the
    base; a is drawn as a `nn.Linear`'s weight is, by generator. The weight's whole gradient G is made once per step and
    gives those of the factors by the chain rule: scale * G a^T for b, scale * b^T G for a.
    """

    def __init__(self, weight: nn.Parameter, rank: int, scale: float, generator: torch.Generator) -> None:
        *experts, size_out, size_in = weight.shape
        self._weight, self._scale = weight, scale
        self._base = weight.detach().clone()
        drawn = torch.rand((*experts, rank, size_in), generator=generator) * 2 - 1
        self.a = nn.Parameter((drawn / size_in**0.5).to(weight))
        self.b = nn.Parameter(weight.new_zeros((*experts, size_out, rank)))
        self.parameters = (self.a, self.b)

    @torch.no_grad()
    def pull(self) -> None:
        """By the chain rule."""
        gradient = self._weight.grad
        self._weight.grad = None
        if gradient is None:
            self.a.grad = self.b.grad = None
            return
        self.a.grad = self._scale * (self.b.mT @ gradient)
        self.b.grad = self._scale * (gradient @ self.a.mT)

    @torch.no_grad()
    def push(self) -> None:
        """Base and addition together."""
        self._weight.copy_(self._base + self._scale * (self.b @ self.a))

    def tensors(self) -> dict[str, Tensor]:
        """The factors, and what they are added to."""
        return {"a": self.a.detach(), "b": self.b.detach(), "base": self._base}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """All three."""
        for own, name in ((self.a, "a"), (self.b, "b"), (self._base, "base")):
            own.copy_(tensors[name])
