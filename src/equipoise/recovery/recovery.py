"""Detect, repair, verify, keep or undo, page: one object that a loop calls after each flush of the monitor.

One repair at a time is on trial. Held-out text says at once whether it made things worse, and the alert says after a
few flushes whether it helped. Proposes by default; acts only where it is told to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from equipoise.layer.mode import Mode
from equipoise.monitor.alerts import alert_key
from equipoise.monitor.baseline import Baseline
from equipoise.monitor.incidents import EXHAUSTED, LOOK_AT_INPUT, PAGE, Incident
from equipoise.recovery.actions import Change, Patient, outcome, take_back
from equipoise.recovery.canary import Canary, Health
from equipoise.recovery.case import Case, Trial, effect, loss_of, violation
from equipoise.recovery.catalogue import REPAIRS
from equipoise.recovery.gate import Gate
from equipoise.recovery.lifting import Lifting
from equipoise.recovery.patience import Patience
from equipoise.recovery.policy import Ladder, Policy, Situation
from equipoise.types import Action, ActionState, Alert, Finding, RoutingStats, Sink

STATE_VERSION = 1
CONTAINED_FLUSHES, CONTAINED_LOAD = 2, 1.3  # a capacity of 1.25 is rounded up
_URGENT = {"critical": 0, "warning": 1, "info": 2}


class Recovery:
    """Repairs a model while it is trained or served.

    patient: the model and what repairs may use. policy: which repair is next. act: False only proposes, once while an
    alert fires.
    canary: measures held-out text; without it a repair is judged by the alert alone, and an unusual input is not told
    from damage. sinks: get each change of a repair, and the page. gate: repairs and measurements wait for running
    forwards, for servers that run them in other threads. quiet: makes a context in which other observers do not count
    the canary's text.
    Its methods are called by one thread.
    """

    def __init__(
        self,
        patient: Patient,
        *,
        policy: Policy | None = None,
        act: bool = False,
        canary: Canary | None = None,
        patience: Patience = Patience(),  # noqa: B008 - frozen
        sinks: Sequence[Sink] = (),
        gate: Gate | None = None,
        quiet: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.patient, self.policy, self.act = patient, policy or Ladder(), act
        self._canary, self._patience, self._sinks, self._quiet = canary, patience, tuple(sinks), quiet
        self._gate = gate or Gate()
        self._cases: dict[str, Case] = {}
        self._trial: Trial | None = None
        self._rest = 0  # flushes to go until the next repair may begin
        self._said: list[Action] = []
        measure = None if canary is None else self._measure
        self._lifting = Lifting(patience, self._gate, measure, self._baselines)

    @property
    def on_trial(self) -> Action | None:
        """The repair that is on trial, or the lifting of one, if one is."""
        return self._lifting.on_trial if self._trial is None else self._trial.action

    # ------------------------------------------------------------------------------------------------- the loop

    def after_flush(
        self,
        step: int,
        firing: Sequence[Alert],
        stats: Sequence[RoutingStats],
        changed: Sequence[Alert] = (),
        *,
        act: bool | None = None,
    ) -> list[Action]:
        """Judge the repair on trial, and begin the next one if an alert calls for it. What was done, in order.

        firing: the alerts that are firing after this flush. stats: its records. changed: alerts that it fired or
        resolved, of which the resolved ones close their cases.
        act: for this flush, in place of the recovery's own.
        """
        self._said = []
        act = self.act if act is None else act
        by_key = {alert.key: alert for alert in firing}
        self._rest = max(0, self._rest - 1)
        if self._trial is not None:
            self._judge(step, by_key, stats)
        for alert in changed:
            if alert.state == "resolved":
                self._close(step, alert)
        may_lift = act and self._trial is None and not self._rest
        self._lifted(self._lifting.after_flush(step, self.patient, firing, stats, may_lift))
        for alert in sorted(firing, key=lambda each: (_URGENT[each.finding.severity], each.since_step)):
            if self._ripe(step, alert) and not self._rest and self._lifting.on_trial is None:
                while self._trial is None and self._begin(step, alert, stats, act):
                    pass  # what could not be done, or made things worse at once, makes room for the next
        return self._said

    def rescue(self, step: int, finding: Finding) -> list[Action]:
        """An output is not finite, and the loop can't go on: try the policy's repairs until held-out text is finite.

        Returns what was done; the last action is "kept" if that helped. Nothing without a canary or without `act`.
        """
        self._said = []
        if self._canary is None or not self.act:
            return self._said
        if self._trial is not None:
            self._end("undone", step, "the model broke while it was on trial")
        self._lifted(self._lifting.put_back(step, self.patient, "the model broke meanwhile"))
        alert = Alert(alert_key(finding), "firing", step, step, finding)
        self._ripe(step, alert)
        self._emit(alert)
        while self._begin(step, alert, (), act=True):
            if self._trial is None:
                continue  # it could not be done; the next one
            if self._measure(step).finite:
                self._end("kept", step, "every output is a number again")
                self._emit(replace(alert, state="resolved"))
                self._cases[alert.key].closed = True
                break
            self._end("undone", step, "outputs are still not finite")
        return self._said

    # ------------------------------------------------------------------------------------------------- one repair

    def _ripe(self, step: int, alert: Alert) -> bool:
        """Whether it is time to act on the alert. Called once per flush in which it fires."""
        case = self._cases.setdefault(alert.key, Case(step, alert.finding))
        case.reopen(step, alert.finding, self._patience.relapse_steps)
        case.waited += 1
        return alert.finding.severity == "critical" or case.waited >= self._patience.warning_flushes

    def _begin(self, step: int, alert: Alert, stats: Sequence[RoutingStats], act: bool) -> bool:
        """Begin the next repair for the alert, if there is one. Whether anything was done or said."""
        case = self._cases.setdefault(alert.key, Case(step, alert.finding))
        if case.done or (case.proposed and not act):
            return False
        before = None if self._canary is None else self._measure(step)
        kind = self.patient.team.tell(self.policy(self._situation(alert, case, before)))
        if kind is None:
            case.done = True
        elif kind in (PAGE, LOOK_AT_INPUT):
            self._tell_human(kind, step, alert, case)
        elif not act:
            self._say(Action(kind, alert.finding.layer, step, alert.key, {}, "proposed", REPAIRS[kind].summary))
        else:
            self._apply(Action(kind, alert.finding.layer, step, alert.key), alert.finding, before, stats)
        return kind is not None

    def _apply(self, action: Action, finding: Finding, before: Health | None, stats: Sequence[RoutingStats]) -> None:
        """Carry it out, whole or not at all; undo it at once if held-out text says that it made things worse."""
        kind, layer, step = action.kind, action.layer, action.step
        action = replace(action, detail=violation("before", layer, stats) | effect("before", layer, before))
        patient = replace(self.patient, health=before, seed=step)
        mode = patient.layers[layer].mode if layer in patient.layers else None

        def do() -> Change:
            with self._gate.changing():
                change = REPAIRS[kind].apply(patient, finding)
                self.patient.on_change()
            return change

        change, problem = patient.team.together(do, take_back, partial(outcome, patient))
        if change is None:
            self._say(replace(action, state="failed", note=problem))
            return
        self._trial = Trial(action, change, loss_of(before), mode)
        after = None if self._canary is None else self._measure(step)
        detail = {**action.detail, **change.detail, **effect("after", layer, after)}
        self._trial.action = replace(action, detail=detail, note=change.note)
        self._say(self._trial.action)
        if worse := self._worse(after):
            self._end("undone", step, worse)

    def _judge(self, step: int, firing: Mapping[str, Alert], stats: Sequence[RoutingStats]) -> None:
        """One flush later: keep it, undo it, or wait."""
        trial = self._trial
        assert trial is not None
        trial.flushes += 1
        kind, key = trial.action.kind, trial.action.reason
        if kind in self.policy.interim:
            self._end("undone", step, "the next step takes its place", stats)
            alert = firing.get(key) or Alert(key, "firing", step, step, self._cases[key].finding)
            self._begin(step, alert, stats, act=True)  # its first half was made: leave was given for both
        elif key not in firing:
            after = None if self._canary is None else self._measure(step)
            worse = self._worse(after)
            self._end("undone" if worse else "kept", step, worse or "the alert is resolved", stats, after)
            self._cases[key].closed = not worse
        elif REPAIRS[kind].judged_by != "alert" and self._canary is not None and trial.flushes >= CONTAINED_FLUSHES:
            self._judge_effect(step, stats)
        elif trial.flushes >= self._patience.trial_flushes:
            self._end("undone", step, f"the alert still fires {trial.flushes} flushes later", stats)

    def _judge_effect(self, step: int, stats: Sequence[RoutingStats]) -> None:
        """The repair leaves the router as it is, and the alert with it: held-out text says whether it helped."""
        trial = self._trial
        assert trial is not None
        layer, key, after = trial.action.layer, trial.action.reason, self._measure(step)
        worse = self._worse(after)
        if REPAIRS[trial.action.kind].judged_by == "load":
            load = after.straggler.get(layer, 1.0)
            worse = worse or ("" if load <= CONTAINED_LOAD else f"the busiest expert still has {load:.2f} loads")
            verdict = f"no expert has more than {load:.2f} fair loads"
        else:
            before = trial.loss_before if trial.loss_before is not None else math.inf
            worse = worse or ("" if after.loss < before else f"the held-out loss is {after.loss:.3f}, as before")
            verdict = "the held-out loss is lower"
        note = worse or f"{verdict}; the router is as it was, and its alert goes on"
        self._end("undone" if worse else "kept", step, note, stats, after)
        self._cases[key].done = not worse

    def _end(
        self,
        state: ActionState,
        step: int,
        note: str,
        stats: Sequence[RoutingStats] = (),
        after: Health | None = None,
    ) -> None:
        """The trial is over."""
        trial = self._trial
        assert trial is not None
        self._trial = None
        if trial.flushes:  # what was undone at once has had no effect to wait for
            self._rest = self._patience.cool_down
        if state == "undone":
            note += self._undo(trial)
        detail = {"steps": float(step - trial.action.step)} | effect("after", trial.action.layer, after)
        detail |= violation("after", trial.action.layer, stats)
        self._say(replace(trial.action, step=step, state=state, note=note, detail={**trial.action.detail, **detail}))
        if state == "kept":
            self._cases[trial.action.reason].kept.append((trial.action.kind, step))
        if state == "kept" and REPAIRS[trial.action.kind].last_resort:
            layer = trial.action.layer
            self._page(step, trial.action.reason, f"{trial.action.kind} holds {layer} together, at a price in quality")

    def _undo(self, trial: Trial) -> str:
        """Put back what was before; what could not be, as the end of a sentence."""
        name = trial.action.layer
        with self._gate.changing():
            self.patient.on_change()
            if trial.change is not None:
                trial.change.undo()
                return ""
            if trial.mode_before is not None and name in self.patient.layers:
                self.patient.set_mode(name, trial.mode_before)
        return "; the process was restarted meanwhile: what it changed in weights stays"

    # ------------------------------------------------------------------------------------------------- judgement

    def _measure(self, step: int) -> Health:
        assert self._canary is not None
        recent = self.patient.recent
        silence = recent.paused() if recent is not None else nullcontext()
        with self._gate.changing(), self._quiet(), silence:  # alone: others' tokens must not be measured, or lost
            return self._canary.measure(step)

    def _worse(self, after: Health | None) -> str:
        """Why the repair on trial has made things worse; empty when it has not."""
        trial = self._trial
        assert trial is not None
        before = trial.loss_before
        if after is None or before is None or not math.isfinite(before):
            return ""
        if not after.finite:
            return "outputs on held-out text are no longer finite"
        own = REPAIRS[trial.action.kind].tolerance
        tolerance = own if self._patience.tolerance is None else self._patience.tolerance
        if after.loss > before + tolerance:
            return f"held-out loss rose from {before:.3f} to {after.loss:.3f} nats, more than {tolerance:g}"
        return ""

    def _situation(self, alert: Alert, case: Case, health: Health | None) -> Situation:
        damaged = None if health is None else self._damaged(alert.finding, health)
        incident = Incident(alert.key, alert.since_step, case.fired, None, alert.finding, tuple(case.actions))
        kept = tuple(kind for kind, _ in case.kept)
        return Situation(incident, self.patient.training is not None, damaged, kept)

    def _damaged(self, finding: Finding, health: Health) -> bool | None:
        """Whether held-out text shows the finding too; None where it can't."""
        if not health.finite:
            return True
        baselines = self._baselines()
        if finding.rule == "drops" or (finding.rule == "load_drift" and not baselines):
            return None
        found = health.findings(baselines)
        return any(each.layer == finding.layer and each.rule == finding.rule for each in found)

    def _baselines(self) -> Mapping[str, Baseline]:
        known_good = self.patient.known_good
        return known_good.latest().baselines if known_good is not None and known_good.records else {}

    # ------------------------------------------------------------------------------------------------- telling

    def _tell_human(self, word: str, step: int, alert: Alert, case: Case) -> None:
        """A word of the policy's that is no repair: said once, and nothing more is tried."""
        case.done = True
        layer = alert.finding.layer
        if word == LOOK_AT_INPUT:
            if any(action.kind == word for action in case.actions):
                return  # said before, and it goes on
            note = "held-out text does not show it, the model is as it was: look at what is sent"
            self._say(Action(word, layer, step, alert.key, {}, "proposed", note))
            return
        tried = ", ".join(f"{action.kind} {action.state}" for action in case.actions) or "nothing could be"
        self._say(Action(PAGE, layer, step, alert.key, {}, "applied", f"tried: {tried}"))
        self._page(step, alert.key, f"{layer}: no repair is left for {alert.finding.rule}; tried: {tried}")

    def _page(self, step: int, key: str, message: str) -> None:
        case = self._cases[key]
        case.paged = True
        remedy = (
            f"Look at the incident {key}: go back to a checkpoint from before it, or take the model out of service."
        )
        finding = Finding(EXHAUSTED, case.finding.layer, None, "critical", 1.0, 0.0, message, remedy)
        self._emit(Alert(f"{case.finding.layer}:{EXHAUSTED}", "firing", case.fired, step, finding))

    def _close(self, step: int, alert: Alert) -> None:
        """An alert was resolved, by a repair or by itself; so is the page for it."""
        case = self._cases.get(alert.key)
        if case is None:
            return
        if self._trial is None or self._trial.action.reason != alert.key:
            case.closed = True
        if case.paged:
            case.paged = False
            finding = Finding(EXHAUSTED, alert.finding.layer, None, "critical", 0.0, 0.0, f"{alert.key} is over", "")
            key = f"{alert.finding.layer}:{EXHAUSTED}"
            self._emit(Alert(key, "resolved", case.fired, step, finding))

    def _lifted(self, done: Sequence[Action]) -> None:
        """Tell it. What is put back gets the time that a repair gets, before another one is tried."""
        for action in done:
            self._tell(action)
            if action.state == "undone":
                self._rest = self._patience.cool_down + self._patience.trial_flushes

    def _say(self, action: Action) -> None:
        """Remember it, and tell the sinks and the caller."""
        self._cases[action.reason].note(action)
        self._tell(action)

    def _tell(self, action: Action) -> None:
        self._said.append(action)
        for sink in self._sinks:
            sink.action(action)

    def _emit(self, alert: Alert) -> None:
        for sink in self._sinks:
            sink.alert(alert)

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Modes in force, open cases and the trial, JSON-able, for a checkpoint."""
        return {
            "version": STATE_VERSION,
            "modes": {
                name: layer.mode.to_json() for name, layer in self.patient.layers.items() if layer.mode != Mode()
            },
            "cases": {key: case.to_json() for key, case in self._cases.items()},
            "trial": None if self._trial is None else self._trial.to_json(),
            "rest": self._rest,
            "lifting": self._lifting.to_json(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned. Raises ValueError for something else, and changes nothing."""
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"recovery state: expected version {STATE_VERSION}, got {state.get('version')!r}; go on without it"
            )
        try:
            modes = {name: Mode.from_json(mode) for name, mode in state["modes"].items()}
            cases = {key: Case.from_json(case) for key, case in state["cases"].items()}
            trial = None if state["trial"] is None else Trial.from_json(state["trial"])
            rest = int(state["rest"])
            if "lifting" in state:  # those of versions before this one have none
                self._lifting.load_json(state["lifting"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"recovery state: expected what state_dict() returned, got {error!r}") from error
        for name in self.patient.layers:
            self.patient.set_mode(name, modes.get(name, Mode()))
        self._cases, self._trial, self._rest = cases, trial, rest
