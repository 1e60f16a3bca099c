"""The repairs, in one table: each changes a live model at once, and returns what undoes it.

An action is a function of the patient and the finding to a `Change`; it raises ValueError, and has changed nothing,
where it can't be done. Whether it helped is for `recovery.py` to find out. Changes of weights are in `weights.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from equipoise.layer import Capacity, FeedForward
from equipoise.layer.choice import Choice, RoutedLayer
from equipoise.layer.mode import Mode
from equipoise.recovery.canary import Health
from equipoise.recovery.known_good import KnownGood
from equipoise.recovery.recent import RecentScores
from equipoise.recovery.router_state import router_state
from equipoise.recovery.swap import digest
from equipoise.routing.balancers import QuantileBalancer, quantile_bias
from equipoise.types import ALONE, Finding, Team

OVERFLOW_FACTOR = 1.25  # of the fair load, for the rungs that limit it
BOOST = 10.0
CLOSE_ENOUGH, ROUNDS = 0.02, 50  # MaxVio at which a bias is good, and how often it is refined


@dataclass(frozen=True, eq=False)
class Training:
    """What repairs may use of a training loop. set_rate_scale: multiplies every learning rate from now on."""

    optimizer: torch.optim.Optimizer
    set_rate_scale: Callable[[float], None]
    rate_scale: Callable[[], float]


@dataclass(frozen=True, eq=False)
class Patient:
    """A live model, and what repairs may use.

    layers: equipoise's by name, MoE layers and what chooses attention experts. recent: the newest traffic.
    known_good: what can be gone back to. dense: stand-ins of layers without shared experts. reload: takes the name of a
    checkpoint, loads it into the model, verified, and returns what undoes that; None where there are no checkpoints.
    training: None when serving.
    health: of the model before the repair, on held-out text; None without a canary. seed: of noise. on_change: called
    when a repair has changed the model or was undone, before others may use it again. team: the processes that hold the
    model together; each has a patient.
    """

    model: nn.Module
    layers: Mapping[str, RoutedLayer]
    recent: RecentScores | None = None
    known_good: KnownGood | None = None
    dense: Mapping[str, FeedForward] = field(default_factory=dict)
    reload: Callable[[str], Callable[[], None]] | None = None
    training: Training | None = None
    health: Health | None = None
    seed: int = 0
    on_change: Callable[[], None] = lambda: None
    team: Team = ALONE

    def layer(self, name: str) -> RoutedLayer:
        """The layer of that name. Raises ValueError for another, as for layers of other libraries."""
        if name not in self.layers:
            known = ", ".join(self.layers) or "none"
            raise ValueError(f"action: expected an equipoise layer ({known}), got {name!r}")
        return self.layers[name]

    def set_mode(self, name: str, mode: Mode) -> None:
        """A layer, with its stand-in, into a mode. Raises ValueError, and changes nothing, where it can't take it."""
        self.layer(name).set_mode(mode, self.dense.get(name))


@dataclass(frozen=True, eq=False)
class Change:
    """What an action has done. detail: plain numbers. undo: puts back what was before, also after further training."""

    undo: Callable[[], None]
    detail: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


Apply = Callable[[Patient, Finding], Change]


def take_back(change: Change) -> None:
    """Undo it."""
    change.undo()


def outcome(patient: Patient, change: Change) -> str:
    """What must be the same in all processes after a repair: what it says, and all modes and routers in force."""
    modes = {name: layer.mode.to_json() for name, layer in patient.layers.items()}
    return json.dumps([change.note, dict(change.detail), modes, digest(router_state(patient.model))])


# ------------------------------------------------------------------------------------------------------------- bias


@torch.no_grad()
def balancing_bias(selection_TE: Tensor, k: int, num_choosers: int = 1) -> tuple[Tensor, float]:
    """(bias (E,) fp32, MaxVio that it gives) for these scores: quantile balancing, repeated until the load is even.

    One step of it is enough when thresholds hardly depend on the bias; from a saturated router a few are needed.
    num_choosers: equal parts of the experts, in each of which a token chooses k / num_choosers for itself.
    Raises ValueError for scores that are not finite, and for k = E.
    """
    if num_choosers > 1:
        parts = [balancing_bias(part_TE, k // num_choosers) for part_TE in selection_TE.chunk(num_choosers, dim=1)]
        return torch.cat([bias for bias, _ in parts]), max(violation for _, violation in parts)
    selection_TE = selection_TE.float()
    E = selection_TE.shape[1]
    if k >= E:
        raise ValueError(f"quantile_bias: needs k < num_experts, got k = {k} of {E}: there is nothing to balance")
    if not bool(torch.isfinite(selection_TE).all()):
        raise ValueError("quantile_bias: the router's recent scores are not finite; go back to a good router")
    bias_E = torch.zeros(E, device=selection_TE.device)
    best_E, best = bias_E, float("inf")
    for _ in range(ROUNDS):
        bias_E = quantile_bias(selection_TE, bias_E, k)
        counts_E = torch.bincount((selection_TE + bias_E).topk(k).indices.flatten(), minlength=E).float()
        violation = float(counts_E.max() / counts_E.mean() - 1)
        if violation < best:
            best_E, best = bias_E, violation
        if best < CLOSE_ENOUGH:
            break
    return best_E, best


def apply_quantile_bias(patient: Patient, finding: Finding) -> Change:
    """The bias that makes the recent traffic of the layer even, in one step. Experts and router stay as they are.

    A layer's balancer takes it over and goes on from there; without one it becomes part of the mode.
    """
    layer = patient.layer(finding.layer)
    traits = layer.router.config.traits
    choosers = layer.num_choosers if isinstance(layer, Choice) else 1
    if not (traits.takes_bias and (traits.free_choice or choosers > 1)):
        name = type(layer.router.config).__name__
        raise ValueError(f"quantile_bias: {name} does not choose freely under a bias; go back to a good router")
    if patient.recent is None:
        raise ValueError("quantile_bias: needs recent traffic; attach RecentScores to the layers")
    scores_TE = patient.team.rows(patient.recent.scores(finding.layer))
    bias_E, violation = balancing_bias(scores_TE, layer.k, choosers)
    detail = {"max_violation_expected": violation}
    mode, balancer = layer.mode, layer.balancer
    if balancer is None:
        change = _mode(patient, finding.layer, replace(mode, bias=tuple(bias_E.tolist())))
        return replace(change, detail=detail)
    before = {name: buffer.clone() for name, buffer in balancer.named_buffers()}
    with torch.no_grad():
        balancer.bias_E.copy_(bias_E)
        if isinstance(balancer, QuantileBalancer):
            balancer.activate()
    patient.set_mode(finding.layer, replace(mode, bias=None))

    def undo() -> None:
        with torch.no_grad():
            for name, buffer in balancer.named_buffers():
                buffer.copy_(before[name])
        patient.set_mode(finding.layer, mode)

    return Change(undo, detail)


# ------------------------------------------------------------------------------------------------------------- modes


def _mode(patient: Patient, name: str, mode: Mode) -> Change:
    """Put the mode in force. Raises ValueError, and changes nothing, where the layer can't take it."""
    before = patient.layer(name).mode
    patient.set_mode(name, mode)
    return Change(partial(patient.set_mode, name, before))


def apply_next_choice(patient: Patient, finding: Finding) -> Change:
    """A capacity of 1.25 fair loads; what does not fit goes to each token's next best expert that has room."""
    mode = patient.layer(finding.layer).mode
    capacity = Capacity(OVERFLOW_FACTOR, overflow="next_choice", at_inference=True)
    return _mode(patient, finding.layer, replace(mode, capacity=capacity))


def apply_spill(patient: Patient, finding: Finding) -> Change:
    """A capacity of 1.25 fair loads; what does not fit is computed by the shared experts or the dense path."""
    mode = patient.layer(finding.layer).mode
    return _mode(
        patient,
        finding.layer,
        replace(mode, capacity=Capacity(OVERFLOW_FACTOR, overflow="shared", at_inference=True)),
    )


def apply_temperature(patient: Patient, finding: Finding) -> Change:
    """Divide the logits by how much wider than the known-good ones they are, for the weights; nobody is chosen anew."""
    layer = patient.layer(finding.layer)
    if patient.health is None or patient.known_good is None or not patient.known_good.records:
        raise ValueError("temperature: needs a canary and a known-good record to compare the logits with")
    baseline = patient.known_good.latest().baselines.get(finding.layer)
    now = patient.health.stats[finding.layer].logit_std
    if baseline is None or not (baseline.logit_std > 0 and now > 0 and now < float("inf")):
        raise ValueError(f"temperature: the logits of {finding.layer} have no finite spread to compare")
    config = getattr(layer.router.config, "temperature", 1.0)
    temperature = config * now / baseline.logit_std
    change = _mode(patient, finding.layer, replace(layer.mode, temperature=temperature))
    return replace(change, detail={"temperature": temperature})


def apply_boost(patient: Patient, finding: Finding) -> Change:
    """Balancing losses and steps of the bias count ten times as much from now on."""
    layer = patient.layer(finding.layer)
    if not layer.losses and (layer.balancer is None or isinstance(layer.balancer, QuantileBalancer)):
        raise ValueError(f"boost: {finding.layer} has no balancing loss and no bias with a rate; there is no handle")
    boost = layer.mode.boost * BOOST
    return replace(_mode(patient, finding.layer, replace(layer.mode, boost=boost)), detail={"boost": boost})


def apply_round_robin(patient: Patient, finding: Finding) -> Change:
    """Experts in turn, whatever the token: even at once, and wrong for nearly every token. The last resort."""
    mode = patient.layer(finding.layer).mode
    return _mode(patient, finding.layer, replace(mode, round_robin=True, capacity=None, bias=None, temperature=None))


def apply_dense(patient: Patient, finding: Finding) -> Change:
    """Every token bypasses the layer's experts; the shared experts or the dense path compute all."""
    return _mode(patient, finding.layer, replace(patient.layer(finding.layer).mode, dense_share=1.0))


def apply_shut_expert(patient: Patient, finding: Finding) -> Change:
    """The expert gets no tokens any more; the shared experts or the dense path compute its part."""
    if finding.expert is None:
        raise ValueError(f"shut_expert: the finding {finding.rule} in {finding.layer} names no expert")
    mode = patient.layer(finding.layer).mode
    shut = tuple(sorted({*mode.shut_experts, finding.expert}))
    return replace(_mode(patient, finding.layer, replace(mode, shut_experts=shut)), detail={"expert": finding.expert})
