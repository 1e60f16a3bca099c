"""The page of one incident: its story, the numbers, its repairs, the load before, at and after.

Its address names the run, the alert and its first step, so it can be shared and stays good while the run goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from equipoise.dashboard import charts, reader
from equipoise.dashboard.health import lasted, subject
from equipoise.dashboard.palette import DEAD_NOTE
from equipoise.dashboard.records import Frame
from equipoise.dashboard.runs import RunRef
from equipoise.dashboard.story import story_of
from equipoise.dashboard.timeline import incident_address
from equipoise.dashboard.widgets import Chart, View, button, el, heat_legend, link, page
from equipoise.dashboard.words import percent
from equipoise.monitor.incidents import EXHAUSTED, REPAIR_COLUMNS, Incident, incidents, pages_of, repair_row
from equipoise.monitor.store import RunStore, StoreError
from equipoise.types import RoutingStats

TICK_SECONDS = 1.0
COLUMNS = tuple(name for name in REPAIR_COLUMNS if name != "why")  # of the repairs: the page is about the why
MAX_WINDOWS = 60  # in the map of the experts


@dataclass(frozen=True, eq=False)
class IncidentData:
    """frames: by name, "before", "when it fired", "after" or "now". history: the layer's records around it.

    pages_for: of an alert that calls a human, the incidents for which it does. page: of another, the alert that does.
    """

    incident: Incident
    frames: dict[str, Frame]
    history: tuple[RoutingStats, ...]
    last_step: int
    pages_for: tuple[Incident, ...] = ()
    page: Incident | None = None


async def incident_page(view: View, ref: RunRef, key: str, since: int) -> None:
    """Show one incident; it is drawn again while it lasts and the run goes on."""
    from nicegui import ui

    with page(view, f"Incident · {ref.label}", ""):
        body = el("div", "body")
    shown_version = -1

    async def refresh() -> None:
        nonlocal shown_version
        version = view.hub.version(ref.id)
        if version == shown_version:
            return
        shown_version = version
        data = await view.hub.read(ref, lambda run: read_incident(run, key, since))
        view.charts.clear()
        body.clear()
        with body:
            if isinstance(data, IncidentData):
                _draw(view, ref, data)
            else:
                absent = f"There is no alert {key} since step {since} in this run."
                el("p", "card error", f"This run cannot be read: {data}" if data else absent, role="alert")
                link(f"Back to {ref.label}", f"/run/{ref.id}")
        if isinstance(data, StoreError):
            shown_version = -1  # try again
        if isinstance(data, IncidentData) and not data.incident.firing and _settled(data):
            timer.deactivate()

    timer = ui.timer(TICK_SECONDS, refresh, immediate=False)  # the first look may be the last, and end it
    await refresh()


def read_incident(run: RunStore, key: str, since: int) -> IncidentData | None:
    """Read what the page shows; None when there is no such incident."""
    found = incidents(reader.alerts(run), reader.actions(run))
    incident = next((each for each in found if each.key == key and each.since == since), None)
    newest = reader.frame(run)
    if incident is None or newest is None:
        return None
    end = newest.step if incident.resolved is None else incident.resolved
    moments = {
        "before": reader.frame(run, incident.since - 1),
        "when it fired": reader.frame(run, incident.fired),
        "now" if incident.firing else "after": reader.frame(run, end),
    }
    steps = reader.flush_steps(run, reader.MAX_POINTS, (incident.since, incident.fired, end))
    span = max(1, end - incident.since)
    near = [step for step in steps if incident.since - 2 * span <= step <= end + 2 * span]
    stride = -(-len(near) // MAX_WINDOWS) if near else 1
    history = reader.history(run, incident.finding.layer, near[::stride])
    frames = {name: frame for name, frame in moments.items() if frame is not None}
    page = next((each for each in found if incident in pages_of(each, found)), None)
    return IncidentData(incident, frames, tuple(history), newest.step, tuple(pages_of(incident, found)), page)


def _settled(data: IncidentData) -> bool:
    """Whether nothing on the page can change any more."""
    end, begin = data.incident.lasted_until(data.last_step), data.incident.since
    return data.last_step > end + 2 * max(1, end - begin)


def _draw(view: View, ref: RunRef, data: IncidentData) -> None:
    incident, finding = data.incident, data.incident.finding
    link(f"← {ref.label}", f"/run/{ref.id}", "back")
    with el("div", "title-row"):
        el("h1", text=subject(incident).capitalize() if finding.rule == "collapse" else subject(incident))
        el("span", f"pill {'critical' if finding.severity == 'critical' else 'warning'}", finding.severity)
        el("span", f"pill {'critical' if incident.firing else 'good'}", "firing" if incident.firing else "resolved")
        share = button("Copy link", lambda: None, "quiet")
        share.on("click", js_handler="(e) => eqp.copyLink(e.target)")
    el("p", "lead", finding.message)
    el("p", "muted", f"{lasted(incident, data.last_step).capitalize()}. {finding.remedy}")
    _see_also(ref, data)
    with el("div", "incident-grid"):
        _story(data)
        _numbers(data)
    if incident.actions:
        _repairs(incident)
    el("h2", text="Load of the experts, before and after")
    with el("div", "charts three"):
        for name, frame in data.frames.items():
            chart = Chart(view, name.capitalize(), charts.map_height(len(frame.layers), 30, 9))
            chart.show(partial(charts.heat_map, frame), f"step {frame.step}")
    heat_legend(DEAD_NOTE)
    experts = Chart(view, f"Experts of {finding.layer} around it", 300)
    experts.show(partial(charts.expert_history, data.history, marks=[incident]), empty=not data.history)
    with experts.box:
        heat_legend(charts.MARKS_NOTE)


def _see_also(ref: RunRef, data: IncidentData) -> None:
    """The alert that calls a human and the incidents for which it does, linked both ways."""
    if not data.pages_for and data.page is None:
        return
    with el("p", "muted"):
        el("span", text="No repair is left for " if data.pages_for else "No repair was left, and a human was called: ")
        for each in data.pages_for or (data.page,):
            if each is not None:
                link(subject(each), incident_address(ref, each), "see-also")


def _story(data: IncidentData) -> None:
    """The moments, in order."""
    incident = data.incident
    with el("section", "card", aria_labelledby="story"):
        el("h2", text="What happened", id="story")
        if not incident.actions and incident.finding.rule != EXHAUSTED:
            el("p", "muted small", "No repair was recorded for this alert.")
        with el("ol", "story"):
            for moment in story_of(incident, data.last_step):
                with el("li", moment.kind):
                    el("span", "story-step", f"step {moment.step}")
                    with el("div"):
                        el("strong", text=moment.what)
                        for line in moment.lines:
                            el("div", "muted small", line)


def _repairs(incident: Incident) -> None:
    """A row for each repair, as it stands now."""
    with el("section", "card table-card", aria_labelledby="repairs"):
        el("h2", text="Repairs", id="repairs")
        with el("table"):
            with el("thead"), el("tr"):
                for name in COLUMNS:
                    el("th", "", name, scope="col")
            with el("tbody"):
                for action in incident.actions:
                    texts = dict(zip(REPAIR_COLUMNS, repair_row(action), strict=True))
                    with el("tr"):
                        for name in COLUMNS:
                            el("td", "note-cell" if name == "note" else "", texts[name])


def _numbers(data: IncidentData) -> None:
    """The layer's statistics at the three moments."""
    layer = data.incident.finding.layer
    columns = {name: frame.find(layer) for name, frame in data.frames.items()}
    num_experts = max((stats.num_experts for stats in columns.values() if stats), default=0)
    expert = data.incident.finding.expert
    with el("section", "card table-card", aria_labelledby="numbers"):
        el("h2", text="The numbers", id="numbers")
        with el("table"):
            with el("thead"), el("tr"):
                el("th", "", layer, scope="col")
                for name, frame in data.frames.items():
                    el("th", "number", f"{name}, {frame.step}", scope="col")
            with el("tbody"):
                _row(f"effective experts of {num_experts}", [_text(s, "effective_experts") for s in columns.values()])
                _row("MaxVio", [_text(s, "max_violation") for s in columns.values()])
                if expert is not None:
                    _row(f"load of expert {expert}, of fair", [_load(s, expert) for s in columns.values()])
                _row("dead experts", [str(len(s.dead_experts)) if s else "-" for s in columns.values()])
                _row("load entropy", [_text(s, "load_entropy") for s in columns.values()])
                _row("token entropy", [_text(s, "token_entropy") for s in columns.values()])
                _row("std of the logits", [_text(s, "logit_std") for s in columns.values()])
                _row("dropped", [percent(s.drop_rate) if s else "-" for s in columns.values()])


def _row(name: str, texts: list[str]) -> None:
    with el("tr"):
        el("th", "", name, scope="row")
        for text in texts:
            el("td", "number", text)


def _text(stats: RoutingStats | None, name: str) -> str:
    return f"{getattr(stats, name):.2f}" if stats else "-"


def _load(stats: RoutingStats | None, expert: int) -> str:
    return f"{stats.load_E[expert]:.2f}" if stats and expert < stats.num_experts else "-"
