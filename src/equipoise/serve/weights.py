"""Other weights for a model that is being served: verified, in one go, judged on held-out text, and back again.

Forwards wait only while values are copied. What was computed with the old weights is computed anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from equipoise.disk.checkpoint import list_checkpoints, load_checkpoint
from equipoise.models.decoder import Decoder
from equipoise.models.run_files import MODEL
from equipoise.recovery.gate import Gate
from equipoise.recovery.swap import swap

MOST_WORSE = 0.1  # nats per token


class Swapped(Protocol):
    """Weights that are in service, and the way back. digest: of their values."""

    @property
    def digest(self) -> str: ...  # noqa: D102 - described by the class

    def undo(self) -> None:
        """Put the old values back exactly. Twice is once."""
        ...


Read: TypeAlias = Callable[[Path], Callable[[], Swapped]]  # verifies a checkpoint; what it returns puts it in service


def whole(model: Decoder) -> Read:
    """Reads for a model that is all in this process. What it gives raises ValueError for what does not fit."""

    def read(path: Path) -> Callable[[], Swapped]:
        tensors = load_checkpoint(path).tensors
        if MODEL not in tensors:
            raise ValueError(f"{path}: expected a group of tensors called {MODEL}, got {sorted(tensors)}")
        return lambda: swap(model, tensors[MODEL], whole=True)

    return read


class ReloadRefusedError(ValueError):
    """The new weights were not taken, or not kept; the old ones are in service. The message says why."""


@dataclass(frozen=True)
class Version:
    """What is in service. number: counts changes. source: the checkpoint's name. digest: of the values, once they were
    changed. loss: nats per token of held-out text, None where there is none."""

    number: int
    source: str
    digest: str = ""
    loss: float | None = None


class Weights:
    """Reloads the weights of one model.

    read: how they are read, and put in. checkpoints: the folder that they are taken from. measure: nats per token of
    held-out text, alone with the model; None where there is no such text. on_change: called while nobody else can use
    the model.
    """

    def __init__(
        self,
        read: Read,
        checkpoints: Path,
        source: str,
        gate: Gate,
        measure: Callable[[], float] | None,
        on_change: Callable[[], None],
    ) -> None:
        self._read, self._checkpoints, self._gate = read, checkpoints, gate
        self._measure, self._on_change = measure, on_change
        self.version = Version(1, source)
        self._way_back: tuple[Swapped, Version] | None = None

    def names(self) -> list[str]:
        """The whole checkpoints that can be loaded, oldest first."""
        return [path.name for path in list_checkpoints(self._checkpoints)]

    def reload(self, name: str | None = None, *, most_worse: float = MOST_WORSE) -> Version:
        """Take the weights of a checkpoint, the newest if none is named.

        most_worse: nats per token by which the held-out loss may rise. Raises ReloadRefusedError for a checkpoint that
        is not there, damaged, of another model, or worse than that.
        """
        names = self.names()
        if not names or (name is not None and name not in names):
            known = ", ".join(names) or "none"
            raise ReloadRefusedError(f"checkpoint: expected one of {known}, got {name!r}; nothing was changed")
        name = name or names[-1]
        before = None if self._measure is None else self._measure()
        try:
            take = self._read(self._checkpoints / name)  # verified; forwards go on meanwhile
            with self._gate.changing():
                done = take()
                self._on_change()
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            raise ReloadRefusedError(f"{name}: nothing was changed: {error}") from error
        after = None if self._measure is None else self._measure()
        if worse := _worse(before, after, most_worse):
            self._put_back(done)
            raise ReloadRefusedError(f"{name}: {worse}; the weights from before are in service again")
        self._way_back = (done, self.version)
        self.version = Version(self.version.number + 1, name, done.digest, after)
        return self.version

    def undo(self) -> Version:
        """The weights from before the last reload, exactly. Raises ReloadRefusedError when there are none."""
        if self._way_back is None:
            raise ReloadRefusedError("undo: there was no reload that could be undone; nothing was changed")
        (done, before), self._way_back = self._way_back, None
        self._put_back(done)
        self.version = Version(self.version.number + 1, before.source, before.digest, before.loss)
        return self.version

    def _put_back(self, done: Swapped) -> None:
        with self._gate.changing():
            done.undo()
            self._on_change()


def _worse(before: float | None, after: float | None, most: float) -> str:
    if after is None or before is None:
        return ""
    if not math.isfinite(after):
        return "outputs on held-out text are not finite"
    if math.isfinite(before) and after > before + most:
        return f"held-out loss rose from {before:.3f} to {after:.3f} nats, more than {most:g}"
    return ""
