"""The section of a run's page about which experts of the chosen layer are chosen together."""

from __future__ import annotations

from functools import partial

import numpy as np

from equipoise.dashboard import charts
from equipoise.dashboard.records import Together
from equipoise.dashboard.widgets import Chart, View, el, legend, set_text
from equipoise.monitor.stats_selections import co_selection_lift
from equipoise.types import CoSelection

MAX_EXPERTS = 126  # as many as fit in a map's cells
NOT_RECORDED = (
    "Not recorded. This run's store keeps how many tokens reach each expert, not which experts are chosen together: "
    "Watch.co_select does."
)
ONE_EACH = "Each token has one expert: none are chosen together."


class CoSelectionPanel:
    """A map of the pairs, or why there is none."""

    def __init__(self, view: View) -> None:
        with el("section", "", aria_labelledby="co-selection"):
            el("h2", text="Co-selection", id="co-selection")
            self.note = el("p", "card empty", NOT_RECORDED)
            self.map = Chart(
                view,
                "Experts chosen together",
                420,
                hint="How often a token gets both, relative to chance with the same loads; blank: too few to tell.",
            )
            with self.map.box:
                legend("heat", ("¼ or less", "½", "1 = chance", "2", "4 or more"))

    def show(self, found: CoSelection | None) -> None:
        """Show a record; None: there is none."""
        why = NOT_RECORDED if found is None else ONE_EACH if one_each(found) else ""
        set_text(self.note, why)
        self.note.set_visibility(bool(why))
        self.map.box.set_visibility(not why)
        if found is not None and not why:
            pairs = together(found)
            self.map.show(partial(charts.together_map, pairs), reading(found, pairs))


def one_each(found: CoSelection) -> bool:
    """Whether no token chose two experts."""
    return int(found.counts_EE.sum()) == int(np.trace(found.counts_EE))


def together(found: CoSelection) -> Together:
    """The pairs of the busiest experts, at most 126."""
    busiest = np.argsort(-np.diagonal(found.counts_EE), kind="stable")[:MAX_EXPERTS]
    experts = np.sort(busiest)
    lift_EE = np.asarray(co_selection_lift(found.counts_EE))
    return Together(tuple(experts.tolist()), lift_EE[np.ix_(experts, experts)])


def reading(found: CoSelection, pairs: Together) -> str:
    """What was sampled, and the pair that is most often together, in words."""
    sampled = f"{found.layer}, {found.num_tokens} tokens sampled up to step {found.step}"
    if np.isnan(pairs.lift_EE).all():
        return f"{sampled}: too few to tell"
    row, column = np.unravel_index(np.nanargmax(pairs.lift_EE), pairs.lift_EE.shape)
    most = pairs.lift_EE[row, column]
    return f"{sampled}; strongest: {pairs.experts[row]} and {pairs.experts[column]}, {most:.1f} times chance"
