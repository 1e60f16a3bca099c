"""The sections about which experts of the chosen layer are chosen together: of one run, and of two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from equipoise.dashboard import charts
from equipoise.dashboard.palette import SMALLEST_LOAD
from equipoise.dashboard.records import Together
from equipoise.dashboard.widgets import Chart, View, chance_legend, el, legend, set_text
from equipoise.monitor.stats_selections import co_selection_lift
from equipoise.types import CoSelection

MAX_EXPERTS = 126  # as many as fit in a map's cells
NOT_RECORDED = (
    "Not recorded. This run's store keeps how many tokens reach each expert, not which experts are chosen together: "
    "Watch.co_select does."
)
AGAINST_CHANCE = "How often a token gets both, relative to chance with the same loads; blank: too few to tell."
SAME_NUMBERS = (
    "The second run's number divided by the first's. Experts of one number are the same only where the runs began with "
    "the same weights."
)
WORDS = ("first", "second")
ONE_EACH = "Each token has one expert: none are chosen together."


class CoSelectionPanel:
    """A map of the pairs, or why there is none."""

    def __init__(self, view: View) -> None:
        with el("section", "", aria_labelledby="co-selection"):
            el("h2", text="Co-selection", id="co-selection")
            self.note = el("p", "card empty", NOT_RECORDED)
            self.map = Chart(view, "Experts chosen together", 420, hint=AGAINST_CHANCE)
            with self.map.box:
                chance_legend()

    def show(self, found: CoSelection | None) -> None:
        """Show a record; None: there is none."""
        why = why_not(found)
        set_text(self.note, why)
        self.note.set_visibility(bool(why))
        self.map.box.set_visibility(not why)
        if found is not None and not why:
            pairs = together(found)
            self.map.show(partial(charts.together_map, pairs), reading(found, pairs))


class CoSelectionComparison:
    """Both runs' maps of the same experts, and what is different; or why there are none."""

    def __init__(self, view: View) -> None:
        with el("section", "", aria_labelledby="co-selection"):
            el("h2", text="Co-selection", id="co-selection")
            self.notes = [el("p", "card empty", "") for _ in range(2)]
            with el("div", "charts two"):
                self.maps = [Chart(view, f"Chosen together: {word}", 380, hint=AGAINST_CHANCE) for word in WORDS]
            self.difference = Chart(view, "Chosen together: second against first", 380, hint=SAME_NUMBERS)
            with self.difference.box:
                legend("heat", ("¼ or less", "½", "1 = as in the first", "2", "4 or more"))
            for each in self.maps:
                with each.box:
                    chance_legend()

    def show(self, found: Sequence[CoSelection | None], labels: Sequence[str]) -> None:
        """Show the two runs' records."""
        whys = [why_not(each) for each in found]
        good = [each for each, why in zip(found, whys, strict=True) if each is not None and not why]
        same_size = len({len(each.counts_EE) for each in good}) == 1
        for note, why, label in zip(self.notes, whys, labels, strict=True):
            set_text(note, f"{label}: {why}")
            note.set_visibility(bool(why))
        pairs: list[Together] = []
        for chart, each, why, label in zip(self.maps, found, whys, labels, strict=True):
            chart.box.set_visibility(not why)
            if each is not None and not why:
                pairs.append(together(each, busiest(good if same_size else [each])))
                told = f"{label}, {each.num_tokens} tokens up to step {each.step}{strongest(pairs[-1])}"
                chart.show(partial(charts.together_map, pairs[-1]), told)
        self.difference.box.set_visibility(len(good) == 2)
        if len(good) == 2 and same_size:
            apart = against(*pairs)
            self.difference.show(partial(charts.against_map, apart), most_different(apart))
        elif len(good) == 2:
            sizes = " and ".join(str(len(each.counts_EE)) for each in good)
            self.difference.show(partial(charts.against_map, pairs[0]), f"they have {sizes} experts", empty=True)


def why_not(found: CoSelection | None) -> str:
    """Why there is no map of it; empty where there is one."""
    return NOT_RECORDED if found is None else ONE_EACH if one_each(found) else ""


def one_each(found: CoSelection) -> bool:
    """Whether no token chose two experts."""
    return int(found.counts_EE.sum()) == int(np.trace(found.counts_EE))


def busiest(found: Sequence[CoSelection]) -> np.ndarray:
    """The experts with the most tokens in all of these, at most 126, in their order."""
    share_E = sum(np.diagonal(each.counts_EE) / max(each.num_tokens, 1) for each in found)
    return np.sort(np.argsort(-np.asarray(share_E), kind="stable")[:MAX_EXPERTS])


def together(found: CoSelection, experts: np.ndarray | None = None) -> Together:
    """The pairs of these experts, or of the busiest, at most 126."""
    experts = busiest([found]) if experts is None else experts
    lift_EE = np.asarray(co_selection_lift(found.counts_EE))
    return Together(tuple(experts.tolist()), lift_EE[np.ix_(experts, experts)])


def reading(found: CoSelection, pairs: Together) -> str:
    """What was sampled, and the pair that is most often together, in words."""
    return f"{found.layer}, {found.num_tokens} tokens sampled up to step {found.step}{strongest(pairs)}"


def strongest(pairs: Together) -> str:
    """The pair that is most often together, as the end of a sentence."""
    if np.isnan(pairs.lift_EE).all():
        return ": too few to tell"
    row, column = np.unravel_index(np.nanargmax(pairs.lift_EE), pairs.lift_EE.shape)
    most = pairs.lift_EE[row, column]
    return f"; strongest: {pairs.experts[row]} and {pairs.experts[column]}, {most:.1f} times chance"


def against(first: Together, second: Together) -> Together:
    """The second's numbers relative to the first's, of the same experts. Both are taken for 1/64 where they are less:
    what is never together in either is the same in both."""
    parts = [np.maximum(each.lift_EE, SMALLEST_LOAD) for each in (first, second)]  # NaN stays NaN
    return Together(first.experts, parts[1] / parts[0])


def most_different(apart: Together) -> str:
    """The pair that differs most, in words."""
    if np.isnan(apart.lift_EE).all():
        return "too few to tell"
    row, column = np.unravel_index(np.nanargmax(np.abs(np.log2(apart.lift_EE))), apart.lift_EE.shape)
    times = apart.lift_EE[row, column]
    return f"most different: {apart.experts[row]} and {apart.experts[column]}, {times:.2g} times the first"
