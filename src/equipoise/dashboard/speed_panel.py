"""How fast a server is: answers, waiting, and what the experts of the chosen layer take. For runs of kind "server"."""

from __future__ import annotations

from functools import partial

from equipoise.dashboard import charts
from equipoise.dashboard.records import Series
from equipoise.dashboard.run_data import SPEED_CHARTS, RunData
from equipoise.dashboard.widgets import Chart, View, el, set_text
from equipoise.dashboard.words import number


class SpeedPanel:
    """The section of one server's page."""

    def __init__(self, view: View) -> None:
        with el("section", "", aria_labelledby="speed") as self.box:
            el("h2", text="Serving", id="speed")
            self.of = el("p", "hint")
            with el("div", "charts three"):
                self.charts = [Chart(view, title, 200) for title, _ in SPEED_CHARTS]
            self.experts = Chart(view, "Time of each expert, ms", 220, hint="In a step in which it has tokens; newest.")

    def show(self, data: RunData) -> None:
        """Draw what was read; nothing for a run that is no server."""
        self.box.set_visibility(data.head.is_server)
        if not data.head.is_server:
            return
        set_text(self.of, f"Over the last minute, by the engine's steps. Experts: {data.layer}.")
        self._show_experts(data)
        for chart, (_, wanted) in zip(self.charts, SPEED_CHARTS, strict=True):
            found = [(label, data.scalars.get(name.format(layer=data.layer))) for label, name in wanted]
            curves = [Series(label, curve.points) for label, curve in found if curve is not None and curve.points]
            reading = ", ".join(f"{curve.name} {number(curve.points[-1][1])}" for curve in curves)
            chart.show(partial(charts.lines, curves, marks=data.incidents, low=0.0), reading, empty=not curves)

    def _show_experts(self, data: RunData) -> None:
        """Only where they are timed one by one."""
        times = data.expert_times
        self.experts.box.set_visibility(times.slowest is not None)
        if times.slowest is not None:
            half, most = times.p50[times.slowest], times.p99[times.slowest]
            reading = f"{data.layer}; slowest: expert {times.slowest}, p50 {number(half)}, p99 {number(most)}"
            self.experts.show(partial(charts.expert_bars, times), reading)
