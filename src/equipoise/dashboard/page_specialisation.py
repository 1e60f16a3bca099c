"""The page of what a run's experts serve: domains, kinds of tokens, positions, words, and since when.

It shows specialisation.json of the run folder, again when the file changes, or says which command makes it.
"""

from __future__ import annotations

import asyncio
import math
import shlex
from functools import partial

from equipoise.dashboard import specialisation_charts as drawn
from equipoise.dashboard.charts import map_height, served_map, short_names
from equipoise.dashboard.hub import Mark, mark
from equipoise.dashboard.runs import RunRef
from equipoise.dashboard.widgets import (
    Chart,
    View,
    chance_legend,
    chooser,
    el,
    fill_chooser,
    link,
    page,
    set_address,
    set_text,
)
from equipoise.dashboard.words import percent
from equipoise.monitor.specialisation import FILE_NAME, POSITION, SPLITS, LayerRoles, Roles, Served, read_roles
from equipoise.monitor.store import store_path

TICK_SECONDS = 2.0
MAX_CARDS = 32  # experts with a card each; the busiest
NOTABLE = 1.05  # times chance: nearer to it is not worth a line
SIZES = 5  # of words, by how often they come
TITLES = {"domain": "Domains", "token class": "Kinds of tokens", "position": "Positions in the text"}
HINTS = {
    "domain": "How much more often than chance an expert gets tokens of a domain. Blank: too few tokens to tell.",
    "token class": "By what a token stands for, judged by its own letters.",
    "position": "By the place of a token in what the model sees at once, in doublings.",
}
SATURATION = "Of the last checkpoint's choices, the share that an earlier one makes for the same tokens."
CONTROLS = "The control of domains swaps whole documents; the others turn each window's labels round."


async def specialisation_page(view: View, ref: RunRef, layer: str) -> None:
    """Show what the experts of one run serve."""
    from nicegui import ui

    shown = SpecialisationPage(view, ref, layer)
    with page(view, f"Specialisation of {ref.label}", ""):
        shown.build()
    await shown.refresh()
    ui.timer(TICK_SECONDS, shown.tick)


class SpecialisationPage:
    """One browser's look at it."""

    def __init__(self, view: View, ref: RunRef, layer: str) -> None:
        self.view, self.ref, self.layer = view, ref, layer
        self.folder = store_path(ref.path).parent
        self.file = self.folder / FILE_NAME
        self.roles: Roles | None = None
        self.mark: Mark | None = None

    def build(self) -> None:
        """Lay the page out, without numbers."""
        link("← the run", f"/run/{self.ref.id}", "back")
        with el("div", "title-row"):
            el("h1", text=f"Specialisation of {self.ref.label}")
        self.error = el("p", "card error", role="alert")
        with el("div", "card empty") as self.absent:
            el("p", "", "Nothing was measured in this run yet. This command does, in about a minute:")
            el("p", "command", f"equipoise specialise {shlex.quote(str(self.folder))}")
        with el("div", "body") as self.body:
            self.subtitle = el("p", "muted")
            self.notes = el("div", "notes muted small")
            with el("div", "choosers card"):
                self.layer_choice = chooser("Layer", {}, "", self.choose_layer)
            self.maps = {name: Chart(self.view, TITLES[name], 260, hint=HINTS[name]) for name in SPLITS}
            for chart in self.maps.values():
                with chart.box:
                    chance_legend()
            el("p", "muted small", CONTROLS)
            with el("section", "", aria_labelledby="experts"):
                el("h2", text="What each expert serves", id="experts")
                self.vocabulary = el("p", "muted")
                self.cards = el("div", "role-cards")
            with el("section", "", aria_labelledby="saturation"):
                el("h2", text="Saturation", id="saturation")
                self.saturation = Chart(self.view, "Choices that are as they end", 260, hint=SATURATION)

    async def choose_layer(self, layer: str) -> None:
        """Look at another layer."""
        self.layer = layer
        self._show()
        set_address(f"/run/{self.ref.id}/specialisation", layer=layer)

    async def tick(self) -> None:
        """Read again when the file has changed."""
        if await asyncio.to_thread(mark, self.file) != self.mark:
            await self.refresh()

    async def refresh(self) -> None:
        """Read, and show what was read or why it could not be."""
        self.mark = await asyncio.to_thread(mark, self.file)
        try:
            self.roles = await asyncio.to_thread(read_roles, self.folder)
            set_text(self.error, "")
        except ValueError as error:
            self.roles = None
            set_text(self.error, f"This cannot be shown. {error}")
        self.error.set_visibility(bool(self.error.text))
        self._show()

    def _show(self) -> None:
        roles = self.roles
        self.absent.set_visibility(roles is None and not self.error.text)
        self.body.set_visibility(bool(roles and roles.layers))
        if not roles or not roles.layers:
            return
        names = [layer.layer for layer in roles.layers]
        layer = next((each for each in roles.layers if each.layer == self.layer), roles.layers[-1])
        fill_chooser(self.layer_choice, dict(zip(names, short_names(names), strict=True)), layer.layer)
        set_text(
            self.subtitle,
            f"Step {roles.step}: {roles.num_tokens:,} tokens in {roles.num_documents:,} documents, {roles.text}.",
        )
        self.notes.clear()
        with self.notes:
            for note in roles.notes:
                el("p", text=note)
        for name, chart in self.maps.items():
            chart.box.set_visibility(name in layer.splits)
            if name in layer.splits:
                found = layer.splits[name]
                chart.set_height(map_height(len(found.groups), 30, 16))
                chart.show(partial(served_map, found.lift_GE, found.groups), drawn.strongest(layer, name))
        self._show_experts(layer)
        curve, by_chance = roles.saturation, roles.saturation.chance.get(layer.layer, ())
        self.saturation.show(
            partial(drawn.saturation_lines, curve),
            f"by chance {percent(by_chance[0])} in {layer.layer}" if by_chance else "",
            empty=len(curve.steps) < 2,
        )

    def _show_experts(self, layer: LayerRoles) -> None:
        told = layer.vocabulary
        set_text(
            self.vocabulary,
            f"{told.entries:,} words and parts of words are frequent enough. Of their occurrences "
            f"{percent(told.top_share)} reach the word's first expert, by chance {percent(told.control_top_share)}. "
            "Larger words come more often; of the orange ones most occurrences come here; · is a space.",
        )
        self.cards.clear()
        with self.cards:
            for expert in busiest(layer):
                expert_card(layer, expert)
            if layer.num_experts > MAX_CARDS:
                el("p", "muted", f"The {MAX_CARDS} busiest of {layer.num_experts} experts; the file has all.")


def expert_card(layer: LayerRoles, expert: int) -> None:
    """One expert: load, the groups it serves most, its words."""
    with el("article", "card role-card"):
        with el("div", "role-head"):
            el("h3", text=f"Expert {expert}")
            el("span", "muted small", f"{percent(layer.load[expert] / max(layer.num_tokens, 1))} of the tokens")
        with el("ul", "role-groups small"):
            for name in layer.splits:
                best = layer.best_group(name, expert)
                where = "position " if name == POSITION else ""
                if best is not None and best[1] >= NOTABLE:
                    el("li", text=f"{where}{best[0]} ×{best[1]:.1f}", title=name)  # noqa: RUF001 - the sign of times
        with el("p", "cloud"):
            most = max((word.served for word in layer.tokens[expert]), default=1)
            for word in layer.tokens[expert]:
                told = f"{word.served} of {word.occurs} occurrences, {word.lift:.1f} times chance"
                el("span", f"word size-{size_of(word, most)} part-{part_of(word)}", shown(word), title=told)
            if not layer.tokens[expert]:
                el("span", "muted", "no words beyond chance")


def busiest(layer: LayerRoles) -> list[int]:
    """The experts with the most tokens, at most 32, in their order."""
    order = sorted(range(layer.num_experts), key=lambda expert: -layer.load[expert])
    return sorted(order[:MAX_CARDS])


def size_of(word: Served, most: int) -> int:
    """1 to 5, by the root of how often it comes, relative to the expert's most frequent word."""
    return max(1, min(SIZES, round(SIZES * math.sqrt(word.served / max(most, 1)))))


def part_of(word: Served) -> int:
    """0 below a quarter of the word's occurrences, 1 below a half, 2 below nine tenths, 3 above."""
    return sum(word.served >= limit * word.occurs for limit in (0.25, 0.5, 0.9))


def shown(word: Served) -> str:
    """The word, with its spaces as signs that can be seen."""
    return word.text.replace(" ", "·")
