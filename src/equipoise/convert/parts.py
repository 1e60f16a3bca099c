"""The correspondence of two layouts of the same weights: each of their tensors is one region of one of ours.

A part says which region, and what the numbers go through on the way; both ways it only moves numbers, so that what
comes back has the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Change(Protocol):
    """A rearrangement of a tensor's numbers, and its inverse. Both take and give a view or a copy."""

    def to_ours(self, theirs: Tensor) -> Tensor:
        """Their tensor, laid out as ours."""
        ...

    def to_theirs(self, ours: Tensor) -> Tensor:
        """Our region, laid out as theirs."""
        ...


@dataclass(frozen=True)
class Same:
    """As it is."""

    def to_ours(self, theirs: Tensor) -> Tensor:
        """The same tensor."""
        return theirs

    def to_theirs(self, ours: Tensor) -> Tensor:
        """The same tensor."""
        return ours


@dataclass(frozen=True)
class Transposed:
    """The last two axes change places."""

    def to_ours(self, theirs: Tensor) -> Tensor:
        """(..., b, a) of (..., a, b)."""
        return theirs.transpose(-1, -2)

    def to_theirs(self, ours: Tensor) -> Tensor:
        """The inverse, which is the same."""
        return ours.transpose(-1, -2)


@dataclass(frozen=True)
class Zipped:
    """Gate and up alternate in their last axis (gpt-oss); in ours all gates come first. transposed: their weights are
    (E, D, 2F), ours (E, 2F, D); biases are (E, 2F) in both."""

    transposed: bool = False

    def to_ours(self, theirs: Tensor) -> Tensor:
        """(..., 2F, D) or (..., 2F), gates first."""
        pairs = theirs.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)  # type: ignore[no-untyped-call]  # torch's
        moved: Tensor = pairs.transpose(-1, -2) if self.transposed else pairs
        return moved

    def to_theirs(self, ours: Tensor) -> Tensor:
        """Gate, up, gate, up in the last axis."""
        flat = ours.transpose(-1, -2) if self.transposed else ours
        moved: Tensor = flat.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)  # type: ignore[no-untyped-call]
        return moved


@dataclass(frozen=True)
class Halved:
    """The rows of each head that are rotated: neighbours are a pair in theirs, row i and i + rotated/2 in ours.

    skip: rows of the head before them, which stay.
    """

    rotated: int
    skip: int = 0

    def to_ours(self, theirs: Tensor) -> Tensor:
        """First all first rows of the pairs."""
        return self._moved(theirs, (-1, 2))

    def to_theirs(self, ours: Tensor) -> Tensor:
        """Pairs side by side."""
        return self._moved(ours, (2, -1))

    def _moved(self, rows: Tensor, pairs: tuple[int, int]) -> Tensor:
        by_head = rows.reshape(-1, self.skip + self.rotated, *rows.shape[1:]).clone()
        turned = by_head[:, self.skip :].unflatten(1, pairs).transpose(1, 2).flatten(1, 2)  # type: ignore[no-untyped-call]
        by_head[:, self.skip :] = turned
        return by_head.view(rows.shape)


@dataclass(frozen=True)
class Part:
    """One of their tensors. ours: the name of our tensor; expert: its index in the first axis, None for all of it;
    rows: [first, last) of the expert's (or of the tensor's) rows, None for all; change: on the way.
    """

    theirs: str
    ours: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    change: Change = Same()

    def region(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """(shape of the region, number of its first element) in our tensor of this shape; it is contiguous there."""
        start = 0
        if self.expert is not None:
            shape = shape[1:]
            start = self.expert * _size(shape)
        if self.rows is not None:
            start += self.rows[0] * _size(shape[1:])
            shape = (self.rows[1] - self.rows[0], *shape[1:])
        return shape, start

    def of(self, tensor: Tensor) -> Tensor:
        """The region of our tensor, a view."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for each in shape:
        size *= each
    return size
