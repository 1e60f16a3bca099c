"""One word for how a run is, and the sentences that pages say about incidents. Pure functions of records."""

from __future__ import annotations

import time
from dataclasses import dataclass

from equipoise.dashboard.records import Head
from equipoise.dashboard.words import plural
from equipoise.monitor.incidents import Incident
from equipoise.monitor.store import StoreError

SILENT_SECONDS = 300.0  # a run that says it is running, and has written nothing for so long


@dataclass(frozen=True)
class Health:
    """word: what is shown. kind: one of `KINDS`, for colour and order."""

    word: str
    kind: str


KINDS = ("critical", "broken", "warning", "good", "quiet")  # what needs a person first


def health(head: Head | StoreError, now: float | None = None) -> Health:
    """How a run is. now: seconds since 1970."""
    if isinstance(head, StoreError):
        return Health("cannot be read", "broken")
    if head.status == "failed":
        return Health("failed", "critical")
    if head.firing:
        critical = any(incident.finding.severity == "critical" for incident in head.firing)
        return Health(f"{plural(len(head.firing), 'alert')} firing", "critical" if critical else "warning")
    if head.status == "running":
        quiet_for = (time.time() if now is None else now) - head.flush_time
        return Health("silent", "warning") if quiet_for > SILENT_SECONDS else Health("running", "good")
    return Health(head.status[:40], "warning" if head.status == "interrupted" else "quiet")


def lasted(incident: Incident, now: int) -> str:
    """When it began, and how it went on."""
    begun = f"since step {incident.since}"
    if incident.resolved is None:
        return f"{begun}, firing for {max(0, now - incident.fired)} steps"
    return f"{begun}, fired at {incident.fired}, resolved at {incident.resolved}"


def subject(incident: Incident) -> str:
    """What it is about: the layer, and the expert where there is one."""
    expert = "" if incident.finding.expert is None else f", expert {incident.finding.expert}"
    return f"{incident.finding.rule} in {incident.finding.layer}{expert}"
