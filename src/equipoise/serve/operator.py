"""What an operator does to a served model: reload, roll back, repair now, put faults in; each recorded as an action.

Its methods are for the care thread (`Care.call`). Nothing here knows HTTP.
"""

from __future__ import annotations

from typing import Any

from equipoise.disk.checkpoint import CHECKPOINTS
from equipoise.faults.catalogue import Fault, from_json, sentence
from equipoise.faults.injection import Injection, ModelFault, inject
from equipoise.layer.mode import NORMAL
from equipoise.models.run_files import Loaded
from equipoise.monitor.alerts import alert_key
from equipoise.recovery.canary import Canary
from equipoise.recovery.catalogue import REPAIRS
from equipoise.serve.care import Care
from equipoise.serve.delivery import delivery_state, queues_of
from equipoise.serve.weights import MOST_WORSE, Version, Weights
from equipoise.types import Action, Alert, Finding

OPERATOR = "operator"


class Operator:
    """Of one model under care. canary: judges new weights; None takes them unjudged."""

    def __init__(self, loaded: Loaded, care: Care, canary: Canary | None) -> None:
        self._care, self._canary = care, canary
        self._injected: list[Injection] = []
        self.weights = Weights(
            care.read,
            loaded.folder / CHECKPOINTS,
            loaded.checkpoint.name,
            care.engine.gate,
            None if canary is None else self._loss,
            on_change=care.engine.forget_cache,
        )

    def reload(self, name: str | None = None, most_worse: float = MOST_WORSE) -> Version:
        """See `Weights.reload`."""
        try:
            version = self.weights.reload(name, most_worse=most_worse)
        except ValueError as error:
            self._tell("reload", "", "failed", str(error))
            raise
        self._tell_version(version, f"weights of {version.source}")
        return version

    def undo_reload(self) -> Version:
        """See `Weights.undo`."""
        version = self.weights.undo()
        self._tell_version(version, f"back to {version.source}")
        return version

    def rollback_router(self, layer: str | None = None) -> list[Action]:
        """Routers and balancers of one layer, or of all, from the newest known-good record.

        Raises ValueError where there is no such layer or no record; what was rolled back before that stays so.
        """
        patient = self._care.recovery.patient
        names = list(self._care.layers) if layer is None else [layer]
        for name in names:
            patient.layer(name)
        done = []
        for name in names:
            finding = Finding(OPERATOR, name, None, "critical", 1.0, 0.0, "asked for by an operator", "")
            with self._care.engine.gate.changing():
                change = REPAIRS["router_rollback"].apply(patient, finding)
                self._care.engine.forget_cache()
            done.append(self._tell("router_rollback", name, "kept", change.note, **change.detail))
        return done

    def lift(self, layer: str | None = None) -> list[Action]:
        """Repairs in force end: the layers are again as they were configured. One layer, or all.

        Raises ValueError where there is no such layer.
        """
        care = self._care
        if layer is not None:
            care.recovery.patient.layer(layer)
        lifted = [name for name, each in care.layers.items() if each.mode != NORMAL and layer in (None, name)]
        with care.engine.gate.changing():
            for name in lifted:
                care.recovery.patient.set_mode(name, NORMAL)
            care.engine.forget_cache()
        return [self._tell("lift", name, "kept", "the repair in force was lifted by an operator") for name in lifted]

    def repair(self, layer: str, rule: str, message: str) -> list[Action]:
        """Someone else's alert calls for a repair."""
        finding = Finding(rule, layer, None, "critical", 1.0, 0.0, message, "Look at whoever sent it.")
        return self._care.look_for(Alert(alert_key(finding), "firing", 0, 0, finding))

    def set_act(self, act: bool) -> bool:
        """Whether repairs are made, or only proposed."""
        self._care.recovery.act = act
        return act

    @property
    def acts(self) -> bool:
        """Whether repairs are made, or only proposed. From any thread."""
        return self._care.recovery.act

    @property
    def faults(self) -> tuple[str, ...]:
        """Those that are in. From any thread."""
        return tuple(str(sentence(injection.fault)) for injection in tuple(self._injected))

    def put_in(self, record: object) -> str:
        """A fault of the model, as `equipoise inject` writes it; says what. Raises ValueError where it can't be."""
        fault: Fault = from_json(record)
        if not isinstance(fault, ModelFault):
            raise ValueError(f"fault: expected one of the model, got {sentence(fault)}; use `equipoise inject`")
        run = None if self._canary is None else self._canary.run
        with self._care.engine.gate.changing(), self._care.quietly():
            self._injected.append(inject(self._care.model, fault, run))
            self._care.engine.forget_cache()
        return str(sentence(fault))

    def take_out(self) -> list[str]:
        """All faults that were put in, the last one first."""
        taken = []
        with self._care.engine.gate.changing():
            while self._injected:
                injection = self._injected[-1]
                injection.remove()
                self._injected.pop()
                taken.append(str(sentence(injection.fault)))
            self._care.engine.forget_cache()
        return taken

    def advance_faults(self) -> None:
        """Those that grow, grow. Once per look."""
        for injection in self._injected:
            with self._care.engine.gate.changing():
                injection.advance()

    def state(self) -> dict[str, Any]:
        """All there is to know, as JSON."""
        care, trial = self._care, self._care.recovery.on_trial
        return {
            "weights": vars(self.weights.version) | {"checkpoints": self.weights.names()},
            "recovery": {
                "acts": self.acts,
                "policy": care.config.policy,
                "on_trial": None if trial is None else {"kind": trial.kind, "layer": trial.layer, "step": trial.step},
            },
            "breaker": None if care.guard is None else care.guard.states(),
            "experts_ms": {
                group: {"p50": 1000 * half, "p99": 1000 * most}
                for group, (half, most) in ({} if care.guard is None else care.guard.times()).items()
            },
            "modes": {name: layer.mode.to_json() for name, layer in care.layers.items() if layer.mode != NORMAL},
            "alerts": [vars(alert.finding) | {"since_step": alert.since_step} for alert in care.watch.alerts],
            "aftermath": [vars(finding) for finding in care.aftermath.findings],
            "faults": list(self.faults),
            "degraded": list(care.reasons()),
            "notes": list(care.notes),
            "delivery": delivery_state(queues_of(care.sinks)),
        }

    def _loss(self) -> float:
        """On held-out text, with nobody else's tokens in between."""
        assert self._canary is not None
        with self._care.engine.gate.changing(), self._care.quietly():
            return self._canary.run()

    def _tell_version(self, version: Version, note: str) -> None:
        loss = {} if version.loss is None else {"loss_after": version.loss}
        self._tell("reload", "", "kept", note, version=float(version.number), **loss)

    def _tell(self, kind: str, layer: str, state: Any, note: str, **detail: float) -> Action:
        action = Action(kind, layer, self._care.engine.num_steps(), OPERATOR, detail, state, note)
        for sink in self._care.sinks:
            sink.action(action)
        return action
