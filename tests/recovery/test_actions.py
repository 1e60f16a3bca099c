"""Each repair by itself: what it changes, what it leaves, its way back, and what it can't do."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.layer import MoE, reduce_and_update
from equipoise.layer.mode import NORMAL, Mode
from equipoise.monitor.baseline import baselines_of
from equipoise.recovery.actions import Patient, Training, balancing_bias
from equipoise.recovery.canary import Canary
from equipoise.recovery.catalogue import REPAIRS
from equipoise.recovery.dense_path import build_dense_paths
from equipoise.recovery.known_good import KnownGood
from equipoise.recovery.recent import RecentScores
from equipoise.recovery.router_state import router_state
from equipoise.routing import BiasBalance, QuantileBalance, RoundRobin, SwitchLoss, TopK
from equipoise.types import Finding

D, F, E, K, T = 16, 8, 8, 2, 512
LAYER = "a"


def build(*balance, router=TopK(k=K), spread=0.3, saturation=10.0):  # noqa: B008 - frozen
    """A layer whose every token prefers expert 3 by `saturation` logits, and others to each other by `spread`."""
    torch.manual_seed(0)
    layer = MoE(D, F, E, router=router, balance=balance)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
        if layer.router.weight is not None:
            layer.router.weight.normal_(std=spread)
            layer.router.weight[3, 0] += saturation
    return layer


def without_tokens(layer, *experts):
    with torch.no_grad():
        layer.router.weight[list(experts), 0] -= 30.0
    return layer


def inputs(seed=1):
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = 1.0
    return x


class Ward:
    """A layer with what repairs may use."""

    def __init__(self, layer, **options):
        self.layer, self.model = layer, torch.nn.ModuleDict({LAYER: layer})
        canary = Canary(self.model, lambda: float(layer(inputs()).detach().square().mean()))
        health = canary.measure(0)
        recent = RecentScores({LAYER: layer}, T)
        with torch.no_grad():
            layer(inputs())
        dense = build_dense_paths({LAYER: layer}, {LAYER: np.ones(E)})
        options = {"recent": recent, "health": health, "dense": dense} | options
        self.patient = Patient(self.model, {LAYER: layer}, **options)

    def apply(self, kind, rule="collapse", expert=3):
        return REPAIRS[kind].apply(self.patient, Finding(rule, LAYER, expert, "critical", 1.0, 0.5, "it is", "mend it"))

    def everything(self):
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        return state, self.layer.mode, getattr(self.layer.balancer, "boost", None)

    def violation(self, seed=1):
        seen = []
        handle = self.layer.tap.register_forward_hook(lambda m, a, routed: seen.append(routed.decision.expert_ids_N))
        with torch.no_grad():
            self.layer(inputs(seed))
        handle.remove()
        counts = torch.bincount(seen[0], minlength=E).float()
        return float(counts.max() / counts.mean() - 1)


def same(before, after):
    return before[1:] == after[1:] and all(torch.equal(before[0][name], after[0][name]) for name in before[0])


def training(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    scale = [1.0]
    return Training(optimizer, lambda value: scale.__setitem__(0, value), lambda: scale[0])


# ------------------------------------------------------------------------------------------------- all of them

EASY = ["quantile_bias", "boost", "next_choice", "spill", "shut_expert", "dense", "round_robin", "lr_cut"]


@pytest.mark.parametrize("balance", [(SwitchLoss(),), (SwitchLoss(), BiasBalance()), (SwitchLoss(), QuantileBalance())])
@pytest.mark.parametrize("kind", EASY)
def test_undo_puts_everything_back_to_the_bit(kind, balance):
    layer = build(*balance)
    ward = Ward(layer, training=training(layer))
    before, scale = ward.everything(), ward.patient.training.rate_scale()
    y = layer.eval()(inputs())
    change = ward.apply(kind)
    assert not same(before, ward.everything()) or ward.patient.training.rate_scale() != scale
    change.undo()
    assert same(before, ward.everything())
    assert ward.patient.training.rate_scale() == scale
    assert torch.equal(layer(inputs()), y)
    change.undo()  # twice is once
    assert same(before, ward.everything())


@pytest.mark.parametrize("kind", [kind for kind in REPAIRS if kind != "lr_cut"])
def test_layers_of_other_libraries_are_refused_by_name(kind):
    patient = Patient(torch.nn.Linear(2, 2), {}, training=training(torch.nn.Linear(2, 2)))
    finding = Finding("collapse", "model.layers.0.mlp", 3, "critical", 1.0, 0.5, "it is", "mend it")
    expected = (
        r"action: expected an equipoise layer \(none\), got 'model\.layers\.0\.mlp'|there is no known-good record"
    )
    with pytest.raises(ValueError, match=expected):
        REPAIRS[kind].apply(patient, finding)


# ------------------------------------------------------------------------------------------------- temperature


def remembered(ward, folder):
    """A registry with the layer as it is now."""
    registry, health = KnownGood(folder), ward.patient.health
    tensors, baselines = router_state(ward.model), baselines_of(health.stats.values())
    registry.put(step=0, tensors=tensors, baselines=baselines, loss=health.loss)
    return registry


def decided(layer):
    seen = []
    handle = layer.tap.register_forward_hook(lambda m, a, routed: seen.append(routed.decision))
    with torch.no_grad():
        layer(inputs())
    handle.remove()
    return seen[0].expert_ids_N, seen[0].weights_N


def test_a_temperature_gives_back_the_weights_of_logits_that_grew(tmp_path):
    """Logits four times as wide, divided by four: a power of two, so the bits are the same."""
    layer = build(saturation=0.0).eval()
    known_good, (ids, weights) = remembered(Ward(layer), tmp_path), decided(layer)
    with torch.no_grad():
        layer.router.weight *= 4
    grown = decided(layer)
    assert torch.equal(grown[0], ids)
    assert not torch.allclose(grown[1], weights, atol=0.05)
    change = (ward := Ward(layer, known_good=known_good)).apply("temperature", "logits", None)
    assert change.detail == {"temperature": pytest.approx(4.0, rel=1e-5)}
    assert layer.mode.temperature == change.detail["temperature"]
    again = decided(layer)
    assert torch.equal(again[0], ids)  # nobody is chosen anew
    torch.testing.assert_close(again[1], weights)
    change.undo()
    assert ward.layer.mode == NORMAL
    assert torch.equal(decided(layer)[1], grown[1])


def test_a_temperature_needs_something_to_compare_with(tmp_path):
    layer = build(saturation=0.0).eval()
    healthy = Ward(layer)
    for lacking in ({}, {"known_good": KnownGood(tmp_path / "empty")}):
        with pytest.raises(ValueError, match=r"temperature: needs a canary and a known-good record to compare"):
            Ward(layer, **lacking).apply("temperature", "logits", None)
    known_good = remembered(healthy, tmp_path)
    with torch.no_grad():
        layer.router.weight.zero_()  # logits without any spread
    with pytest.raises(ValueError, match=r"temperature: the logits of a have no finite spread to compare"):
        Ward(layer, known_good=known_good).apply("temperature", "logits", None)
    assert layer.mode == NORMAL


# ------------------------------------------------------------------------------------------------- quantile bias


@given(
    seed=st.integers(0, 10_000),
    num_experts=st.integers(2, 24),
    k=st.integers(1, 4),
    spread=st.floats(0.001, 3.0),
    saturation=st.floats(0.0, 60.0),
)
def test_the_bias_balances_whatever_the_router_prefers(seed, num_experts, k, spread, saturation):
    if k >= num_experts:
        return
    scores = spread * torch.randn(1024, num_experts, generator=torch.Generator().manual_seed(seed))
    scores[:, 0] += saturation
    bias_E, violation = balancing_bias(scores, k)
    counts = torch.bincount((scores + bias_E).topk(k).indices.flatten(), minlength=num_experts).float()
    assert float(counts.max() / counts.mean() - 1) == pytest.approx(violation)
    assert violation < 0.25
    assert torch.isfinite(bias_E).all()


@pytest.mark.parametrize("balance", [(), (BiasBalance(),), (QuantileBalance(on_demand=True),)])
@pytest.mark.parametrize("spread", [0.3, 0.002], ids=["decided", "hardly-decided"])
def test_one_shot_from_saturation_to_balance(balance, spread):
    """Every token prefers expert 3 by 10 logits, and the others to each other by ten or by thousandth parts of one."""
    layer = build(*balance, spread=spread).eval()
    ward = Ward(layer)
    weights = [parameter.clone() for parameter in layer.parameters()]
    assert ward.violation() == E / K - 1
    change = ward.apply("quantile_bias")
    assert change.detail["max_violation_expected"] < 0.05
    assert ward.violation() < 0.05
    assert ward.violation(seed=2) < 0.5  # traffic that it has not seen
    assert all(torch.equal(a, b) for a, b in zip(weights, layer.parameters(), strict=True))
    if balance:
        assert layer.mode == NORMAL
        assert layer.balancer.bias_E.abs().sum() > 0
    else:
        assert layer.mode.bias is not None


def test_a_waiting_balancer_goes_on_from_the_bias():
    layer = build(QuantileBalance(on_demand=True)).train()
    ward = Ward(layer)
    ward.apply("quantile_bias")
    assert layer.balancer.active
    for seed in range(3):
        layer(inputs(seed))
        reduce_and_update([layer])
        assert ward.violation(seed) < 0.5


def test_what_a_bias_cannot_do():
    layer = build(router=RoundRobin(K))
    with pytest.raises(ValueError, match=r"quantile_bias: RoundRobin does not choose freely under a bias"):
        Ward(layer).apply("quantile_bias")
    layer = build()
    ward = Ward(layer, recent=None)
    with pytest.raises(ValueError, match=r"quantile_bias: needs recent traffic; attach RecentScores"):
        ward.apply("quantile_bias")
    with pytest.raises(ValueError, match=r"quantile_bias: the router's recent scores are not finite; go back"):
        balancing_bias(torch.full((4, 3), torch.nan), 1)
    with pytest.raises(ValueError, match=r"quantile_bias: needs k < num_experts, got k = 3 of 3"):
        balancing_bias(torch.zeros(4, 3), 3)


# ------------------------------------------------------------------------------------------------- modes


def test_containment_limits_what_is_computed():
    layer = build().eval()
    ward = Ward(layer)
    canary = Canary(ward.model, lambda: float(layer(inputs()).detach().square().mean()))
    assert canary.measure(0).straggler[LAYER] == E / K
    for kind, limit in (("next_choice", 1.25), ("spill", 1.25), ("round_robin", 1.0), ("dense", 0.0)):
        change = ward.apply(kind)
        assert canary.measure(0).straggler[LAYER] == limit
        change.undo()


def test_a_boost_needs_a_handle():
    with pytest.raises(ValueError, match=r"boost: a has no balancing loss and no bias with a rate; there is no handle"):
        Ward(build()).apply("boost")


def test_boosts_multiply():
    ward = Ward(build(SwitchLoss()))
    ward.apply("boost")
    assert ward.apply("boost").detail == {"boost": 100.0}
    assert ward.layer.mode == Mode(boost=100.0)


def test_shutting_an_expert_adds_to_those_that_are_shut():
    ward = Ward(build())
    ward.apply("shut_expert", expert=3)
    ward.apply("shut_expert", expert=1)
    assert ward.layer.mode.shut_experts == (1, 3)
    with pytest.raises(ValueError, match=r"shut_expert: the finding collapse in a names no expert"):
        ward.apply("shut_expert", expert=None)


# ------------------------------------------------------------------------------------------------- weights


def test_reseeding_copies_the_busiest_expert_with_noise_into_the_dead_ones():
    layer = without_tokens(build(), 5, 6)
    ward = Ward(layer, training=training(layer))
    dead = ward.patient.health.stats[LAYER].dead_experts
    hot = int(ward.patient.health.stats[LAYER].counts_E.argmax())
    assert (hot, dead) == (3, (5, 6))
    before = layer.experts.up.detach().clone()
    change = ward.apply("reseed", rule="dead_experts", expert=None)
    assert change.detail == {"num_experts": 2.0, "source": 3.0}
    for expert in range(E):
        now = layer.experts.up[expert].detach()
        if expert in dead:
            difference = (now - before[3]).std() / before[3].std()
            assert 0.015 < float(difference) < 0.025
        else:
            assert torch.equal(now, before[expert])


def test_reseeding_is_repeatable_and_for_training_alone():
    results = []
    for _ in range(2):
        layer = without_tokens(build(), 5)
        Ward(layer, training=training(layer)).apply("reseed")
        results.append(layer.experts.up.detach().clone())
    assert torch.equal(*results)
    with pytest.raises(ValueError, match=r"reseed: a copy of an expert only helps where it is trained further"):
        Ward(build()).apply("reseed")


def test_nothing_is_dead_and_nothing_is_left():
    layer = build(spread=1.0, saturation=0.0)
    with pytest.raises(ValueError, match=r"reseed: a has no dead expert on held-out text, and none that is not finite"):
        Ward(layer, training=training(layer)).apply("reseed")
    ward = Ward(layer, training=training(layer))
    with torch.no_grad():
        layer.experts.up.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"reseed: no expert of a is left to copy; go back to a checkpoint"):
        ward.apply("reseed")


@pytest.mark.parametrize("kind", ["router_rollback", "full_rollback"])
def test_there_is_nothing_to_go_back_to(kind):
    with pytest.raises(ValueError, match=rf"{kind}: there is no known-good record to go back to yet"):
        Ward(build()).apply(kind)


def test_a_cut_of_the_learning_rate_needs_training():
    with pytest.raises(ValueError, match=r"lr_cut: nothing is being trained"):
        Ward(build()).apply("lr_cut")
    layer = build()
    ward = Ward(layer, training=training(layer))
    assert ward.apply("lr_cut").detail == {"rate_scale": 0.5}
    assert ward.apply("lr_cut").detail == {"rate_scale": 0.25}
