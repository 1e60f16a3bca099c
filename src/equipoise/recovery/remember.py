"""Keep a moment as known-good: measure it, renew the stand-ins while experts are healthy, put it into the registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from equipoise.layer import FeedForward, MoE
from equipoise.layer.mode import NORMAL
from equipoise.monitor.baseline import baselines_of
from equipoise.recovery.actions import Patient
from equipoise.recovery.canary import Canary, Health
from equipoise.recovery.dense_path import build_dense_paths, dense_state, diverted
from equipoise.recovery.known_good import Record, RefusedError
from equipoise.recovery.router_state import router_state
from equipoise.types import Alert


def remember(
    patient: Patient,
    canary: Canary,
    dense: dict[str, FeedForward],
    step: int,
    *,
    checkpoint: str | None = None,
    firing: Sequence[Alert] = (),
    distil: bool = True,
) -> Record:
    """The record of this moment. Other observers see the canary's text, unless the caller pauses them.

    dense: the stand-ins, those of `patient`; distilled anew on the canary's text if the moment is healthy and `distil`.
    firing: the alerts that are firing. Modes in force belong to the record: a router that is even under a bias is known
    to be good with that bias alone. Raises RefusedError, with the reason, when something is wrong, and ValueError
    without a registry.
    """
    if patient.known_good is None:
        raise ValueError("remember: there is no registry; pass run_folder= to recover")
    health = canary.measure(step)
    findings = [*(alert.finding for alert in firing), *health.findings()]
    healthy = patient.team.tell(health.finite and all(finding.severity == "info" for finding in findings))
    note = _renew(patient, canary, dense, health) if distil and healthy else ""
    return _put(
        patient,
        step=step,
        tensors=router_state(patient.model) | dense_state(dense),
        baselines=baselines_of(health.stats.values()),
        loss=health.loss,
        checkpoint=checkpoint,
        findings=findings,
        note=note,
        modes={name: layer.mode.to_json() for name, layer in patient.layers.items() if layer.mode != NORMAL},
    )


def _put(patient: Patient, **content: Any) -> Record:
    """By the main process; all learn what came of it."""
    assert patient.known_good is not None
    told: tuple[dict[str, Any] | None, str] = None, ""
    if patient.team.is_main:
        try:
            told = patient.known_good.put(**content).to_json(), ""
        except RefusedError as refused:
            told = None, str(refused)
    record, refusal = patient.team.tell(told)
    if record is None:
        raise RefusedError(refusal)
    return Record.from_json(record)


def _renew(patient: Patient, canary: Canary, dense: dict[str, FeedForward], health: Health) -> str:
    """Distil a stand-in for each layer whose experts have tokens; says what all of them would cost."""
    layers = {name: layer for name, layer in patient.layers.items() if isinstance(layer, MoE)}
    counts = {name: health.stats[name].counts_E for name in layers}
    whole = {name: layer for name, layer in layers.items() if not layer.bypass.on(layer.mode).diverts}
    dense.update(build_dense_paths(whole, counts, canary.run, patient.team))
    bare = {name: layer for name, layer in layers.items() if layer.shared is None}
    if not bare:
        return ""
    with diverted(bare, dense):
        cost = canary.run() - health.loss
    return f"dense paths in place of all experts cost {cost:.3f} nats per token"
