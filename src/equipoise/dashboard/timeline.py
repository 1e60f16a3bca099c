"""The timeline of a run: a bar per alert over the steps, with a mark per repair; each row links to its incident.

How a repair went is told by the form of its mark and in words, not by colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlencode

from equipoise.dashboard.health import lasted, subject
from equipoise.dashboard.runs import RunRef
from equipoise.dashboard.story import MARKS, offsets
from equipoise.dashboard.widgets import el, link, set_text
from equipoise.dashboard.words import plural
from equipoise.monitor.incidents import PAGE, Incident, state_text, tally, target, without_alert
from equipoise.types import Action

MAX_ROWS = 60


def incident_address(ref: RunRef, incident: Incident) -> str:
    """The address of an incident's page: it names the alert and its first step, so it stays good."""
    return f"/run/{ref.id}/incident?{urlencode({'key': incident.key, 'since': incident.since})}"


class Timeline:
    """The section of a run's page. Rows are made anew only when an incident or a repair has changed."""

    def __init__(self, ref: RunRef) -> None:
        self.ref = ref
        self._shown: object = None
        with el("section", "", aria_labelledby="timeline"):
            el("h2", text="Alerts and repairs", id="timeline")
            self.note = el("p", "muted small")
            self.rows = el("ol", "timeline card")
            self.key = el("ul", "timeline-key small", aria_label="What the marks mean")

    def show(self, incidents: Sequence[Incident], repairs: Sequence[Action], last_step: int) -> None:
        """Show the newest incidents, and repairs that belong to none of them. repairs: a record for each."""
        scale = max(1, last_step)
        states = [(a.kind, a.layer, a.step, a.state, a.note) for a in repairs]
        shown = ([(i.key, i.since, i.resolved, i.paged) for i in incidents], states, scale)
        if shown == self._shown:
            return
        self._shown = shown
        alone = without_alert(incidents, repairs)
        set_text(self.note, summary(incidents, repairs, last_step))
        self.rows.clear()
        self.rows.set_visibility(bool(incidents or alone))
        with self.rows:
            for incident in incidents[:MAX_ROWS]:
                self._row(incident, scale)
            for action in alone[-MAX_ROWS:]:
                _alone(action, scale)
        self._explain({action.state for action in repairs} | {PAGE for i in incidents if i.paged is not None})

    def _row(self, incident: Incident, scale: int) -> None:
        kind = incident.finding.severity
        with el("li", "event"):
            with el("div", "event-name"):
                link(subject(incident), incident_address(self.ref, incident))
                done = f", repairs: {tally(incident.actions)}" if incident.actions else ""
                done += f", a human was called at {incident.paged}" if incident.paged is not None else ""
                el("span", "muted small", f"{kind}: {lasted(incident, scale)}{done}")
            with el("div", "track", aria_hidden="true"):
                begin, end = incident.since / scale, incident.lasted_until(scale) / scale
                open_ = " open" if incident.firing else ""
                el("span", f"bar {kind}{open_}").style(f"--from: {begin:.4f}; --to: {max(begin, end):.4f}")
                marks = [(action.step, str(action.state)) for action in incident.actions]
                marks += [(incident.paged, PAGE)] if incident.paged is not None else []
                _marks(marks, scale)

    def _explain(self, kinds: set[str]) -> None:
        """The legend, of the marks that there are."""
        self.key.clear()
        self.key.set_visibility(bool(kinds))
        with self.key:
            for kind, meaning in MARKS.items():
                if kind in kinds:
                    with el("li"):
                        el("span", f"diamond {kind}", aria_hidden="true")
                        el("span", text=meaning)


def summary(incidents: Sequence[Incident], repairs: Sequence[Action], last_step: int) -> str:
    """The timeline in a line."""
    text = f"{plural(len(incidents), 'alert')}; repairs: {tally(repairs)}; steps 0 to {last_step}."
    return text + (f" The newest {MAX_ROWS} are shown." if len(incidents) > MAX_ROWS else "")


def _alone(action: Action, scale: int) -> None:
    """A row for a repair that was made for no alert of the run."""
    with el("li", "event"):
        with el("div", "event-name"):
            el("span", text=f"repair {action.kind} on {target(action)}")
            el("span", "muted small", f"step {action.step}, {state_text(action)}, because of {action.reason}")
        with el("div", "track", aria_hidden="true"):
            _marks([(action.step, str(action.state))], scale)


def _marks(marks: Sequence[tuple[int, str]], scale: int) -> None:
    """One mark for each (step, kind), side by side where they are near each other."""
    ordered = sorted(marks, key=lambda mark: mark[0])
    shares = [min(1.0, step / scale) for step, _ in ordered]
    for share, moved, (_, kind) in zip(shares, offsets(shares), ordered, strict=True):
        el("span", f"diamond {kind}").style(f"--at: {share:.4f}; --moved: {moved}")
