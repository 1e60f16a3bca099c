"""The first page: every run with its health, and an error card for one that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from equipoise.dashboard.health import KINDS, health
from equipoise.dashboard.records import Head
from equipoise.dashboard.runs import RunRef
from equipoise.dashboard.widgets import View, el, link, page, set_class, set_prop, set_text, show_health
from equipoise.dashboard.words import age, number, plural
from equipoise.monitor.store import StoreError

if TYPE_CHECKING:
    from nicegui.elements.mixins.text_element import TextElement

TICK_SECONDS = 0.5
SPARK_WIDTH, SPARK_HEIGHT = 120.0, 32.0
CELLS = ("step", "loss", "tokens/s", "worst layer", "repairs", "last flush")  # loss of training, tokens/s of serving


async def runs_page(view: View) -> None:
    """List the runs, the ones that need a person first, and keep the list up to date."""
    from nicegui import ui

    hub = view.hub
    heads = {run_id: await hub.head(run_id) for run_id in list(hub.runs)}
    rows: dict[str, RunRow] = {}
    with page(view, "Runs", "/"):
        with el("div", "title-row"):
            el("h1", text="Runs")
            summary = el("p", "muted", "", aria_live="polite")
        table = el("div", "runs", role="list")
        empty = el("p", "card empty", "No runs yet. They appear here when a run folder is written.")

    def add(run_id: str, head: Head | StoreError) -> None:
        with table:
            rows[run_id] = RunRow(hub.runs[run_id], head, hub.version(run_id))

    def count() -> None:
        words = [health(row.head).kind for row in rows.values()]
        wrong = sum(kind in ("critical", "broken", "warning") for kind in words)
        set_text(summary, f"{plural(len(rows), 'run')}, " + (f"{wrong} to look at" if wrong else "all quiet"))
        empty.set_visibility(not rows)

    for run_id, head in sorted(heads.items(), key=lambda item: urgency(item[1])):
        add(run_id, head)
    count()

    async def tick() -> None:
        for run_id in [each for each in rows if each not in hub.runs]:
            rows.pop(run_id).delete()
        for run_id in list(hub.runs):
            version = hub.version(run_id)
            if run_id in rows and rows[run_id].version == version:
                rows[run_id].grow_old()
                continue
            head = await hub.head(run_id)
            if run_id in rows:
                rows[run_id].version = version
                rows[run_id].show(head)
            else:
                add(run_id, head)
        count()

    ui.timer(TICK_SECONDS, tick)


def urgency(head: Head | StoreError) -> tuple[int, float]:
    """What is sorted by: what needs a person first, then the newest."""
    when = 0.0 if isinstance(head, StoreError) else head.flush_time
    return KINDS.index(health(head).kind), -when


class RunRow:
    """One run in the list; its texts change in place, so that it keeps the keyboard's focus."""

    def __init__(self, ref: RunRef, head: Head | StoreError, version: int) -> None:
        self.ref, self.head, self.version = ref, head, version
        with el("article", "card run", role="listitem") as self.card:
            with el("div", "run-name"):
                self.name = link("", f"/run/{ref.id}")
                with el("div"):
                    self.health = el("span", "pill")
                self.place = el("span", "muted small")
            self.cells = {name: _cell(name) for name in CELLS}
            with self.cells["loss"].box:
                self.spark = _sparkline()
            self.error = el("p", "error")
        self.show(head)

    def show(self, head: Head | StoreError) -> None:
        """Show the run as it is now."""
        self.head = head
        broken = isinstance(head, StoreError)
        set_class(self.card, "broken", broken)
        self.error.set_visibility(broken)
        for name, cell in self.cells.items():
            absent = "loss" if isinstance(head, Head) and head.is_server else "tokens/s"
            cell.box.set_visibility(not broken and name != absent)
        if isinstance(head, StoreError):
            set_text(self.name, self.ref.label)
            set_text(self.place, "")
            set_text(self.error, str(head))
        else:
            self._fill(head)
        self.grow_old()

    def _fill(self, head: Head) -> None:
        set_text(self.name, self.ref.label)
        set_text(self.place, head.name if head.name != self.ref.label else "")
        total = f" of {head.total_steps}" if head.total_steps else ""
        set_text(self.cells["step"].value, f"{head.step}{total}")
        set_text(self.cells["loss"].value, number(head.loss))
        set_text(self.cells["tokens/s"].value, number(head.tokens_per_s, ",.0f"))
        worst = head.worst
        text = (
            "-" if worst is None else f"{worst.layer}: {worst.effective_experts:.1f} of {worst.num_experts} effective"
        )
        set_text(self.cells["worst layer"].value, text)
        set_text(self.cells["repairs"].value, str(head.num_repairs))
        set_prop(self.spark, "d", spark_path(head.spark))

    def grow_old(self) -> None:
        """Renew what changes with time alone."""
        show_health(self.health, health(self.head))
        if isinstance(self.head, Head):
            set_text(self.cells["last flush"].value, age(self.head.flush_time))

    def delete(self) -> None:
        """Take the row off the page: its folder is gone."""
        self.card.delete()


def spark_path(values: tuple[float | None, ...]) -> str:
    """The loss as the path of a small SVG; a gap where it was not finite."""
    finite = [value for value in values if value is not None]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    scale = (SPARK_HEIGHT - 4) / (high - low) if high > low else 0.0
    path, pen = [], "M"
    for index, value in enumerate(values):
        if value is None:
            pen = "M"
            continue
        x, y = index * SPARK_WIDTH / (len(values) - 1), SPARK_HEIGHT - 2 - (value - low) * scale
        path.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return " ".join(path)


@dataclass(frozen=True)
class Cell:
    """A number with its name; box holds both."""

    box: TextElement
    value: TextElement


def _cell(name: str) -> Cell:
    with el("div", f"cell {name.replace(' ', '-').replace('/', '-per-')}") as box:
        el("span", "cell-name", name)
        return Cell(box, el("span", "cell-value", "-"))


def _sparkline() -> TextElement:
    with el("svg", "spark", viewBox=f"0 0 {SPARK_WIDTH:.0f} {SPARK_HEIGHT:.0f}", aria_hidden="true"):
        return el("path", "", d="")
