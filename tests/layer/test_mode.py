"""A layer under a mode: what each departure does to the routing and the output, what is refused, and the way back."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.layer import Capacity, FeedForward, MoE, reduce_and_update
from equipoise.layer.mode import NORMAL, Mode
from equipoise.monitor.recorder import Recorder
from equipoise.routing import BiasBalance, Hash, RoundRobin, Switch, SwitchLoss, TopK

D, F, E, K, T = 16, 8, 8, 2, 96


def build(router=TopK(k=K), **options):  # noqa: B008 - frozen
    torch.manual_seed(0)
    layer = MoE(D, F, E, router=router, **options).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


def inputs():
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def decision_of(layer, x):
    seen = []
    handle = layer.tap.register_forward_hook(lambda module, args, routed: seen.append(routed))
    with torch.no_grad():
        y = layer(x)
    handle.remove()
    return y, seen[0].decision, seen[0].plan


# ------------------------------------------------------------------------------------------------- what modes do


def test_a_bias_moves_the_selection_like_a_balancers_and_adds_to_it():
    layer, x = build(balance=(BiasBalance(),)), inputs()
    bias = torch.linspace(-2, 2, E)
    layer.balancer.bias_E.copy_(bias)
    _, expected, _ = decision_of(layer, x)
    layer.balancer.bias_E.copy_(bias / 4)
    layer.set_mode(Mode(bias=tuple((0.75 * bias).tolist())))
    _, under_mode, _ = decision_of(layer, x)
    assert torch.equal(under_mode.expert_ids_N, expected.expert_ids_N)
    layer.set_mode(NORMAL)
    assert not torch.equal(decision_of(layer, x)[1].expert_ids_N, expected.expert_ids_N)


def test_round_robin_is_the_router_of_that_name_with_this_weight():
    layer, x = build(), inputs()
    twin = build(router=RoundRobin(K))
    twin.load_state_dict(layer.state_dict())
    layer.set_mode(Mode(round_robin=True))
    y, decision, _ = decision_of(layer, x)
    assert torch.equal(y, decision_of(twin, x)[0])
    assert torch.bincount(decision.expert_ids_N).tolist() == [T * K // E] * E
    assert layer.state_dict().keys() == build().state_dict().keys()  # nothing of it reaches a checkpoint


def test_a_temperature_changes_weights_and_never_who_is_chosen():
    layer, x = build(), inputs()
    _, before, _ = decision_of(layer, x)
    with torch.no_grad():
        layer.router.weight.mul_(8.0)  # the logits blow up: the same experts, and weights near 1 and 0
    _, wild, _ = decision_of(layer, x)
    assert not torch.allclose(wild.weights_N, before.weights_N, atol=0.05)
    layer.set_mode(Mode(temperature=8.0))
    for training in (False, True):
        layer.train(training)
        _, mended, _ = decision_of(layer, x)
        torch.testing.assert_close(mended.weights_N, before.weights_N)
        assert torch.equal(mended.expert_ids_N, before.expert_ids_N)


def test_a_capacity_holds_at_inference_and_moves_the_rest():
    layer, x = build(), inputs()
    layer.set_mode(Mode(bias=(50.0,) + (0.0,) * (E - 1)))
    _, collapsed, _ = decision_of(layer, x)
    assert torch.bincount(collapsed.expert_ids_N, minlength=E)[0] == T
    capacity = Capacity(1.0, overflow="next_choice", at_inference=True)
    layer.set_mode(replace(layer.mode, capacity=capacity))
    _, _, plan = decision_of(layer, x)
    assert plan.counts_e.tolist() == [T * K // E] * E
    assert int(plan.drops["tokens"]) == 0


@pytest.mark.parametrize("shared", [0, 1])
def test_everything_diverted_is_computed_by_the_stand_in_with_the_weight_of_the_experts(shared):
    layer, x = build(shared_experts=shared), inputs()
    dense = FeedForward(D, 2 * F)
    own = layer.shared(x) if shared else torch.zeros(T, D)
    layer.set_mode(Mode(dense_share=1.0), dense)
    y, decision, plan = decision_of(layer, x)
    assert plan.counts_e.tolist() == [0] * E
    assert int(plan.drops["diverted"]) == T * K
    torch.testing.assert_close(y, own + dense(x))  # weights of two experts out of a softmax sum to 1
    if shared:
        layer.set_mode(Mode(dense_share=1.0))
        torch.testing.assert_close(decision_of(layer, x)[0], 2 * own)
    assert decision.num_tokens == T  # the router decides all the same, and is watched


def test_raw_weights_that_sum_to_less_than_one_go_to_the_stand_in():
    layer, x = build(router=Switch(jitter=0.0)), inputs()
    dense = FeedForward(D, F)
    layer.set_mode(Mode(dense_share=1.0), dense)
    y, decision, _ = decision_of(layer, x)
    assert float(decision.weights_N.max()) < 0.99
    torch.testing.assert_close(y, decision.weights_N[:, None] * dense(x))


def test_half_open_lets_a_share_of_the_tokens_through_whole():
    layer, dense = build(), FeedForward(D, F)
    x = torch.randn(20_000, D)
    whole, _, _ = decision_of(layer, x)
    layer.set_mode(Mode(dense_share=0.95), dense)
    seen = []
    handle = layer.tap.register_forward_hook(lambda module, args, routed: seen.append(routed))
    y = layer(x)
    handle.remove()
    kept_T = seen[0].spilled_T == 0
    through = kept_T.float().mean()
    assert 0.043 < float(through) < 0.057  # 20,000 draws at 0.05: 4.5 standard deviations are 0.007
    assert torch.equal(y[kept_T], whole[kept_T])
    assert int(seen[0].plan.counts_e.sum()) == int(kept_T.sum()) * K  # all of a token's experts, or none


def test_a_shut_expert_gets_nothing_and_even_its_nan_does_not_reach_the_output():
    layer, dense, x = build(), FeedForward(D, F), inputs()
    with torch.no_grad():
        layer.experts.down_proj[3, 0, 0] = torch.nan
    assert not torch.isfinite(decision_of(layer, x)[0]).all()
    layer.set_mode(Mode(shut_experts=(3,)), dense)
    y, decision, plan = decision_of(layer, x)
    assert torch.isfinite(y).all()
    assert plan.counts_e[3] == 0
    assert int(plan.drops["diverted"]) == int((decision.expert_ids_N == 3).sum()) > 0
    untouched = (decision.expert_ids_N.view(T, K) != 3).all(1)
    layer.set_mode(NORMAL)
    assert torch.equal(y[untouched], decision_of(layer, x)[0][untouched])


def test_a_boost_multiplies_losses_and_the_steps_of_a_bias():
    layer, x = build(balance=(SwitchLoss(coef=0.1), BiasBalance(rate=0.01))).train(), inputs()

    def gradient():
        layer.zero_grad()
        (layer(x) * 0).sum().backward()  # the balancing loss alone
        return layer.router.weight.grad.clone()

    plain = gradient()
    layer.set_mode(Mode(boost=10.0))
    torch.testing.assert_close(gradient(), 10 * plain)
    reduce_and_update([layer])
    boosted = layer.balancer.bias_E.clone()
    layer.balancer.reset()
    layer.set_mode(NORMAL)
    layer(x)
    reduce_and_update([layer])
    torch.testing.assert_close(boosted, 10 * layer.balancer.bias_E)


def test_gradients_flow_through_the_stand_in_to_the_input_and_the_router():
    layer, x = build().train(), inputs().requires_grad_()
    dense = FeedForward(D, F).requires_grad_(False)
    layer.set_mode(Mode(shut_experts=tuple(range(E))), dense)
    layer(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in layer.experts.parameters())  # zeros, as for idle experts
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_what_is_diverted_is_counted_exactly():
    layer, x = build(), inputs()
    layer.set_mode(Mode(dense_share=1.0), FeedForward(D, F))
    recorder = Recorder(torch.nn.ModuleList([layer]))
    layer(x)
    (stats,) = recorder.flush(1)
    assert stats.rerouted == {"moved": 0, "spilled": 0, "diverted": T * K}
    assert sum(stats.dropped.values()) == 0


def test_normal_is_bit_identical_to_never():
    layer, x = build(shared_experts=1), inputs()
    before, _, _ = decision_of(layer, x)
    mode = Mode(round_robin=True, dense_share=0.5, boost=3.0)
    layer.set_mode(mode)
    layer(x)
    layer.set_mode(NORMAL)
    assert torch.equal(decision_of(layer, x)[0], before)


def test_a_mode_that_changes_while_forwards_run_is_never_seen_in_part():
    """Each output equals exactly that of one of the two modes."""
    layer, x = build(), inputs()
    dense = FeedForward(D, F)
    modes = (NORMAL, Mode(shut_experts=tuple(range(E))))
    outputs = []
    for mode in modes:
        layer.set_mode(mode, dense)
        outputs.append(decision_of(layer, x)[0])
    done = threading.Event()

    def flip():
        turn = 0
        while not done.is_set():
            layer.set_mode(modes[turn % 2], dense)
            turn += 1

    thread = threading.Thread(target=flip)
    thread.start()
    seen = set()
    try:
        with torch.no_grad():
            for _ in range(300):
                y = layer(x)
                seen.add(next((number for number, known in enumerate(outputs) if torch.equal(y, known)), -1))
    finally:
        done.set()
        thread.join()
    assert seen == {0, 1}


# ------------------------------------------------------------------------------------------------- plain data

MODES = st.builds(
    Mode,
    bias=st.none() | st.lists(st.floats(-5, 5), min_size=E, max_size=E).map(tuple),
    round_robin=st.booleans(),
    temperature=st.none() | st.floats(0.1, 10),
    capacity=st.none() | st.builds(Capacity, st.floats(0.5, 2), overflow=st.sampled_from(["drop", "shared"])),
    dense_share=st.floats(0, 1),
    shut_experts=st.lists(st.integers(0, E - 1), unique=True).map(tuple),
    boost=st.floats(0.1, 100),
)


@given(mode=MODES)
def test_json_round_trip(mode):
    record = mode.to_json()
    assert json.loads(json.dumps(record)) == record
    assert Mode.from_json(record) == mode


def test_normal_is_empty_json():
    assert NORMAL.to_json() == {}


@pytest.mark.parametrize("record", [{"speed": 1}, {"capacity": {"size": 2}}, [1]])
def test_something_else_is_refused(record):
    with pytest.raises(ValueError, match=r"mode: expected what Mode\.to_json wrote, got"):
        Mode.from_json(record)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense_share": 1.5}, r"Mode\.dense_share: expected a share in \[0, 1\], got 1\.5"),
        ({"temperature": 0.0}, r"Mode\.temperature: expected more than 0, got 0\.0"),
        ({"boost": 0.0}, r"Mode\.boost: expected more than 0, got 0\.0; 1 is none"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Mode(**options)


NEXT = Capacity(overflow="next_choice", at_inference=True)


@pytest.mark.parametrize(
    ("router", "mode", "message"),
    [
        (TopK(K), Mode(bias=(0.0,)), r"Mode\.bias: expected 8 numbers and a router that a bias moves, got 1 and TopK"),
        (RoundRobin(K), Mode(bias=(0.0,) * E), r"Mode\.bias: .*got 8 and RoundRobin"),
        (TopK(K), Mode(shut_experts=(2, 8)), r"Mode\.shut_experts: expected experts in 0 to 7, got \[8\]"),
        (RoundRobin(K), Mode(temperature=2.0), r"Mode\.temperature: expected a TopK router, RoundRobin has no"),
        (TopK(K), Mode(round_robin=True, capacity=NEXT), r"Mode\.capacity: next_choice needs a router in which"),
        (TopK(K), Mode(dense_share=0.5), r"Mode: nothing can stand in for the experts; build the layer with shared"),
        (Hash(vocab_size=64, k=1), Mode(round_robin=True), r"Mode\.round_robin: Hash has no linear weight"),
    ],
)
def test_what_a_layer_cannot_do_changes_nothing(router, mode, message):
    layer = build(router=router)
    with pytest.raises(ValueError, match=message):
        layer.set_mode(mode)
    assert layer.mode == NORMAL
