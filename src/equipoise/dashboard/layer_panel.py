"""The table of all layers beside the heat map; and one layer closely: experts over time, curves of its statistics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from equipoise.dashboard import charts
from equipoise.dashboard.records import Frame, Series, evenness_of
from equipoise.dashboard.run_data import RunData
from equipoise.dashboard.widgets import (
    Chart,
    View,
    chooser,
    el,
    fill_chooser,
    heat_legend,
    set_class,
    set_prop,
    set_text,
)
from equipoise.dashboard.words import percent
from equipoise.monitor.incidents import Incident
from equipoise.types import RoutingStats

if TYPE_CHECKING:
    from nicegui.elements.mixins.text_element import TextElement

COLUMNS = ("layer", "effective experts", "MaxVio", "dead", "dropped")
Choose = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class _Row:
    row: TextElement
    button: TextElement
    bar: TextElement
    cells: dict[str, TextElement]


class LayerTable:
    """Every layer at the chosen flush. Each name is a button that opens the layer below."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.rows: dict[str, _Row] = {}
        with el("div", "card table-card", tabindex="0", role="region", aria_label="Table of the layers"), el("table"):
            with el("thead"), el("tr"):
                for name in COLUMNS:
                    el("th", "" if name == "layer" else "number", name, scope="col")
            self.body = el("tbody")

    def show(self, frame: Frame, chosen: str) -> None:
        """Show a flush."""
        names = [stats.layer for stats in frame.layers]
        if names != list(self.rows):
            self._lay_out(names)
        for stats in frame.layers:
            row = self.rows[stats.layer]
            even = evenness_of(stats)
            set_text(row.cells["effective experts"], f"{stats.effective_experts:.1f} of {stats.num_experts}")
            set_text(row.cells["MaxVio"], f"{stats.max_violation:.2f}")
            set_text(row.cells["dead"], str(len(stats.dead_experts)))
            set_text(row.cells["dropped"], percent(stats.drop_rate))
            set_prop(row.bar, "style", f"width: {even:.1%}")
            set_class(row.bar, "low", even < 0.5)
            set_class(row.row, "chosen", stats.layer == chosen)
            set_prop(row.button, "aria-pressed", "true" if stats.layer == chosen else "false")

    def _lay_out(self, names: Sequence[str]) -> None:
        self.rows.clear()
        self.body.clear()
        with self.body:
            for name, short in zip(names, charts.short_names(names), strict=True):
                with el("tr") as row:
                    with el("td"):
                        press = el("button", "link-button", short, type="button", title=name)
                        press.on("click", lambda _, name=name: self.choose(name), args=[])
                    cells: dict[str, TextElement] = {}
                    for column in COLUMNS[1:]:
                        with el("td", "number"):
                            cells[column] = el("span", text="-")
                            if column == "effective experts":
                                with el("span", "even-bar", aria_hidden="true"):
                                    bar = el("span", "even-fill")
                self.rows[name] = _Row(row, press, bar, cells)


class LayerPanel:
    """The section of a run's page about one layer."""

    def __init__(self, view: View, choose: Choose) -> None:
        self.layers: tuple[str, ...] = ()
        self.layer = ""
        with el("section", "", aria_labelledby="layer"):
            with el("div", "title-row"):
                el("h2", text="One layer", id="layer")
                self.choice = chooser("Layer", {}, "", choose)
            with el("div", "charts wide-first"):
                with el("div", "card"):
                    self.experts = Chart(
                        view, "Experts over time", 300, classes="bare", hint="One row for each expert."
                    )
                    heat_legend(charts.MARKS_NOTE)
                self.effective = Chart(view, "Effective experts", 300)
            with el("div", "charts"):
                self.violation = Chart(view, "MaxVio", 190, hint="How far the busiest expert is above fair.")
                self.entropy = Chart(view, "Entropy", 190, hint="1 is even (load), or undecided (token).")
                self.logits = Chart(view, "Router logits", 190, hint="Standard deviation, and log-sum-exp.")
                self.drops = Chart(view, "Dropped and moved", 190, hint="Share of the assignments, by reason.")

    def show(self, data: RunData) -> None:
        """Show the chosen layer."""
        if (data.layers, data.layer) != (self.layers, self.layer):
            self.layers, self.layer = data.layers, data.layer
            fill_chooser(self.choice, {name: name for name in data.layers}, data.layer)
        history = data.history
        marks = [incident for incident in data.incidents if incident.finding.layer == data.layer]
        last = history[-1] if history else None
        self.experts.show(partial(charts.expert_history, data.map_history, marks=marks), data.layer, empty=not history)
        num_experts = last.num_experts if last else 1
        height = max(160, min(480, 52 + 28 * num_experts))
        self.experts.set_height(height)
        self.effective.set_height(height + 54)  # the legend and the hint beside it
        self._curves(
            self.effective,
            [charts.points(history, "effective", [s.effective_experts for s in history])],
            f"{last.effective_experts:.2f} of {num_experts}" if last else "",
            marks,
            low=0.0,
            high=float(num_experts),
        )
        self._curves(
            self.violation,
            [charts.points(history, "MaxVio", [s.max_violation for s in history])],
            f"{last.max_violation:.2f}" if last else "",
            marks,
            low=0.0,
        )
        entropies = {"load": [s.load_entropy for s in history], "token": [s.token_entropy for s in history]}
        self._curves(
            self.entropy,
            [charts.points(history, name, values) for name, values in entropies.items()],
            f"load {last.load_entropy:.2f}, token {last.token_entropy:.2f}" if last else "",
            marks,
            low=0.0,
            high=1.0,
        )
        logits = {"std": [s.logit_std for s in history], "log-sum-exp": [s.logit_logsumexp for s in history]}
        self._curves(
            self.logits,
            [charts.points(history, name, values) for name, values in logits.items()],
            f"std {last.logit_std:.3g}, log-sum-exp {last.logit_logsumexp:.3g}" if last else "",
            marks,
        )
        reading = percent(last.drop_rate) + " dropped" if last else ""
        self._curves(self.drops, drop_curves(history), reading, marks, low=0.0, form="share")

    def _curves(
        self,
        chart: Chart,
        curves: Sequence[Series],
        reading: str,
        marks: Sequence[Incident],
        low: float | None = None,
        high: float | None = None,
        form: str = "number",
    ) -> None:
        chart.show(
            partial(charts.lines, curves, form=form, low=low, high=high, marks=marks),
            reading,
            empty=not any(curve.points for curve in curves),
        )


def drop_curves(history: Sequence[RoutingStats]) -> list[Series]:
    """A curve for each reason of drops and moves that occurs, as a share of all assignments; for "tokens", of tokens.

    Without any, one curve of zeros named "dropped".
    """
    reasons = dict.fromkeys(
        (kind, reason) for stats in history for kind in ("dropped", "rerouted") for reason in getattr(stats, kind)
    )
    curves = []
    for kind, reason in reasons:
        values = [getattr(stats, kind).get(reason, 0) / _whole(stats, reason) for stats in history]
        if any(values):
            curves.append(charts.points(history, reason if kind == "rerouted" else f"{reason} lost", values))
    return curves or [charts.points(history, "dropped", [0.0] * len(history))]


def _whole(stats: RoutingStats, reason: str) -> int:
    return max(1, stats.num_tokens if reason == "tokens" else stats.num_assignments)
