"""Two runs side by side: the same curves in one chart, the same maps next to each other, at one step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from equipoise.dashboard import charts, reader
from equipoise.dashboard.co_selection_panel import CoSelectionComparison
from equipoise.dashboard.hub import REST, RETRY_SECONDS
from equipoise.dashboard.palette import DEAD_NOTE
from equipoise.dashboard.records import Evenness, Frame, Head, Series
from equipoise.dashboard.run_data import thinned
from equipoise.dashboard.runs import RunRef
from equipoise.dashboard.slider import Slider
from equipoise.dashboard.widgets import Chart, View, chooser, el, fill_chooser, heat_legend, link, page, set_address
from equipoise.dashboard.words import number, percent
from equipoise.monitor.incidents import incidents
from equipoise.monitor.store import RunStore, StoreError
from equipoise.types import CoSelection, RoutingStats

TICK_SECONDS = 0.8


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two runs. num_alerts: that fired, ever. together: which experts of the chosen layer are chosen
    together at the chosen step; None where it is not recorded."""

    head: Head
    steps: tuple[int, ...]
    layers: tuple[str, ...]
    frame: Frame | None
    history: tuple[RoutingStats, ...]
    evenness: Evenness
    scalars: dict[str, Series]
    num_alerts: int
    together: CoSelection | None


def read_side(run: RunStore, ref: RunRef, layer: int, step: int | None) -> Side:
    """Read one run. layer: its number in the model, the last where there are fewer."""
    steps, layers = reader.flush_steps(run), run.layers()
    name = layers[min(layer, len(layers) - 1)] if layers else ""
    return Side(
        head=reader.head(run, ref.path),
        steps=tuple(steps),
        layers=tuple(layers),
        frame=reader.frame(run, step),
        history=tuple(reader.history(run, name, steps)),
        evenness=reader.evenness(run, thinned(steps, reader.MAX_COLUMNS), layers),
        scalars={name: reader.scalar(run, name) for name in ("loss", "val_perplexity")},
        num_alerts=len(incidents(reader.alerts(run), [])),
        together=run.latest_co_selection(name, step),
    )


async def compare_page(view: View, first: str, second: str) -> None:
    """Compare two runs; without names, the first two that there are."""
    from nicegui import ui

    known = list(view.hub.runs)
    chosen = [run_id for run_id in (first, second) if run_id in known]
    chosen += [run_id for run_id in known if run_id not in chosen]
    with page(view, "Compare", "/compare"):
        el("h1", text="Compare two runs")
        if len(known) < 2:
            el("p", "card empty", "It takes two runs to compare. Start the dashboard with their common folder.")
            return
        comparison = Comparison(view, chosen[0], chosen[1])
        comparison.build()
    await comparison.refresh()
    ui.timer(TICK_SECONDS, comparison.tick)


class Comparison:
    """The page's state: which runs, which layer, which step."""

    def __init__(self, view: View, first: str, second: str) -> None:
        self.view, self.ids = view, [first, second]
        self.layer = 0
        self.step: int | None = None
        self.versions: tuple[int, ...] = ()
        self.layers: tuple[str, ...] = ()
        self.rest_until = 0.0

    def build(self) -> None:
        """Lay the page out, without numbers."""
        labels = {ref.id: ref.label for ref in self.view.hub.runs.values()}
        with el("div", "choosers card"):
            for side, word in enumerate(("First", "Second")):
                chooser(f"{word} run", labels, self.ids[side], partial(self.choose, side))
            self.layer_choice = chooser("Layer", {}, "", self.choose_layer)
        self.error = el("p", "card error", role="alert")
        self.table = el("div", "card table-card")
        el("h2", text="Load of the experts")
        with el("div", "charts two"):
            self.maps = [Chart(self.view, "First", 260), Chart(self.view, "Second", 260)]
        with el("div", "card"):
            heat_legend(DEAD_NOTE)
            self.slider = Slider(self.choose_step, "Step of both runs")
        el("h2", text="Curves")
        with el("div", "charts two"):
            self.charts = {
                name: Chart(self.view, name, 230)
                for name in ("Loss", "Validation perplexity", "Worst layer: effective share of its experts")
            }
            of_layer = ("Effective experts", "MaxVio", "Token entropy", "Std of the logits", "Dropped")
            self.layer_charts = {name: Chart(self.view, name, 230, hint="Of the chosen layer.") for name in of_layer}
        self.together = CoSelectionComparison(self.view)

    async def choose(self, side: int, run_id: str) -> None:
        """Take another run for one side."""
        if run_id not in self.view.hub.runs:
            return
        self.ids[side] = run_id
        self.step, self.versions = None, ()
        set_address("/compare", a=self.ids[0], b=self.ids[1])
        await self.refresh()

    async def choose_layer(self, value: str) -> None:
        """Look at another layer, by its number in the model."""
        self.layer = int(value) if value.isdecimal() else 0
        await self.refresh()

    async def choose_step(self, step: int | None) -> None:
        """Look at both runs at another step."""
        self.step = step
        await self.refresh()

    async def tick(self) -> None:
        """Read again when one of the two has changed."""
        if self._versions() != self.versions and time.monotonic() >= self.rest_until:
            await self.refresh()

    async def refresh(self) -> None:
        """Read both and show them, or why one cannot be read."""
        asked = (tuple(self.ids), self.layer, self.step)
        began, versions = time.monotonic(), self._versions()
        refs = [self.view.hub.runs.get(run_id) for run_id in self.ids]
        sides = await asyncio.gather(*(self._read(ref) for ref in refs))
        if asked != (tuple(self.ids), self.layer, self.step):
            return
        self.versions, self.rest_until = versions, time.monotonic() + REST * (time.monotonic() - began)
        if not all(isinstance(side, Side) for side in sides):
            self.versions, self.rest_until = (), time.monotonic() + RETRY_SECONDS
        wrong = [str(side) for side in sides if not isinstance(side, Side)]
        self.error.set_visibility(bool(wrong))
        self.error.set_text(" ".join(wrong))
        good = [side for side in sides if isinstance(side, Side)]
        if len(good) == 2:
            self._show(good)

    async def _read(self, ref: RunRef | None) -> Side | StoreError:
        if ref is None:
            return StoreError("this run is gone; choose another")
        return await self.view.hub.read(ref, lambda run: read_side(run, ref, self.layer, self.step))

    def _versions(self) -> tuple[int, ...]:
        return tuple(self.view.hub.version(run_id) for run_id in self.ids)

    def _labels(self) -> list[str]:
        first, second = (self.view.hub.runs[run_id].label for run_id in self.ids)
        return [first, second] if first != second else [f"{first} (a)", f"{second} (b)"]

    def _show(self, sides: Sequence[Side]) -> None:
        labels = self._labels()
        names = max((side.layers for side in sides), key=len)
        if names != self.layers:
            self.layers = names
            fill_chooser(self.layer_choice, {str(i): name for i, name in enumerate(names)}, str(self.layer))
        steps = sorted({step for side in sides for step in side.steps})
        self.slider.show(steps, (), self.step if self.step is not None else max(steps, default=0), self.step is None)
        for chart, side, label in zip(self.maps, sides, labels, strict=True):
            frame = side.frame
            chart.set_height(charts.map_height(max(len(side.layers) for side in sides), 30, 10))
            chart.show(
                partial(charts.heat_map, frame) if frame else charts.nothing,
                f"{label}, step {frame.step}" if frame else label,
                empty=frame is None,
            )
        self._table(sides, labels)
        for title, name in (("Loss", "loss"), ("Validation perplexity", "val_perplexity")):
            self._overlay(
                self.charts[title],
                [Series(label, side.scalars[name].points) for label, side in zip(labels, sides, strict=True)],
            )
        worst = [worst_over_time(side.evenness, label) for label, side in zip(labels, sides, strict=True)]
        self._overlay(
            self.charts["Worst layer: effective share of its experts"], worst, low=0.0, high=1.0, form="share"
        )
        self._show_layer(sides, labels)
        self.together.show([side.together for side in sides], labels)

    def _show_layer(self, sides: Sequence[Side], labels: Sequence[str]) -> None:
        picks: dict[str, tuple[Callable[[RoutingStats], float], str]] = {
            "Effective experts": (lambda stats: stats.effective_experts, "number"),
            "MaxVio": (lambda stats: stats.max_violation, "number"),
            "Token entropy": (lambda stats: stats.token_entropy, "number"),
            "Std of the logits": (lambda stats: stats.logit_std, "number"),
            "Dropped": (lambda stats: stats.drop_rate, "share"),
        }
        for title, (pick, form) in picks.items():
            curves = [
                charts.points(side.history, label, [pick(stats) for stats in side.history])
                for label, side in zip(labels, sides, strict=True)
            ]
            self._overlay(self.layer_charts[title], curves, low=0.0, form=form)

    def _overlay(
        self,
        chart: Chart,
        curves: Sequence[Series],
        *,
        low: float | None = None,
        high: float | None = None,
        form: str = "number",
    ) -> None:
        recorded = [curve for curve in curves if curve.points]
        ends = "; ".join(f"{curve.name} {_number(curve.points[-1][1], form)}" for curve in recorded)
        chart.show(partial(charts.lines, curves, form=form, low=low, high=high), ends, empty=not recorded)

    def _table(self, sides: Sequence[Side], labels: Sequence[str]) -> None:
        heads = [side.head for side in sides]
        rows = {
            "status": [head.status for head in heads],
            "step": [str(head.step) for head in heads],
            "loss": [number(head.loss) for head in heads],
            "validation perplexity": [number(head.val_perplexity) for head in heads],
            "layers, experts": [f"{h.num_layers}, {h.worst.num_experts if h.worst else 0}" for h in heads],
            "worst layer": [f"{h.worst.effective_experts:.1f} in {h.worst.layer}" if h.worst else "-" for h in heads],
            "alerts, ever": [str(side.num_alerts) for side in sides],
            "repairs": [str(head.num_repairs) for head in heads],
        }
        self.table.clear()
        with self.table, el("table"):
            with el("thead"), el("tr"):
                el("th", "", "", scope="col")
                for label, run_id in zip(labels, self.ids, strict=True):
                    with el("th", "", "", scope="col"):
                        link(label, f"/run/{run_id}")
            with el("tbody"):
                for name, texts in rows.items():
                    with el("tr"):
                        el("th", "", name, scope="row")
                        for text in texts:
                            el("td", "", text)


def worst_over_time(even: Evenness, name: str) -> Series:
    """At each step the effective share of the layer where it is smallest."""
    known = ~np.isnan(even.share_LS).all(axis=0) if even.share_LS.size else np.zeros(len(even.steps), dtype=bool)
    return Series(
        name,
        tuple((step, float(np.nanmin(even.share_LS[:, i]))) for i, step in enumerate(even.steps) if known[i]),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else percent(value) if form == "share" else number(value)
