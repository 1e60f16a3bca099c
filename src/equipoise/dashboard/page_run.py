"""The page of one run: health, load of every expert with a slider through time, one layer closely, training, incidents.

It reads again when the run's files change, and sends the browser what differs.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from equipoise.dashboard import charts, reader
from equipoise.dashboard.co_selection_panel import CoSelectionPanel
from equipoise.dashboard.health import health, lasted
from equipoise.dashboard.hub import REST, RETRY_SECONDS
from equipoise.dashboard.layer_panel import LayerPanel, LayerTable
from equipoise.dashboard.palette import DEAD_NOTE
from equipoise.dashboard.records import Evenness, Frame, Head, evenness_of
from equipoise.dashboard.run_data import MAIN_SCALARS, Choice, RunData, read_run
from equipoise.dashboard.runs import RunRef
from equipoise.dashboard.slider import Slider
from equipoise.dashboard.speed_panel import SpeedPanel
from equipoise.dashboard.timeline import Timeline, incident_address
from equipoise.dashboard.widgets import (
    Chart,
    View,
    chooser,
    el,
    fill_chooser,
    heat_legend,
    legend,
    link,
    page,
    set_address,
    set_text,
    show_health,
)
from equipoise.dashboard.words import age, number, plural
from equipoise.monitor.incidents import Incident, told
from equipoise.monitor.store import StoreError

if TYPE_CHECKING:
    from nicegui.elements.mixins.text_element import TextElement

TICK_SECONDS = 0.4
FIGURES = ("step", "loss", "val. perplexity", "tokens/s", "first token p99", "waiting", "worst layer", "last flush")
OF_TRAINING, OF_SERVING = ("loss", "val. perplexity"), ("first token p99", "waiting")
MAX_BANNERS = 4


async def run_page(view: View, ref: RunRef, choice: Choice) -> None:
    """Show one run."""
    from nicegui import ui

    shown = RunPage(view, ref, choice)
    with page(view, ref.label, ""):
        shown.build()
    await shown.refresh()
    ui.timer(TICK_SECONDS, shown.tick)


class RunPage:
    """One browser's look at one run. It holds what is shown and no connection."""

    def __init__(self, view: View, ref: RunRef, choice: Choice) -> None:
        self.view, self.ref, self.choice = view, ref, choice
        self.data: RunData | None = None
        self.version = -1
        self.rest_until = 0.0
        self._banners_of: list[tuple[str, int, str]] = []

    def build(self) -> None:
        """Lay the page out, without numbers."""
        with el("div", "title-row"):
            el("h1", text=self.ref.label)
            self.pill = el("span", "pill", role="status")
            self.subtitle = el("span", "muted")
            link("Specialisation", f"/run/{self.ref.id}/specialisation")
        self.error = el("p", "card error", role="alert")
        self.banners = el("div", "banners", aria_live="polite")
        with el("div", "body") as self.body:
            self._build_figures()
            self._build_load()
            self.layer = LayerPanel(self.view, self.choose_layer)
            self.speed = SpeedPanel(self.view)
            self._build_training()
            self.timeline = Timeline(self.ref)
            self.together = CoSelectionPanel(self.view)

    def _build_figures(self) -> None:
        self.figures: dict[str, TextElement] = {}
        self.figure_boxes: dict[str, TextElement] = {}
        with el("dl", "figures"):
            for name in FIGURES:
                with el("div", "card figure-box") as self.figure_boxes[name]:
                    el("dt", text=name)
                    self.figures[name] = el("dd", text="-")

    def _build_load(self) -> None:
        with el("section", "", aria_labelledby="load"):
            el("h2", text="Load of the experts", id="load")
            with el("div", "load-grid"):
                with el("div", "card load-card"):
                    self.heat = Chart(self.view, "Layers and experts", 300, classes="bare")
                    self.heat.echart.on_point_click(lambda e: self.choose_row(e.value))
                    heat_legend(DEAD_NOTE)
                    self.slider = Slider(self.choose_step)
                self.table = LayerTable(self.choose_layer)
            self.even = Chart(
                self.view,
                "Every layer over time",
                200,
                hint="Effective experts, as a share of the layer's experts. Strong colour: few do the work.",
            )
            with self.even.box:
                legend("unevenness", ("one expert", "half", "even"))

    def _build_training(self) -> None:
        with el("section", "", aria_labelledby="training"):
            self.training_title = el("h2", text="Training", id="training")
            with el("div", "charts two") as self.training:
                self.loss = Chart(self.view, "Loss", 240)
                self.perplexity = Chart(self.view, "Validation perplexity", 240)
            with el("details", "more"):
                el("summary", text="More scalars")
                self.scalar_choice = chooser("Scalar", {"": "none"}, "", self.choose_scalar)
                self.scalar_names: tuple[str, ...] = ()
                self.scalar = Chart(self.view, "Scalar", 220)

    # ------------------------------------------------------------------------------------------------- choosing

    async def choose_layer(self, layer: str) -> None:
        """Look at another layer closely."""
        self.choice = Choice(layer, self.choice.step, self.choice.scalar)
        await self.refresh()
        self._keep_address()

    async def choose_row(self, value: object) -> None:
        """A cell of the heat map was clicked: [expert, row, ...]."""
        frame = self.data.frame if self.data else None
        if frame and isinstance(value, list) and len(value) > 1 and isinstance(value[1], int | float):
            row = int(value[1])
            if 0 <= row < len(frame.layers):
                await self.choose_layer(frame.layers[row].layer)

    async def choose_step(self, step: int | None) -> None:
        """Look at another moment; None follows the newest."""
        self.choice = Choice(self.choice.layer, step, self.choice.scalar)
        if step is None:
            await self.refresh()
        else:
            layer = self.data.layer if self.data else ""
            found = await self.view.hub.read(
                self.ref, lambda run: (reader.frame(run, step), run.latest_co_selection(layer, step))
            )
            if not isinstance(found, StoreError) and found[0] and self.choice.step == step:
                self._show_frame(found[0])
                self.together.show(found[1])
        self._keep_address()

    async def choose_scalar(self, name: str) -> None:
        """Draw one more scalar."""
        self.choice = Choice(self.choice.layer, self.choice.step, name)
        await self.refresh()

    def _keep_address(self) -> None:
        step = "" if self.choice.step is None else str(self.choice.step)
        set_address(f"/run/{self.ref.id}", layer=self.choice.layer, step=step)

    # -------------------------------------------------------------------------------------------------- showing

    async def tick(self) -> None:
        """Read again if the files have changed and the last read is long enough ago."""
        if self.view.hub.version(self.ref.id) != self.version and time.monotonic() >= self.rest_until:
            await self.refresh()
        elif self.data:
            self._show_age(self.data.head)

    async def refresh(self) -> None:
        """Read, and show what was read or why it could not be."""
        version, began, choice = self.view.hub.version(self.ref.id), time.monotonic(), self.choice
        data = await self.view.hub.read(self.ref, lambda run: read_run(run, self.ref, choice))
        if choice != self.choice:
            return  # chosen again meanwhile: that read is under way
        self.error.set_visibility(isinstance(data, StoreError))
        if isinstance(data, StoreError):
            self.version, self.rest_until = -1, time.monotonic() + RETRY_SECONDS
            set_text(self.error, f"This run cannot be read: {data}")
            self.body.set_visibility(self.data is not None)  # what was read before stays
            show_health(self.pill, health(data))
            return
        self.data = data
        self.body.set_visibility(True)
        self._show(data)
        self.version = version
        self.rest_until = time.monotonic() + REST * (time.monotonic() - began)

    def _show(self, data: RunData) -> None:
        head = data.head
        self._show_head(data)
        self._show_banners(head)
        self.slider.show(data.steps, data.incidents, data.frame.step if data.frame else None, self.choice.step is None)
        if data.frame:
            self._show_frame(data.frame)
        self.heat.set_height(charts.map_height(len(data.layers), 30, 13))
        self.even.set_height(charts.map_height(len(data.layers), 16, 8))
        self.even.show(
            partial(charts.evenness_map, data.evenness),
            even_reading(data.evenness),
            empty=not data.steps,
        )
        self.layer.show(data)
        self._show_training(data)
        self.speed.show(data)
        self.timeline.show(data.incidents, data.repairs, head.step)
        self.together.show(data.together)

    def _show_head(self, data: RunData) -> None:
        head, names = data.head, dict(zip(data.layers, charts.short_names(data.layers), strict=True))
        set_text(
            self.subtitle,
            f"{head.name} · {plural(head.num_layers, 'MoE layer')} · {plural(head.num_repairs, 'repair')}",
        )
        total = f" of {head.total_steps}" if head.total_steps else ""
        worst = head.worst
        texts = {
            "step": f"{head.step}{total}",
            "loss": number(head.loss),
            "val. perplexity": number(head.val_perplexity),
            "tokens/s": number(head.tokens_per_s, ",.0f"),
            "first token p99": "-" if head.first_token_ms is None else f"{head.first_token_ms:,.0f} ms",
            "waiting": number(head.queue_depth, ",.0f"),
            "worst layer": "-"
            if worst is None
            else f"{worst.effective_experts:.1f} of {worst.num_experts} in {names.get(worst.layer, worst.layer)}",
        }
        for name, text in texts.items():
            set_text(self.figures[name], text)
            self.figure_boxes[name].set_visibility(name not in (OF_TRAINING if head.is_server else OF_SERVING))
        self._show_age(head)

    def _show_age(self, head: Head) -> None:
        set_text(self.figures["last flush"], age(head.flush_time))
        show_health(self.pill, health(head))

    def _show_banners(self, head: Head) -> None:
        wanted = [(incident.key, incident.since, last_repair(incident)) for incident in head.firing]
        if self._banners_of == wanted:
            return
        self._banners_of = wanted
        self.banners.clear()
        with self.banners:
            for incident in head.firing[:MAX_BANNERS]:
                with el("div", f"banner {incident.finding.severity}"):
                    el("strong", text=incident.finding.severity)
                    el("span", text=f"{incident.finding.message} ({lasted(incident, head.step)})")
                    el("span", "remedy", incident.finding.remedy)
                    if incident.actions:
                        el("span", "remedy", f"Last repair: {last_repair(incident)}.")
                    link("Open the incident", incident_address(self.ref, incident))
            if len(head.firing) > MAX_BANNERS:
                el("p", "muted", f"and {len(head.firing) - MAX_BANNERS} more alerts, below")

    def _show_frame(self, frame: Frame) -> None:
        uneven = min(frame.layers, key=evenness_of)
        self.heat.show(
            partial(charts.heat_map, frame),
            f"step {frame.step}; most uneven: {uneven.layer}, {uneven.effective_experts:.1f} of {uneven.num_experts}",
        )
        self.slider.at(frame.step)
        self.table.show(frame, self.data.layer if self.data else "")

    def _show_training(self, data: RunData) -> None:
        self.training.set_visibility(not data.head.is_server)
        set_text(self.training_title, "Numbers" if data.head.is_server else "Training")
        for chart, name in ((self.loss, "loss"), (self.perplexity, "val_perplexity")):
            curve = data.scalars.get(name)
            last = curve.points[-1][1] if curve and curve.points else None
            chart.show(
                partial(charts.lines, [curve] if curve else [], marks=data.incidents),
                number(last),
                empty=curve is None,
            )
        others = tuple(name for name in data.scalar_names if name not in MAIN_SCALARS[:2])
        if others != self.scalar_names:
            self.scalar_names = others
            fill_chooser(self.scalar_choice, {"": "none"} | {name: name for name in others}, self.choice.scalar)
        chosen = data.scalars.get(self.choice.scalar) if self.choice.scalar else None
        self.scalar.show(
            partial(charts.lines, [chosen] if chosen else [], marks=data.incidents),
            self.choice.scalar,
            empty=chosen is None,
        )


def last_repair(incident: Incident) -> str:
    """The newest repair made for it, in a line; "" without one."""
    return told(incident.actions[-1]) if incident.actions else ""


def even_reading(even: Evenness) -> str:
    """The lowest point of the map in words."""
    if not even.share_LS.size or np.isnan(even.share_LS).all():
        return ""
    row, column = np.unravel_index(np.nanargmin(even.share_LS), even.share_LS.shape)
    share = even.share_LS[row, column]
    return f"lowest: {share:.0%} in {even.layers[row]} at step {even.steps[column]}"
