"""The pieces that pages are made of: plain HTML elements, charts that follow the theme, the frame of a page.

Text reaches the browser as text, never as HTML. NiceGUI is imported where it is used: it is the extra `dashboard`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from equipoise.dashboard.charts import Options, nothing
from equipoise.dashboard.health import KINDS, Health
from equipoise.dashboard.hub import Hub
from equipoise.dashboard.palette import THEMES, Palette

if TYPE_CHECKING:
    from nicegui.element import Element
    from nicegui.elements.mixins.text_element import TextElement

STATIC = "/_equipoise"  # where the style sheet and the script are served


@dataclass
class View:
    """One browser's page: which theme it has, and what must be drawn again when that changes."""

    hub: Hub
    theme: str
    charts: list[Chart] = field(default_factory=list)

    @property
    def palette(self) -> Palette:
        """The colours of the page's theme."""
        return THEMES.get(self.theme, THEMES["light"])

    def change_theme(self, theme: str) -> None:
        """Draw the charts in another theme; what a browser sends that is none is passed over."""
        if theme not in THEMES or theme == self.theme:
            return
        self.theme = theme
        for chart in self.charts:
            chart.draw()


class Chart:
    """A titled chart in a figure, with a reading beside the title and a description for screen readers."""

    def __init__(self, view: View, title: str, height: int, *, hint: str = "", classes: str = "") -> None:
        from nicegui import ui

        self.view = view
        self._build: Callable[[Palette], Options] = nothing
        self._shown: Options | None = None
        with el("figure", f"card chart {classes}") as self.box:
            with el("figcaption"):
                el("h3", text=title)
                self.reading = el("span", "reading")
            if hint:
                el("p", "hint", hint)
            self.echart = ui.echart(nothing(view.palette)).classes("echart")
            self.empty = el("p", "empty", "Nothing recorded yet.")
        self.echart.props["role"] = "img"
        self.echart.props["aria-label"] = title
        self.set_height(height)
        self.title = title
        view.charts.append(self)

    def set_height(self, height: int) -> None:
        """Height of the drawing in pixels."""
        self.echart.style(f"height: {height}px")

    def show(self, build: Callable[[Palette], Options], reading: str = "", *, empty: bool = False) -> None:
        """Draw what `build` makes of the palette, now and whenever the theme changes."""
        self._build = build
        set_text(self.reading, reading)
        self.echart.set_visibility(not empty)
        self.empty.set_visibility(empty)
        label = f"{self.title}: {reading or 'chart'}"
        if self.echart.props.get("aria-label") != label:
            self.echart.props["aria-label"] = label
        self.draw()

    def draw(self) -> None:
        """Send the chart to the browser, unless it has it already."""
        options = self._build(self.view.palette)
        if options == self._shown:
            return
        self._shown = options
        self.echart.options.clear()
        self.echart.options.update(options)
        self.echart.update()


def el(tag: str, classes: str = "", text: str = "", **props: str) -> TextElement:
    """An HTML element with text. props: attributes; "_" in their names becomes "-", and a last one is dropped."""
    from nicegui.elements.mixins.text_element import TextElement

    element = TextElement(tag=tag, text=text)
    if classes:
        element.classes(classes)
    for key, value in props.items():
        element.props[key.rstrip("_").replace("_", "-")] = value
    return element


def set_text(element: TextElement, text: str) -> None:
    """Change a text, and send it only if it differs."""
    if element.text != text:
        element.set_text(text)


def set_class(element: Element, name: str, on: bool) -> None:
    """Set or take away one class, and send it only if that changes something."""
    if (name in element.classes) != on:
        element.classes(add=name) if on else element.classes(remove=name)


def set_prop(element: Element, name: str, value: str) -> None:
    """Set an attribute, and send it only if it differs."""
    if element.props.get(name) != value:
        element.props[name] = value


def show_health(pill: TextElement, state: Health) -> None:
    """The word and the colour of a run's health."""
    set_text(pill, state.word)
    for kind in KINDS:
        set_class(pill, kind, kind == state.kind)


def set_address(path: str, **query: str) -> None:
    """Change what the browser's address says, without a visit, so that what is shown can be shared or reloaded.

    query: what is empty is left out.
    """
    from nicegui import ui

    given = {key: value for key, value in query.items() if value}
    address = path + (f"?{urlencode(given)}" if given else "")
    ui.run_javascript(f"history.replaceState(history.state, '', {json.dumps(address)})")


def link(text: str, target: str, classes: str = "") -> TextElement:
    """A link inside the dashboard."""
    return el("a", classes, text, href=target)


def button(text: str, on_click: Callable[[], Any], classes: str = "", **props: str) -> TextElement:
    """A button."""
    element = el("button", f"button {classes}", text, type="button", **props)
    element.on("click", lambda _: on_click(), args=[])
    return element


def chooser(label: str, options: dict[str, str], value: str, on_change: Callable[[str], Any]) -> TextElement:
    """A labelled native select, which every browser lets be used with the keyboard. options: value -> text."""
    with el("label", "chooser"):
        el("span", text=label)
        element = el("select")
        fill_chooser(element, options, value)
    element.on("change", lambda e: on_change(str(e.args)), js_handler="(e) => emit(e.target.value)")
    return element


def fill_chooser(element: Element, options: dict[str, str], value: str) -> None:
    """Replace a select's options."""
    element.clear()
    with element:
        for key, text in options.items():
            el("option", "", text, value=key, **({"selected": "selected"} if key == value else {}))


@contextmanager
def page(view: View, title: str, current: str) -> Iterator[TextElement]:
    """The frame of a page: header, navigation, theme; what is made inside is its main part."""
    from nicegui import ui

    ui.page_title(f"{title} · equipoise")
    ui.on("eqp_theme", lambda e: view.change_theme(str(e.args)))
    link("Skip to content", "#content", "skip")
    with el("header", "top"):
        with el("a", "brand", href="/", aria_label="equipoise, all runs"):
            el("span", "mark", aria_hidden="true")
            el("span", text="equipoise")
        with el("nav", "", aria_label="Pages"):
            for text, target in (("Runs", "/"), ("Compare", "/compare")):
                each = link(text, target)
                if target == current:
                    each.props["aria-current"] = "page"
        el("span", "live", "live", title="This page is updated while it is open.", role="status")
        theme = el("button", "button quiet", "Theme: auto", type="button", data_theme_button="")
        theme.on("click", js_handler="() => eqp.cycle()")
    with el("div", "content", id="content", tabindex="-1") as main:
        yield main
    ui.run_javascript("eqp.show()")  # once connected: names the theme on the button, and tells it to the server


def legend(kind: str, ticks: tuple[str, ...], note: str = "") -> None:
    """The colours of a map: a ramp with its values below. kind: "heat" or "unevenness"."""
    with el("div", "legend"):
        with el("div", "scale"):
            el("div", f"ramp {kind}", aria_hidden="true")
            with el("div", "ticks"):
                for tick in ticks:
                    el("span", text=tick)
        if note:
            el("span", "note", note)


def chance_legend() -> None:
    """The legend of ratios to chance."""
    legend("heat", ("¼ or less", "½", "1 = chance", "2", "4 or more"))


def heat_legend(note: str = "") -> None:
    """The legend of relative loads."""
    legend("heat", ("¼ or less", "½", "1 = fair", "2", "4 or more"), note)
