"""The canary: how a model does on text that is held out, measured before and after a repair.

It tells damage from an unusual input: a damaged router routes the same text differently. It repairs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from equipoise.layer import moe_layers
from equipoise.monitor.baseline import Baseline
from equipoise.monitor.detectors import CollapseDetector
from equipoise.monitor.recorder import Recorder
from equipoise.monitor.rules import LoadDriftRule, LogitRule
from equipoise.recovery.held import by_expert
from equipoise.types import ALONE, Finding, Routed, RoutingStats, Team


@dataclass(frozen=True, eq=False)
class Health:
    """How the model does on the canary's text. loss: nats per token, not finite where an output is not.

    stats: of what the routers decided, by layer. straggler: what the busiest expert of a layer computed, relative to
    the fair share of all assignments: after a capacity, moves and diversions; for equipoise's layers.
    """

    loss: float
    stats: Mapping[str, RoutingStats]
    straggler: Mapping[str, float] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether every output is a number."""
        return math.isfinite(self.loss)

    def findings(self, baselines: Mapping[str, Baseline] | None = None) -> list[Finding]:
        """What the rules of the profile "relative" say about it; with baselines of the same text."""
        known = dict(baselines or {})
        rules = (CollapseDetector(), LogitRule(baselines=known), LoadDriftRule(known))
        return [finding for rule in rules for finding in rule(list(self.stats.values()))]


class Canary:
    """Measures a model by a call of the user's.

    model: with MoE layers. run: takes it in eval through the same held-out text each time, and returns the mean loss in
    nats per token. The text must bring each expert 100 assignments or so, or the routing can't be judged. team: the
    processes that hold the model; each takes its share of the text, and all measure the same.
    """

    def __init__(self, model: nn.Module, run: Callable[[], float], team: Team = ALONE) -> None:
        self._model, self.run, self._team = model, run, team
        self._layers = moe_layers(model)

    def measure(self, step: int) -> Health:
        """Run, under a recorder of its own. Other observers see it too, unless they are paused."""
        recorder = Recorder(self._model, self._team.sum)
        computed: dict[str, Tensor] = {}
        handles = [
            layer.tap.register_forward_hook(partial(_add_computed, computed, name))
            for name, layer in self._layers.items()
        ]
        try:
            loss = self.run()
        finally:
            recorder.detach()
            for handle in handles:
                handle.remove()
        stats = {each.layer: replace(each, step=step) for each in recorder.flush(step)}
        fair = {name: float(stats[name].counts_E.mean()) for name in computed}
        straggler = {
            name: float(by_expert(self._team, name, counts_e).max()) / max(fair[name], 1)
            for name, counts_e in computed.items()
        }
        return Health(loss, stats, straggler)


def _add_computed(sums: dict[str, Tensor], name: str, module: nn.Module, args: object, routed: Routed) -> None:
    counts_e = routed.plan.counts_e.detach()
    sums[name] = counts_e.clone() if name not in sums else sums[name] + counts_e
