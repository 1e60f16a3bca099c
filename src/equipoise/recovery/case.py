"""What a recovery remembers: the case of each alert, and the repair that is on trial. JSON-able for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from equipoise.layer.mode import Mode
from equipoise.monitor.incidents import LOOK_AT_INPUT
from equipoise.recovery.actions import Change
from equipoise.recovery.canary import Health
from equipoise.types import Action, Finding, RoutingStats


@dataclass
class Case:
    """One alert's repairs, in this incident and shortly before.

    actions: one per repair of this incident, with its last state. kept: (kind, step) of what was kept for earlier ones.
    waited: flushes that it has been firing for. done: nothing more is to be tried. closed: the alert is resolved.
    paged: a human was called.
    """

    fired: int
    finding: Finding
    actions: list[Action] = field(default_factory=list)
    kept: list[tuple[str, int]] = field(default_factory=list)
    waited: int = 0
    done: bool = False
    closed: bool = False
    paged: bool = False

    @property
    def proposed(self) -> bool:
        """Whether a repair was proposed for this firing of the alert."""
        return any(action.state == "proposed" and action.kind != LOOK_AT_INPUT for action in self.actions)

    def note(self, action: Action) -> None:
        """Add a record; a repair's later one takes the place of its earlier one."""
        same = (action.kind, "applied")
        self.actions = [each for each in self.actions if (each.kind, each.state) != same]
        self.actions.append(action)

    def reopen(self, step: int, finding: Finding, relapse_steps: int) -> None:
        """The alert fires: a new incident, unless the last one's repairs are recent and did not hold.

        While the alert goes on, what was proposed stays so: it is not said again.
        """
        self.finding = finding
        last = max([self.fired, *(action.step for action in self.actions)])
        if self.closed:
            self.actions, self.waited = [], 0
        elif self.actions and step - last > relapse_steps:
            self.actions = [action for action in self.actions if action.state == "proposed"]
        else:
            return
        self.fired = step
        self.done = self.closed = self.paged = False
        self.kept = [(kind, at) for kind, at in self.kept if step - at <= relapse_steps]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"kept": [list(each) for each in self.kept]}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Case:
        """What `to_json` made."""
        fields = dict(record)
        fields["finding"] = Finding(**fields["finding"])
        fields["actions"] = [Action(**action) for action in fields["actions"]]
        fields["kept"] = [(str(kind), int(step)) for kind, step in fields["kept"]]
        return Case(**fields)


@dataclass
class Trial:
    """The repair that is on trial.

    change: what undoes it; None after a restart, when only mode_before can be put back. loss_before: of held-out text,
    None without a canary.
    """

    action: Action
    change: Change | None
    loss_before: float | None
    mode_before: Mode | None
    flushes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the change."""
        mode = None if self.mode_before is None else self.mode_before.to_json()
        return {
            "action": asdict(self.action),
            "loss_before": self.loss_before,
            "mode_before": mode,
            "flushes": self.flushes,
        }

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Trial:
        """What `to_json` made."""
        mode = record["mode_before"]
        before = None if mode is None else Mode.from_json(mode)
        return Trial(Action(**record["action"]), None, record["loss_before"], before, int(record["flushes"]))


def loss_of(health: Health | None) -> float | None:
    """The loss on held-out text, where it was measured."""
    return None if health is None else health.loss


def effect(when: str, layer: str, health: Health | None) -> dict[str, float]:
    """Of held-out text, for an action's detail. when: "before" or "after"."""
    if health is None:
        return {}
    straggler = {f"straggler_{when}": health.straggler[layer]} if layer in health.straggler else {}
    return {f"loss_{when}": health.loss} | straggler


def violation(when: str, layer: str, stats: Sequence[RoutingStats]) -> dict[str, float]:
    """Of a flush, for an action's detail."""
    return {f"max_violation_{when}": each.max_violation for each in stats if each.layer == layer}
