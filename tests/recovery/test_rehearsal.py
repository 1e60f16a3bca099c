"""Repairs tried in turn: what each came to, and nothing left of any of them."""

import contextlib

import pytest
import torch

from equipoise.layer import MoE
from equipoise.layer.mode import NORMAL
from equipoise.recovery.actions import Patient
from equipoise.recovery.canary import Canary
from equipoise.recovery.recent import RecentScores
from equipoise.recovery.rehearsal import rehearse
from equipoise.routing import SwitchLoss, TopK
from equipoise.types import Finding

D, E, T = 8, 8, 256
FINDING = Finding("collapse", "a", 3, "critical", 1.0, 0.5, "it has collapsed", "mend it")
KINDS = ("quantile_bias", "boost", "router_rollback", "round_robin")


def inputs():
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 1.0
    return x


@pytest.fixture
def layer():
    """Every token prefers expert 3."""
    layer = MoE(D, D, E, router=TopK(k=2), balance=(SwitchLoss(),)).eval()
    with torch.no_grad():
        layer.router.weight[3, 0] += 20.0
    return layer


@pytest.fixture
def ward(layer):
    """(patient, canary); the patient knows recent traffic, and no registry."""
    model = torch.nn.ModuleDict({"a": layer})
    canary = Canary(model, lambda: float(layer(inputs()).detach().square().mean()))
    recent = RecentScores({"a": layer}, T)
    with torch.no_grad():
        layer(inputs())
    return Patient(model, {"a": layer}, recent=recent), canary


def test_each_is_measured_and_leaves_nothing(ward, layer):
    patient, canary = ward
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    found = {each.kind: each for each in rehearse(patient, canary, FINDING, KINDS)}
    assert tuple(found) == KINDS
    # top-2 of 8, all tokens on one expert: T of its fair T * 2 / 8, four loads
    assert canary.measure(0).straggler["a"] == 4.0
    assert found["quantile_bias"].health.straggler["a"] < 1.3
    assert found["round_robin"].health.straggler["a"] == 1.0
    assert found["boost"].health.straggler["a"] == 4.0  # it helps in training only
    assert found["router_rollback"].health is None
    assert "there is no known-good record" in found["router_rollback"].note
    assert layer.mode == NORMAL
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


def test_its_text_is_no_traffic(ward):
    """Neither for the recent scores, nor for whoever `quiet` silences; both count again afterwards."""
    patient, canary = ward
    before, story = patient.recent.scores("a").clone(), []

    @contextlib.contextmanager
    def quiet():
        story.append("begins")
        yield
        story.append("ends")

    rehearse(patient, canary, FINDING, KINDS, quiet=quiet)
    assert story == ["begins", "ends"]
    assert torch.equal(patient.recent.scores("a"), before)
    with torch.no_grad():
        patient.layers["a"](torch.randn(T, D))
    assert not torch.equal(patient.recent.scores("a"), before)


def test_a_measurement_that_fails_undoes_the_repair(ward, layer):
    patient, _ = ward

    def interrupted():
        if layer.mode != NORMAL:
            raise KeyboardInterrupt
        return float(layer(inputs()).detach().square().mean())

    with pytest.raises(KeyboardInterrupt):
        rehearse(patient, Canary(patient.model, interrupted), FINDING, ("round_robin",))
    assert layer.mode == NORMAL
