"""An incident told in moments: first symptom, alert, each change of a repair, the call for a human, the end.

Pure functions from records to texts. What stands on which page, and how it looks, is for the pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from equipoise.monitor.incidents import (
    EXHAUSTED,
    LOOK_AT_INPUT,
    PAGE,
    Incident,
    effect_text,
    other_numbers,
    state_text,
    target,
)
from equipoise.types import Action

MARKS = {  # the state of a repair, or a call for a human -> what its mark means
    "kept": "kept",
    "applied": "applied",
    "undone": "undone",
    "failed": "failed, nothing changed",
    "proposed": "proposed only",
    PAGE: "a human is called",
}
CROWD = 0.03  # of the timeline's width: marks that are nearer would cover each other


@dataclass(frozen=True)
class Moment:
    """One moment. kind: a key of `MARKS`, "critical", "good" or "", for the mark beside it. lines: what else to say."""

    step: int
    what: str
    kind: str
    lines: tuple[str, ...] = ()


def story_of(incident: Incident, last_step: int) -> list[Moment]:
    """The moments by step; of one step, in the order in which they happened. last_step: the newest of the run."""
    fired = f"value {incident.finding.value:.4g}, limit {incident.finding.threshold:.4g}"
    moments = [
        Moment(incident.since, "First symptom", "", ("the finding is seen for the first time",)),
        Moment(incident.fired, "Alert fires", "critical", (fired,)),
    ]
    if incident.finding.rule == EXHAUSTED:
        moments = [
            Moment(incident.since, "Repairs begin", ""),
            Moment(incident.fired, "A human is called", PAGE, (incident.finding.message,)),
        ]
    moments += [_change(action) for action in incident.changes]
    if incident.paged is not None and not any(action.kind == PAGE for action in incident.changes):
        moments.append(Moment(incident.paged, "A human is called", PAGE, ("no repair is left",)))
    if incident.resolved is None:
        moments.append(Moment(last_step, "Still firing", "critical", ("the newest flush",)))
    else:
        after = f"after {incident.resolved - incident.since} steps"
        moments.append(Moment(incident.resolved, "Resolved", "good", (after,)))
    return sorted(moments, key=lambda moment: moment.step)


def offsets(shares: Sequence[float]) -> list[int]:
    """How many mark widths each mark is moved, so that marks of nearly one place stand in a row, the oldest first.

    shares: where they belong, in [0, 1], rising. A row grows away from the nearer end of the track.
    """
    moved = [0] * len(shares)
    start = 0
    for i in range(1, len(shares) + 1):
        if i < len(shares) and shares[i] - shares[i - 1] < CROWD:
            continue
        first = 0 if shares[start] <= 0.5 else 1 - (i - start)
        moved[start:i] = range(first, first + i - start)
        start = i
    return moved


def _change(action: Action) -> Moment:
    """One change of a repair, or the call for a human."""
    if action.kind == PAGE:
        return Moment(action.step, "A human is called", PAGE, tuple(filter(None, (action.note,))))
    what = f"{state_text(action).capitalize()}: {action.kind} on {target(action)}"
    if action.kind == LOOK_AT_INPUT:
        what = f"{action.state.capitalize()}: look at the input of {target(action)}"
    unchanged = "nothing was changed" if action.state == "proposed" else ""
    lines = (effect_text(action.detail), other_numbers(action.detail), action.note, unchanged)
    return Moment(action.step, what, action.state, tuple(filter(None, lines)))
