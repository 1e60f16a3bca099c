"""Try repairs on a live model one after the other, measure each on held-out text, and undo it: what would help?

Nothing is left behind but the numbers. The caller's thread must be the only one that uses the model meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from equipoise.recovery.actions import Patient, outcome, take_back
from equipoise.recovery.canary import Canary, Health
from equipoise.recovery.catalogue import REPAIRS
from equipoise.types import Finding


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """What one repair would do. health: on held-out text with the repair in force; None where it can't be done.

    note: why it can't, or what it did.
    """

    kind: str
    health: Health | None
    note: str


def rehearse(
    patient: Patient,
    canary: Canary,
    finding: Finding,
    kinds: Sequence[str],
    *,
    quiet: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[Rehearsal]:
    """Each repair of kinds on its own, and undone. quiet: makes a context in which observers do not count the text."""
    with quiet(), patient.recent.paused() if patient.recent is not None else nullcontext():
        patient = replace(patient, health=canary.measure(0))
        return [_try(patient, canary, finding, kind) for kind in kinds]


def _try(patient: Patient, canary: Canary, finding: Finding, kind: str) -> Rehearsal:
    change, problem = patient.team.together(
        partial(REPAIRS[kind].apply, patient, finding), take_back, partial(outcome, patient)
    )
    if change is None:
        return Rehearsal(kind, None, problem)
    try:
        return Rehearsal(kind, canary.measure(0), change.note)
    finally:
        change.undo()
