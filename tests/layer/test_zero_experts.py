"""Zero-computation experts: equal to a loop over assignments, counted, capped and balanced like all others."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from equipoise.layer import Capacity, MoE, ZeroExperts
from equipoise.layer.zero_experts import computing_per_token
from equipoise.monitor.recorder import Recorder
from equipoise.ops.activation import activate
from equipoise.routing import BiasBalance, ImportanceLoss, LoadLoss, NoisyTopK, SwitchLoss, Threshold, TopK, ZLoss
from equipoise.types import BatchScope

D, F, E, B, S = 6, 5, 3, 2, 9
KINDS = ZeroExperts(zero=1, copy=2, constant=2)
Z = 5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(zero: ZeroExperts = KINDS, std: float = 0.7, **fields) -> MoE:
    layer = MoE(D, F, E, **({"router": TopK(k=3), "backend": "lean"} | fields), zero_experts=zero).double()
    layer.init_weights(std, std)
    return layer


class Seen:
    """The last forward's decision and plan, through the tap."""

    def __init__(self, layer: MoE) -> None:
        layer.tap.register_forward_hook(lambda module, args, routed: setattr(self, "routed", routed))


def naive(layer: MoE, x_TD: torch.Tensor, keep: list[bool] | None = None, seen: Seen | None = None) -> torch.Tensor:
    """One assignment at a time, of the decision that the router makes for x."""
    decision = layer.router(x_TD) if seen is None else seen.routed.decision
    config, w = layer.zero.config, dict(layer.named_parameters())
    rows = [0 * x for x in x_TD]
    for n, (t, e) in enumerate(zip(decision.token_ids_N.tolist(), decision.expert_ids_N.tolist(), strict=True)):
        if keep is not None and not keep[n]:
            continue
        x = x_TD[t]
        if e < E:
            y = w["experts.down_proj"][e] @ activate(w["experts.gate_up_proj"][e] @ x, "swiglu")
        elif e < E + config.zero:
            y = 0 * x
        elif e < E + config.zero + config.copy:
            y = x
        else:
            c = e - E - config.zero - config.copy
            of_x, of_v = (w["zero.mix"][2 * c : 2 * c + 2] @ x).softmax(0)
            y = of_x * x + of_v * w["zero.values"][c]
        rows[t] = rows[t] + decision.weights_N[n] * y
    return torch.stack(rows)


ROUTERS = [TopK(k=1, renormalize=False), TopK(k=3), TopK(k=8), TopK(k=2, score="sigmoid"), Threshold(k=2)]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: f"{type(router).__name__}-{router.k}")
@pytest.mark.parametrize("backend", ["lean", "reference", "few"])
def test_the_layer_is_the_loop_forward_and_in_all_gradients(router, backend):
    layer = make(router=router, backend=backend)
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(B * S, D, dtype=torch.float64)
    wanted = [x, *layer.parameters()]
    y, twin = layer(x).flatten(0, 1), naive(layer, x.flatten(0, 1))
    torch.testing.assert_close(y, twin, rtol=0, atol=1e-10)
    found = torch.autograd.grad((y * direction).sum(), wanted)
    expected = torch.autograd.grad((twin * direction).sum(), wanted)
    for actual, gradient in zip(found, expected, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(actual, gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kinds", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 1, 0)])
def test_each_kind_works_alone_and_gets_gradients(kinds):
    layer = make(ZeroExperts(zero=kinds[0], copy=kinds[1], constant=kinds[2]), router=TopK(k=2))
    x = torch.randn(B * S, D, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive(layer, x), rtol=0, atol=1e-10)
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert sum(each.numel() for each in layer.zero.parameters()) == layer.zero.config.parameters(D) == 3 * kinds[2] * D


@pytest.mark.parametrize("chosen", [0, E], ids=["nobody computes nothing", "nobody computes"])
def test_all_of_one_side(chosen):
    """Every token with one expert of one kind: no rows for the experts, or none for the others."""
    layer = make(router=TopK(k=1, renormalize=False))
    layer.router.weight.data.zero_()
    layer.router.weight.data[chosen] = 1.0
    x = torch.rand(B * S, D, dtype=torch.float64, requires_grad=True)
    seen = Seen(layer)
    y = layer(x)
    torch.testing.assert_close(y, naive(layer, x), rtol=0, atol=1e-10)
    assert seen.routed.plan.counts_e.tolist() == ([B * S, 0, 0] if chosen == 0 else [0, 0, 0])
    y.sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in layer.parameters() if each.grad is not None)


def test_padding_is_left_out_and_a_token_does_not_depend_on_the_batch():
    layer = make().eval()
    x, padding = torch.randn(B, S, D, dtype=torch.float64), torch.rand(B, S) < 0.4
    y = layer(x, padding_mask=padding)
    assert y[padding].count_nonzero() == 0
    for row in (~padding).nonzero().tolist():
        torch.testing.assert_close(y[tuple(row)], layer(x[tuple(row)][None])[0], rtol=0, atol=1e-12)
    assert layer(x[:0]).shape == (0, S, D)


def test_the_monitor_counts_all_of_them_exactly():
    layer = make()
    x, padding = torch.randn(B, S, D, dtype=torch.float64), torch.rand(B, S) < 0.3
    recorder, expected = Recorder(layer), [0] * (E + Z)
    for batch in (x, 2 * x):
        layer(batch, padding_mask=padding)
        for expert in layer.router(batch[~padding]).expert_ids_N.tolist():
            expected[expert] += 1
    (stats,) = recorder.flush(1)
    assert stats.counts_E.tolist() == expected
    assert stats.num_experts == layer.num_experts == E + Z
    assert sum(expected[:E]) > 0 < sum(expected[E:])
    per_token = computing_per_token(torch.from_numpy(stats.counts_E), E, stats.num_tokens)
    assert per_token == pytest.approx(sum(expected[:E]) / (2 * int((~padding).sum())))
    assert per_token < 3
    with pytest.raises(ValueError, match="num_tokens: expected at least 1, got 0"):
        computing_per_token(torch.zeros(E), E, 0)


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("policy", ["position", "probability"])
def test_capacities_are_each_experts_own_and_drops_are_counted(weight, policy):
    factor, T, K = 0.8, B * S, 3
    layer = make(replace(KINDS, weight=weight), capacity=Capacity(factor=factor, policy=policy))
    seen = Seen(layer)
    x = torch.randn(T, D, dtype=torch.float64)
    y = layer(x)
    decision = seen.routed.decision
    # tau T K / (tau E + Z) for those that compute, T K / (tau E + Z) for the others (MoE++, its section on capacities)
    fair = factor * T * K / (weight * E + Z)
    room = [math.ceil(weight * fair)] * E + [math.ceil(fair)] * Z
    order = range(T * K)
    if policy == "probability":
        order = sorted(order, key=lambda n: (-decision.weights_N[n].item(), n))
    keep = [False] * (T * K)
    for n in order:
        expert = int(decision.expert_ids_N[n])
        keep[n] = room[expert] > 0
        room[expert] -= 1
    assert not all(keep)
    torch.testing.assert_close(y, naive(layer, x, keep, seen), rtol=0, atol=1e-10)
    drops = seen.routed.plan.drops
    assert int(drops["capacity"]) == keep.count(False)
    kept = decision.expert_ids_N[torch.tensor(keep)]
    assert seen.routed.plan.counts_e.tolist() == torch.bincount(kept, minlength=E + Z)[:E].tolist()
    lost = sum(not any(keep[n] for n in range(T * K) if int(decision.token_ids_N[n]) == t) for t in range(T))
    assert int(drops["tokens"]) == lost


def test_what_has_no_room_goes_to_the_next_choice_of_either_kind():
    layer = make(capacity=Capacity(factor=1.0, overflow="next_choice"))
    seen = Seen(layer)
    layer(torch.randn(40, D, dtype=torch.float64))
    assert int(seen.routed.plan.drops["moved"]) > 0
    layer = make(capacity=Capacity(factor=0.5, overflow="shared"), shared_experts=1)
    seen = Seen(layer)
    layer(torch.randn(40, D, dtype=torch.float64))
    assert int(seen.routed.plan.drops["spilled"]) > 0
    assert seen.routed.spilled_T.sum() > 0


@pytest.mark.parametrize("scope", ["micro", "sequence", "global"])
@pytest.mark.parametrize("weight", [1.0, 0.75])
def test_the_balancing_loss_weighs_each_load(scope, weight):
    layer = make(replace(KINDS, weight=weight), balance=(SwitchLoss(coef=0.1, scope=scope),))
    seen = Seen(layer)
    x = torch.randn(B, S, D, dtype=torch.float64)
    layer(x)
    decision = seen.routed.decision
    eta = [1.0] * E + [weight] * Z
    parts = [range(b * S, (b + 1) * S) for b in range(B)] if scope == "sequence" else [range(B * S)]
    losses = []
    for part in parts:
        load, probs = [0] * (E + Z), decision.probs_TE[list(part)].mean(0)
        for t, e in zip(decision.token_ids_N.tolist(), decision.expert_ids_N.tolist(), strict=True):
            load[e] += t in part
        losses.append(sum((E + Z) * eta[e] * load[e] / sum(load) * float(probs[e].detach()) for e in range(E + Z)))
    assert float(seen.routed.losses[f"switch_{scope}"]) == pytest.approx(sum(losses) / len(losses))


def test_a_split_batch_has_the_gradient_of_the_whole():
    layer = make(replace(KINDS, weight=0.6), balance=(SwitchLoss(coef=0.1, scope="global"), ZLoss()))
    x = torch.randn(B, S, D, dtype=torch.float64)
    layer(x).sum().backward()
    whole = {name: each.grad.clone() for name, each in layer.named_parameters()}
    counts = torch.bincount(layer.router(x.flatten(0, 1)).expert_ids_N, minlength=E + Z)
    layer.zero_grad()
    for part in x.split(1):
        layer(part, scope=BatchScope(share=1 / B, counts=counts)).sum().backward()
    for name, each in layer.named_parameters():
        torch.testing.assert_close(each.grad, whole[name], rtol=0, atol=1e-12)


def test_at_the_fair_shares_all_weighed_loads_are_equal():
    shares = ZeroExperts(zero=1, copy=1, weight=0.75).fair_shares(E)
    # 1 / tau = 4/3 each for two, 1 for three: 3/17 and 4/17 of the load
    assert shares == pytest.approx([3 / 17, 3 / 17, 3 / 17, 4 / 17, 4 / 17])


def test_a_balancer_evens_out_all_of_them():
    layer = make(router=TopK(k=2, score="sigmoid"), balance=(BiasBalance(),))
    assert layer.balancer.bias_E.shape == (E + Z,)
    layer.router.weight.data[E] += 3.0
    x = torch.rand(64, D, dtype=torch.float64)
    for _ in range(300):
        layer(x)
        for state in layer.adaptive:
            state.update(1)
    assert layer.balancer.bias_E[E] < layer.balancer.bias_E.mean() - 0.05


def test_flops_follow_from_the_counts():
    layer = make().eval()
    x = torch.randn(B * S, D, dtype=torch.float64)
    decision = layer.router(x)
    counts = torch.bincount(decision.expert_ids_N, minlength=E + Z)

    class Quiet:
        def begin(self, expert, num_rows): ...

        def end(self, expert): ...

    layer.experts.probes = (Quiet(),)  # one by one, in products that torch counts
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    per_expert, router = 6 * D * F, 2 * D * (E + Z)
    per_token = computing_per_token(counts, E, B * S) * per_expert + router + KINDS.flops(D)
    assert counter.get_total_flops() == pytest.approx(B * S * per_token)


def test_weights_begin_as_asked_for():
    layer = make(ZeroExperts(constant=60), std=0.3)
    layer.init_weights(0.3, 0.01)
    assert layer.zero.mix.std().item() == pytest.approx(0.3, rel=0.1)
    assert layer.zero.values.std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"zero": 0, "copy": 0},
            "ZeroExperts: expected 0 or more of each kind and at least 1 of any, got zero=0, copy=0",
        ),
        ({"constant": -1}, "got zero=1, copy=1, constant=-1. Without any, leave zero_experts=None"),
        ({"weight": 0.0}, "ZeroExperts.weight: expected more than 0 and at most 1, got 0.0. Less"),
        ({"weight": 1.5}, "ZeroExperts.weight: expected more than 0 and at most 1, got 1.5. Less"),
    ],
)
def test_wrong_numbers_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ZeroExperts(**fields)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"balance": (ImportanceLoss(),)}, "ImportanceLoss"),
        ({"balance": (LoadLoss(),), "router": NoisyTopK(k=2)}, "LoadLoss"),
        ({"balance": (BiasBalance(),)}, "BiasBalance"),
        ({"capacity": Capacity(overflow="next_choice")}, "Capacity(overflow='next_choice')"),
    ],
)
def test_what_evens_out_is_refused_where_loads_are_to_differ(fields, name):
    with pytest.raises(ValueError, match=re.escape(f"zero_experts.weight: expected 1 with {name}, which knows one")):
        make(replace(KINDS, weight=0.75), **fields)
    make(replace(KINDS, weight=1.0), **fields)
