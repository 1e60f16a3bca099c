"""Put a fault into a live model, and take out what was put in.

Which faults there are is in catalogue.py; each is a frozen dataclass that knows how to put itself in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from equipoise.types import ALONE, Team

Run = Callable[[], object]


@dataclass(frozen=True, eq=False)
class TeamRun:
    """A run of a model that several processes hold together, which all of them do together. Each puts the fault into
    what it holds.
    """

    run: Run
    team: Team

    def __call__(self) -> object:
        """Run."""
        return self.run()


def team_of(run: Run | None) -> Team:
    """The processes that do it."""
    return run.team if isinstance(run, TeamRun) else ALONE


def _nothing() -> None:
    """For faults that neither move nor leave anything to undo."""


@dataclass(frozen=True, eq=False)
class Change:
    """What a fault has done: how to undo it, and what it does further once per step."""

    undo: Callable[[], None] = _nothing
    advance: Callable[[], None] = _nothing


@runtime_checkable
class ModelFault(Protocol):
    """A fault of a model."""

    def put_in(self, model: nn.Module, run: Run | None) -> Change:
        """Do it. Raises ValueError, and changes nothing, where it can't be done."""
        ...


class Injection:
    """A fault that is in place. `remove` takes out what was put in, also after further training.

    The fault's docstring says what that means for it. Of several faults in one router, or in one recorder, take out the
    last one first.
    """

    def __init__(self, fault: Any, change: Change) -> None:
        self.fault = fault
        self._change = change
        self._in_place = True

    @property
    def in_place(self) -> bool:
        """Whether it has not been removed."""
        return self._in_place

    def advance(self) -> None:
        """Call once per step: a `Drift` goes on. For most faults, and after `remove`, it does nothing."""
        if self._in_place:
            self._change.advance()

    def remove(self) -> None:
        """Take the fault out. Twice is once."""
        if self._in_place:
            self._change.undo()
            self._in_place = False


def inject(model: nn.Module, fault: ModelFault, run: Run | None = None) -> Injection:
    """Put the fault into the model: equipoise's, or one of transformers 5 with MoE layers.

    run: a call that takes the model through its forward on typical data, to see the layer's inputs; its result is not
        used, and nothing is trained by it. A recorder that is attached counts it, unless it is `paused`. Faults that
        do not look at the inputs do not call it, and need none.
    Raises ValueError for a layer or an expert that the model does not have, and for a fault that is not of a model.
    """
    if not isinstance(fault, ModelFault):
        raise ValueError(
            f"inject: expected a fault of a model, got {type(fault).__name__}; see inject_counters for StaleCounters, "
            "skewed_rows for SkewedInput, damage for CheckpointDamage"
        )
    return Injection(fault, fault.put_in(model, run))


def check_positive(name: str, value: float, most: float = math.inf) -> None:
    """Raise ValueError unless it is a finite number in (0, most]."""
    if not (math.isfinite(value) and 0 < value <= most):
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"{name}: expected a number of more than 0{limit}, got {value}")


def check_seed(name: str, seed: int) -> None:
    """Raise ValueError unless random generators take it."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"{name}.seed: expected a whole number from 0 to 2^63 - 1, got {seed}")
