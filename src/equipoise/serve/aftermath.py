"""What a repair has left as it was: a router whose load is even again under a bias, and whose logits are still wide.

That belongs to the incident that the repair ended. It is shown, with what would mend it, and is no alert of its own:
nobody is called twice for one broken router. It is one when it becomes critical, or when it comes back after an end.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from equipoise.monitor.alerts import INHIBITING_RULE, alert_key
from equipoise.types import Action, Alert, Finding, RoutingStats

LEFT = ("logits",)  # rules about the router's weights, which a repair of the load does not touch
MENDS = ("router_rollback", "full_rollback", "reload", "lift")  # after these the router is another, or without a repair


class Aftermath:
    """Of a served model. Implements `Sink`, to hear of collapses and their repairs; `sift` is for `Watch.sift`."""

    def __init__(self) -> None:
        self._left: dict[str, Finding] = {}  # found with a collapse of its layer, and in every flush since
        self._collapsed: set[str] = set()
        self._kept: set[str] = set()  # layers whose collapse was ended by a repair that left the router as it was
        self._told: set[str] = set()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What repairs have left, by now."""
        return tuple(each for each in self._left.values() if each.layer in self._kept - self._collapsed)

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Nothing is kept of it."""

    def alert(self, alert: Alert) -> None:
        """A collapse begins, and what held the last one together does not count any more; or it ends."""
        layer = alert.finding.layer
        if alert.finding.rule == INHIBITING_RULE and alert.state == "resolved":
            self._collapsed.discard(layer)
        elif alert.finding.rule == INHIBITING_RULE:
            self._kept.discard(layer)
            self._told.discard(layer)

    def action(self, action: Action) -> None:
        """A repair of a collapse was kept, or the router is another one."""
        if action.kind in MENDS and action.state in ("applied", "kept"):
            self._kept -= {action.layer} if action.layer else set(self._kept)
        elif action.state == "kept" and action.reason == f"{action.layer}:{INHIBITING_RULE}":
            self._kept.add(action.layer)

    def sift(
        self, findings: Sequence[Finding], firing: Sequence[Alert], unjudged: Collection[str]
    ) -> Sequence[Finding]:
        """The findings of a flush without those that a repair has left. firing: alerts before this flush."""
        alerts = {alert.key for alert in firing}
        self._collapsed = {each.layer for each in findings if each.rule == INHIBITING_RULE}
        self._collapsed |= {alert.finding.layer for alert in firing if alert.finding.rule == INHIBITING_RULE}
        there = {alert_key(each): each for each in findings if each.rule in LEFT and each.severity != "critical"}
        before = {key: each for key, each in self._left.items() if key in there or each.layer in unjudged}
        begun = {key for key, each in there.items() if each.layer in self._collapsed and key not in alerts}
        still = before | {key: each for key, each in there.items() if key in before or key in begun}
        self._left = {key: each for key, each in still.items() if each.layer in self._collapsed | self._kept}
        held = {alert_key(each) for each in self.findings}
        return [each for each in findings if alert_key(each) not in held or each.severity == "critical"]

    def proposals(self, step: int) -> list[Action]:
        """Once per incident, in the flush that ends it: what would mend the router itself."""
        fresh = [each for each in self.findings if each.layer not in self._told]
        self._told |= {each.layer for each in fresh}
        return [
            Action(
                "router_rollback",
                each.layer,
                step,
                f"{each.layer}:{INHIBITING_RULE}",
                {},
                "proposed",
                f"the load is even, the router is as it was: {each.message}",
            )
            for each in fresh
        ]
