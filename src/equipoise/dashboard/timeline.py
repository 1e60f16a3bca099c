"""The timeline of a run: a bar per alert over the steps, with diamonds for repairs; each row links to its incident."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlencode

from equipoise.dashboard.health import lasted, subject
from equipoise.dashboard.runs import RunRef
from equipoise.dashboard.widgets import el, link, plural, set_text
from equipoise.monitor.incidents import Incident
from equipoise.types import Action

MAX_ROWS = 60


def incident_address(ref: RunRef, incident: Incident) -> str:
    """The address of an incident's page: it names the alert and its first step, so it stays good."""
    return f"/run/{ref.id}/incident?{urlencode({'key': incident.key, 'since': incident.since})}"


class Timeline:
    """The section of a run's page. Rows are made anew only when an incident has changed."""

    def __init__(self, ref: RunRef) -> None:
        self.ref = ref
        self._shown: object = None
        with el("section", "", aria_labelledby="timeline"):
            el("h2", text="Alerts and repairs", id="timeline")
            self.note = el("p", "muted small")
            self.rows = el("ol", "timeline card")

    def show(self, incidents: Sequence[Incident], actions: Sequence[Action], last_step: int) -> None:
        """Show the newest incidents, and repairs that belong to none of them."""
        caused = {action for incident in incidents for action in map(_identity, incident.actions)}
        alone = [action for action in actions if _identity(action) not in caused]
        scale = max(1, last_step)
        shown = ([(i.key, i.since, i.resolved, len(i.actions)) for i in incidents], len(alone), scale)
        if shown == self._shown:
            return
        self._shown = shown
        text = f"{plural(len(incidents), 'alert')}, {plural(len(actions), 'repair')}, steps 0 to {last_step}."
        left_out = max(0, len(incidents) - MAX_ROWS)
        set_text(self.note, text + (f" The newest {MAX_ROWS} are shown." if left_out else ""))
        self.rows.clear()
        self.rows.set_visibility(bool(incidents or alone))
        with self.rows:
            for incident in incidents[:MAX_ROWS]:
                self._row(incident, scale)
            for action in alone[-MAX_ROWS:]:
                with el("li", "event"):
                    with el("div", "event-name"):
                        el("span", text=f"repair {action.kind} on {action.layer}")
                        el("span", "muted small", f"step {action.step}, because of {action.reason}")
                    with el("div", "track", aria_hidden="true"):
                        el("span", "diamond").style(f"--at: {action.step / scale:.4f}")

    def _row(self, incident: Incident, scale: int) -> None:
        kind = incident.finding.severity
        with el("li", "event"):
            with el("div", "event-name"):
                link(subject(incident), incident_address(self.ref, incident))
                repairs = f", {plural(len(incident.actions), 'repair')}" if incident.actions else ""
                el("span", "muted small", f"{kind}: {lasted(incident, scale)}{repairs}")
            with el("div", "track", aria_hidden="true"):
                begin, end = incident.since / scale, incident.lasted_until(scale) / scale
                open_ = " open" if incident.firing else ""
                el("span", f"bar {kind}{open_}").style(f"--from: {begin:.4f}; --to: {max(begin, end):.4f}")
                for action in incident.actions:
                    el("span", "diamond").style(f"--at: {min(1.0, action.step / scale):.4f}")


def _identity(action: Action) -> tuple[str, str, int, str]:
    return action.kind, action.layer, action.step, action.reason
