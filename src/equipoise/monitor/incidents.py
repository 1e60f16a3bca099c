"""Incidents: an alert's life with the repairs that it led to, put together from the records of a run. Pure functions.

The store keeps what happened, change by change; this is the one place that pairs the changes up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from equipoise.types import Action, Alert, Finding


@dataclass(frozen=True)
class Incident:
    """One alert's life.

    fired: the step at which the alert fired; since: the first step of the symptom. resolved: None while it lasts.
    finding: as it was when the alert fired. actions: the repairs made for it, as `repairs` has them, oldest first.
    """

    key: str
    since: int
    fired: int
    resolved: int | None
    finding: Finding
    actions: tuple[Action, ...] = ()

    @property
    def firing(self) -> bool:
        """Whether it still lasts."""
        return self.resolved is None

    def lasted_until(self, now: int) -> int:
        """The step of its end, or `now`."""
        return now if self.resolved is None else self.resolved


def incidents(alerts: Sequence[Alert], actions: Sequence[Action]) -> list[Incident]:
    """Alerts with the repairs made for them, the newest first; firing and resolved are paired by key and order."""
    found: list[Incident] = []
    open_by_key: dict[str, int] = {}
    for alert in alerts:
        index = open_by_key.get(alert.key)
        if alert.state == "firing" and index is None:
            open_by_key[alert.key] = len(found)
            found.append(Incident(alert.key, alert.since_step, alert.step, None, alert.finding))
        elif alert.state == "resolved" and index is not None:
            found[index] = replace(found[index], resolved=alert.step)
            del open_by_key[alert.key]
    made = repairs(actions)
    with_repairs = [replace(i, actions=tuple(action for action in made if _belongs(action, i))) for i in found]
    return sorted(with_repairs, key=lambda i: (i.fired, i.key), reverse=True)


def repairs(actions: Sequence[Action]) -> list[Action]:
    """One record per repair, oldest first, out of one per change of its state.

    step: of its application (or proposal). state, note: the last ones. detail: of all its records, later ones first.
    """
    found: list[Action] = []
    on_trial: dict[tuple[str, str, str], int] = {}
    for action in actions:
        name = (action.kind, action.layer, action.reason)
        if action.state in ("kept", "undone") and name in on_trial:
            index = on_trial.pop(name)
            begun = found[index]
            found[index] = replace(action, step=begun.step, detail={**begun.detail, **action.detail})
            continue
        if action.state == "applied":
            on_trial[name] = len(found)
        found.append(action)
    return found


def _belongs(action: Action, incident: Incident) -> bool:
    ended = incident.resolved is not None and action.step > incident.resolved
    return action.reason == incident.key and action.step >= incident.since and not ended
