"""From an alert to a repair: what the policy proposes, what an action does to a layer, what is refused."""

from dataclasses import replace

import pytest
import torch

from equipoise.layer import MoE, reduce_and_update
from equipoise.recovery.actions import apply_action
from equipoise.recovery.policy import QuantileOnCollapse
from equipoise.routing import BiasBalance, QuantileBalance, TopK
from equipoise.types import Action, Alert, Finding

D, E, K, T = 16, 8, 2, 512
FINDING = Finding("collapse", "layers.1.mlp", 3, "critical", 0.9, 0.6, "it has collapsed", "repair it")
ALERT = Alert("layers.1.mlp:collapse", "firing", since_step=40, step=50, finding=FINDING)
ACTION = Action(kind="quantile_bias", layer="layers.1.mlp", step=50, reason="layers.1.mlp:collapse")


def build(*balance):
    return MoE(D, 8, E, router=TopK(k=K), balance=balance)


# --------------------------------------------------------------------------------------------------------- policy


def test_a_collapse_that_fires_calls_for_a_quantile_bias():
    assert QuantileOnCollapse()(ALERT) == ACTION


def test_a_resolved_alert_calls_for_nothing():
    assert QuantileOnCollapse()(replace(ALERT, state="resolved")) is None


@pytest.mark.parametrize("rule", ["dead_experts", "drops", ""])
def test_other_rules_call_for_nothing(rule):
    assert QuantileOnCollapse()(replace(ALERT, finding=replace(FINDING, rule=rule))) is None


# -------------------------------------------------------------------------------------------------------- actions


def test_the_action_switches_on_the_balancer_of_its_layer_alone():
    layers = {name: build(QuantileBalance(on_demand=True)) for name in ("layers.0.mlp", "layers.1.mlp")}
    apply_action(ACTION, layers)
    assert layers["layers.1.mlp"].balancer.active
    assert not layers["layers.0.mlp"].balancer.active
    apply_action(ACTION, layers)  # twice is once
    assert layers["layers.1.mlp"].balancer.active


@pytest.mark.parametrize("spread", [0.3, 0.002], ids=["decided", "hardly-decided"])
def test_a_saturated_layer_is_balanced_within_a_few_updates(spread):
    """Every token prefers expert 3 by 10 logits, and the others to each other by ten or by thousandth parts of one.

    The bias has to be large and fine at once. The weights stay as they are.
    """
    layer = build(QuantileBalance(on_demand=True))
    x = torch.randn(T, D)
    x[:, 0] = 1.0
    with torch.no_grad():
        layer.router.weight.normal_(std=spread)
        layer.router.weight[3, 0] += 10.0
    weights = [parameter.clone() for parameter in layer.parameters()]
    violations = []

    def record(module, args, routed):
        counts = torch.bincount(routed.decision.expert_ids_N, minlength=E)
        violations.append(float(counts.max() / counts.float().mean() - 1))

    layer.tap.register_forward_hook(record)
    for step in range(8):
        layer(x)
        reduce_and_update([layer])
        if step == 2:
            apply_action(ACTION, {"layers.1.mlp": layer})
    assert all(violation == E / K - 1 for violation in violations[:4])  # expert 3 has all tokens: 8 / 2 shares
    assert all(violation < 0.2 for violation in violations[6:])
    assert all(torch.equal(a, b) for a, b in zip(weights, layer.parameters(), strict=True))


def test_unknown_action():
    with pytest.raises(ValueError, match=r"action: expected quantile_bias, got 'reboot'"):
        apply_action(replace(ACTION, kind="reboot"), {})


def test_unknown_layer():
    with pytest.raises(ValueError, match=r"action: expected a layer of layers\.0\.mlp, got 'layers\.1\.mlp'"):
        apply_action(ACTION, {"layers.0.mlp": build(QuantileBalance(on_demand=True))})


@pytest.mark.parametrize(("balance", "has"), [((), "NoneType"), ((BiasBalance(),), "BiasBalancer")])
def test_a_layer_that_was_not_built_for_it(balance, has):
    message = rf"quantile_bias needs a QuantileBalance in layers\.1\.mlp, it has {has}; build the layer with balance="
    with pytest.raises(ValueError, match=message):
        apply_action(ACTION, {"layers.1.mlp": build(*balance)})
