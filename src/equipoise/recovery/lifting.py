"""Whether a layer does without the repair that holds it: tried when all has been well for long.

One layer at a time. Its mode is taken away on trial, as a repair is put in force on trial; where trouble comes back so
does the mode, and the next attempt waits twice as long. A bias that a balancer has taken over is no mode, and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from equipoise.layer.mode import NORMAL, Mode
from equipoise.monitor.baseline import Baseline
from equipoise.monitor.detectors import MIN_EXPECTED
from equipoise.recovery.actions import Patient
from equipoise.recovery.canary import Health
from equipoise.recovery.gate import Gate
from equipoise.recovery.patience import Patience
from equipoise.types import Action, ActionState, Alert, RoutingStats

LIFT = "lift"  # the kind of its records; an operator's have it too
REASON = "health"
MOST_WAIT = 64  # times the first
TOLERANCE = 0.05  # nats per token of held-out text, where the patience has none


@dataclass(frozen=True)
class Lifted:
    """A layer on trial without its repair. mode: to put back. flushes, assignments: that it has seen since."""

    action: Action
    mode: Mode
    flushes: int = 0
    assignments: int = 0


class Lifting:
    """Of one recovery. measure: held-out text, None without. baselines: of the layers in health."""

    def __init__(
        self,
        patience: Patience,
        gate: Gate,
        measure: Callable[[int], Health] | None,
        baselines: Callable[[], Mapping[str, Baseline]],
    ) -> None:
        self._patience, self._gate, self._measure, self._baselines = patience, gate, measure, baselines
        self._healthy: dict[str, int] = {}  # flushes in a row with tokens and without trouble, of layers under repair
        self._waits: dict[str, int] = {}  # flushes that the next attempt waits for, where one has failed
        self._trial: Lifted | None = None

    @property
    def on_trial(self) -> Action | None:
        """The record of the layer that is on trial, if one is."""
        return None if self._trial is None else self._trial.action

    def after_flush(
        self, step: int, patient: Patient, firing: Sequence[Alert], stats: Sequence[RoutingStats], may_begin: bool
    ) -> list[Action]:
        """Judge the trial, or begin one if it is time. What was done. stats: of this flush. may_begin: nothing else is
        on trial."""
        after = self._patience.lift_after
        if after is None and self._trial is None:
            return []
        num = {each.layer: each.num_assignments for each in stats if each.num_tokens}  # silence is not health
        if self._trial is not None:
            return self._judge(step, patient, firing, num)
        repaired = [name for name, layer in patient.layers.items() if layer.mode != NORMAL]
        self._waits = {name: wait for name, wait in self._waits.items() if name in repaired}
        self._healthy = {
            name: 0 if _trouble(name, firing) else self._healthy.get(name, 0) + (name in num) for name in repaired
        }
        due = [name for name, flushes in self._healthy.items() if flushes >= self._waits.get(name, after or 0)]
        return self._begin(step, patient, due[0]) if due and may_begin else []

    def put_back(self, step: int, patient: Patient, why: str) -> list[Action]:
        """End the trial, if there is one: the repair is in force again."""
        if self._trial is None:
            return []
        name, mode = self._trial.action.layer, self._trial.mode
        if patient.layers[name].mode != NORMAL:
            return [self._end("failed", step, "the layer was changed otherwise meanwhile")]
        _set(self._gate, patient, name, mode)
        wait = self._waits.get(name, self._patience.lift_after or 1)
        self._waits[name] = min(2 * wait, MOST_WAIT * (self._patience.lift_after or 1))
        return [self._end("undone", step, f"{why}; the repair is in force again")]

    def _begin(self, step: int, patient: Patient, name: str) -> list[Action]:
        before = None if self._measure is None else self._measure(step)
        mode = patient.layers[name].mode
        _set(self._gate, patient, name, NORMAL)
        after = None if self._measure is None else self._measure(step)
        losses = {} if before is None or after is None else {"loss_before": before.loss, "loss_after": after.loss}
        note = f"without the repair on trial, after {self._healthy[name]} flushes in health"
        action = Action(LIFT, name, step, REASON, losses, "applied", note)
        self._trial = Lifted(action, mode)
        worse = "" if before is None or after is None else self._worse(name, before, after)
        return [action, *(self.put_back(step, patient, worse) if worse else [])]

    def _worse(self, name: str, before: Health, after: Health) -> str:
        """Why the layer does not do without it, by held-out text; empty where it does."""
        tolerance = TOLERANCE if self._patience.tolerance is None else self._patience.tolerance
        if not after.loss <= before.loss + tolerance:
            return f"held-out loss rose from {before.loss:.3f} to {after.loss:.3f} nats"
        found = [each.rule for each in after.findings(self._baselines()) if each.layer == name]
        return f"held-out text shows {found[0]}" if found else ""

    def _judge(self, step: int, patient: Patient, firing: Sequence[Alert], num: Mapping[str, int]) -> list[Action]:
        trial = self._trial
        assert trial is not None
        name = trial.action.layer
        if _trouble(name, firing):
            return self.put_back(step, patient, "an alert came back")
        self._trial = trial = replace(
            trial, flushes=trial.flushes + (name in num), assignments=trial.assignments + num.get(name, 0)
        )
        if patient.layers[name].mode != NORMAL:
            return [self._end("failed", step, "the layer was changed otherwise meanwhile")]
        # twice what an opinion takes: the rules look back as far as that, and what they see must be from after it
        enough = 2 * MIN_EXPECTED * patient.layers[name].num_experts
        if trial.flushes < self._patience.trial_flushes or trial.assignments < enough:
            return []
        self._waits.pop(name, None)
        return [self._end("kept", step, "no alert came back: the repair is lifted")]

    def _end(self, state: ActionState, step: int, note: str) -> Action:
        trial = self._trial
        assert trial is not None
        self._trial = None
        self._healthy.pop(trial.action.layer, None)
        detail = {**trial.action.detail, "steps": float(step - trial.action.step)}
        return replace(trial.action, step=step, state=state, note=note, detail=detail)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        trial = self._trial
        told = None if trial is None else asdict(trial) | {"mode": trial.mode.to_json()}
        return {"healthy": dict(self._healthy), "waits": dict(self._waits), "trial": told}

    def load_json(self, record: Mapping[str, Any]) -> None:
        """Go on from what `to_json` made. Raises KeyError or TypeError for something else, and changes nothing."""
        healthy = {str(name): int(flushes) for name, flushes in dict(record["healthy"]).items()}
        waits = {str(name): int(flushes) for name, flushes in dict(record["waits"]).items()}
        trial, told = None, record["trial"]
        if told is not None:
            trial = Lifted(**{**told, "action": Action(**told["action"]), "mode": Mode.from_json(told["mode"])})
        self._healthy, self._waits, self._trial = healthy, waits, trial


def _trouble(name: str, firing: Sequence[Alert]) -> bool:
    """Whether an alert of that layer fires, or a critical one of any."""
    return any(alert.finding.layer == name or alert.finding.severity == "critical" for alert in firing)


def _set(gate: Gate, patient: Patient, name: str, mode: Mode) -> None:
    with gate.changing():
        patient.set_mode(name, mode)
        patient.on_change()
