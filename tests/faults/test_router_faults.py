"""Faults of a router: what each does to one layer by hand-worked numbers, and what is left of it once it is out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.bits import bits
from torch import nn

from equipoise.faults import (
    BiasRunaway,
    Collapse,
    DeadExpert,
    Drift,
    LogitBlowUp,
    NaNExpert,
    RouterCorruption,
    SkewedInput,
    inject,
)
from equipoise.layer import MoE
from equipoise.routing import BiasBalance, Hash, TopK

T, D, E = 64, 16, 8
BALANCED = (BiasBalance(),)
ALONG = [Collapse("1", 5, 20.0), Collapse("1", 5, 20.0, also=(2, 0)), Drift("1", 5, 20.0, steps=2), DeadExpert("1", 5)]
WEIGHT = [*ALONG, LogitBlowUp("1", 8.0), RouterCorruption("1", 2.0, seed=3)]
ALL = [*WEIGHT, BiasRunaway("1", 5, 20.0)]


def kind(fault):
    return type(fault).__name__


def layers(dtype=torch.float32, balance=BALANCED):
    """Two layers, "0" and "1"."""
    torch.manual_seed(0)
    model = nn.Sequential(*[MoE(D, 8, E, router=TopK(k=2), balance=balance) for _ in range(2)])
    with torch.no_grad():
        for layer in model:
            layer.router.weight.normal_(std=0.3)
    return model.to(dtype)


def inputs(dtype=torch.float32):
    """Tokens with a part in common, so that one direction gives all of them the same logit."""
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    x_TD[:, 3] += 20.0
    return x_TD.to(dtype)


def put(model, fault):
    """Inject, seeing the layer with `inputs`, and let a drift come to its end."""
    layer, x_TD = model[1], inputs(model[1].router.weight.dtype)
    injection = inject(model, fault, lambda: layer(x_TD))
    for _ in range(getattr(fault, "steps", 0)):
        injection.advance()
    return injection


def place_of(model, fault):
    return model[1].balancer.bias_E if isinstance(fault, BiasRunaway) else model[1].router.weight


def rows_of(fault):
    return (
        list(range(E)) if isinstance(fault, LogitBlowUp | RouterCorruption) else sorted({fault.expert, *also_of(fault)})
    )


def also_of(fault):
    return getattr(fault, "also", ())


def logits(model):
    return (inputs() @ model[1].router.weight.T).detach()


# ------------------------------------------------------------------------------------------------ what they do


@pytest.mark.parametrize("fault", ALL, ids=kind)
def test_only_the_rows_of_one_tensor_change(fault):
    model = layers()
    before = bits(model)
    put(model, fault)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["1.balancer.bias_E" if isinstance(fault, BiasRunaway) else "1.router.weight"]
    moved = model.state_dict()[changed[0]] != before[changed[0]]
    assert moved.reshape(E, -1).any(1).nonzero()[:, 0].tolist() == rows_of(fault)


@pytest.mark.parametrize("fault", ALONG, ids=kind)
def test_logits_of_the_experts_move_by_the_intensity_and_no_others(fault):
    model = layers()
    before = logits(model)
    put(model, fault)
    moved_TE = logits(model) - before
    sign = -1 if isinstance(fault, DeadExpert) else 1
    for expert in range(E):
        if expert in rows_of(fault):  # a part of 20 in common, deviations of 1: to about 1 in 20
            torch.testing.assert_close(moved_TE[:, expert], torch.full((T,), sign * fault.intensity), rtol=0.2, atol=0)
        else:
            assert moved_TE[:, expert].abs().max() == 0


def test_a_collapse_with_also_raises_all_of_them_equally():
    model = layers()
    weight = model[1].router.weight
    before = weight.detach().clone()
    put(model, Collapse("1", 5, 20.0, also=(2, 0)))
    change = (weight - before).detach()
    torch.testing.assert_close(change[5], change[2])
    torch.testing.assert_close(change[5], change[0])
    assert change[5].norm() > 0


def test_drift_steps_are_equal_parts_and_add_up_to_the_collapse():
    model, twin = layers(), layers()
    put(twin, Collapse("1", 5, 12.0, also=(2,)))
    layer, x_TD = model[1], inputs()
    before = layer.router.weight.detach().clone()
    whole = twin[1].router.weight.detach() - before
    injection = inject(model, Drift("1", 5, 12.0, steps=4, also=(2,)), lambda: layer(x_TD))
    assert torch.equal(layer.router.weight, before)
    for step in (1, 2, 3, 4):
        injection.advance()
        torch.testing.assert_close(layer.router.weight - before, step / 4 * whole, rtol=1e-4, atol=1e-6)
    assert torch.equal(layer.router.weight, twin[1].router.weight)  # to the bit: each step starts from the clean rows
    injection.advance()
    assert torch.equal(layer.router.weight, twin[1].router.weight)
    injection.remove()
    injection.advance()
    assert torch.equal(layer.router.weight, before)


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_a_drift_is_taken_out_however_far_it_has_come(steps_before):
    model = layers()
    layer, x_TD = model[1], inputs()
    before = layer.router.weight.detach().clone()
    injection = inject(model, Drift("1", 5, 12.0, steps=4), lambda: layer(x_TD))
    for _ in range(steps_before):
        injection.advance()
    injection.remove()
    assert torch.equal(layer.router.weight, before)


def test_a_drift_goes_on_over_what_training_moves():
    """Each step takes the last one out of what training has made of it: what was learned stays, once."""
    model = layers()
    layer, x_TD = model[1], inputs()
    before = layer.router.weight.detach().clone()
    injection = inject(model, Drift("1", 5, 12.0, steps=4), lambda: layer(x_TD))
    for _ in range(4):
        injection.advance()
        with torch.no_grad():
            layer.router.weight += 0.01
    injection.remove()
    torch.testing.assert_close(layer.router.weight.detach(), before + 0.04, rtol=0, atol=1e-5)


def test_a_drift_after_a_rollback_starts_again_from_what_was_put_back():
    model = layers()
    layer, x_TD = model[1], inputs()
    before = layer.router.weight.detach().clone()
    injection = inject(model, Drift("1", 5, 12.0, steps=4), lambda: layer(x_TD))
    injection.advance()
    one = layer.router.weight.detach().clone()
    injection.advance()
    with torch.no_grad():
        layer.router.weight.copy_(before)
    injection.advance()
    assert torch.equal(layer.router.weight, one)


def test_a_dead_expert_is_chosen_by_nobody():
    model = layers(balance=())
    put(model, DeadExpert("1", 5, 60.0))
    assert not (logits(model).topk(2, dim=1).indices == 5).any()


def test_a_blow_up_multiplies_and_moves_nobody():
    model = layers()
    before, chosen = model[1].router.weight.detach().clone(), logits(model).topk(2, dim=1).indices
    put(model, LogitBlowUp("1", 8.0))
    assert torch.equal(model[1].router.weight, 8 * before)  # a power of two: exact
    assert torch.equal(logits(model).topk(2, dim=1).indices, chosen)


def test_a_corruption_has_the_size_it_says_and_repeats():
    moved = []
    for seed in (3, 3, 4):
        model = layers()
        before = model[1].router.weight.detach().clone()
        put(model, RouterCorruption("1", 2.0, seed=seed))
        moved.append(model[1].router.weight.detach() - before)
        # 128 draws of standard deviation 2 s: theirs is within 6 / sqrt(2 * 128) = 38 %, 6 standard errors
        assert moved[-1].std().item() == pytest.approx(2 * before.std(unbiased=False).item(), rel=0.38)
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])


def test_a_corruption_leaves_the_global_generator_alone():
    model, state = layers(), torch.get_rng_state()
    put(model, RouterCorruption("1"))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_runaway_adds_the_intensity_to_one_bias_and_sends_all_tokens_there():
    model = layers()
    model[1].balancer.bias_E[:] = torch.arange(E) / 8
    put(model, BiasRunaway("1", 5, 20.0))
    assert model[1].balancer.bias_E.tolist() == [0, 0.125, 0.25, 0.375, 0.5, 20.625, 0.75, 0.875]
    seen = []
    model[1].tap.register_forward_hook(lambda module, args, routed: seen.append(routed.decision))
    model[1](inputs())
    assert (seen[0].expert_ids_N.view(T, 2) == 5).any(1).all()


# ------------------------------------------------------------------------------------------------ taking out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("fault", ALL, ids=kind)
def test_untouched_since_the_bits_come_back(fault, dtype):
    model = layers(dtype)
    before = bits(model)
    injection = put(model, fault)
    assert injection.in_place
    injection.remove()
    assert not injection.in_place
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "fault",
    [Collapse("1", 5, 1e30), LogitBlowUp("1", 7.3), RouterCorruption("1", 1e20), DeadExpert("1", 5, 1e30)],
    ids=kind,
)
def test_bits_that_no_arithmetic_would_find_again_come_back(fault):
    """0.3 is lost in 1e30, and 7.3 w / 7.3 is not always w: what it was is remembered."""
    model = layers()
    before = bits(model)
    put(model, fault).remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@given(fault=st.sampled_from(ALL), moved=st.integers(0, 2**32), scale=st.sampled_from([1e-4, 0.01, 0.1]))
def test_moved_since_what_was_learned_stays(fault, moved, scale):
    """Elements that training left alone get their bits back; others keep what they have learned, to fp32 rounding."""
    model = layers()
    place = place_of(model, fault)
    before = place.detach().clone()
    injection = put(model, fault)
    generator = torch.Generator().manual_seed(moved)
    hit = torch.rand(place.shape, generator=generator) < 0.5
    faulty = place.detach().clone()
    with torch.no_grad():
        place += scale * torch.randn(place.shape, generator=generator) * hit
    now = place.detach().clone()
    injection.remove()
    after = place.detach()
    still = now == faulty
    assert torch.equal(after[still], before[still])
    factor = 8.0 if isinstance(fault, LogitBlowUp) else 1.0
    expected = before.double() + (now.double() - faulty.double()) / factor
    rounding = torch.finfo(torch.float32).eps * torch.maximum(expected.abs(), before.abs().double())
    assert bool(((after - expected).abs() <= rounding).all())
    others = [row for row in range(E) if row not in rows_of(fault)]
    assert torch.equal(after[others], now[others])


@pytest.mark.parametrize("fault", ALL, ids=kind)
def test_twice_is_once(fault):
    model = layers()
    injection = put(model, fault)
    injection.remove()
    with torch.no_grad():
        place_of(model, fault).add_(0.5)
    once = bits(model)
    injection.remove()
    injection.advance()
    assert all(torch.equal(tensor, once[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("fault", ALL, ids=kind)
def test_a_rollback_has_taken_it_out_already(fault):
    """Rows that a reload has put back, and that have learned a little since, are left as they are."""
    model = layers()
    before = bits(model)
    injection = put(model, fault)
    model.load_state_dict(before)
    with torch.no_grad():
        place_of(model, fault).add_(0.001)
    rolled = bits(model)
    injection.remove()
    assert all(torch.equal(tensor, rolled[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("fault", WEIGHT, ids=kind)
def test_a_reload_that_replaces_the_tensor_is_followed(fault):
    model = layers()
    before = model[1].router.weight.detach().clone()
    injection = put(model, fault)
    model[1].router.weight = nn.Parameter(model[1].router.weight.detach().clone())
    injection.remove()
    assert torch.equal(model[1].router.weight, before)


def test_several_faults_of_one_router_last_one_first():
    model = layers()
    before = bits(model)
    injections = [put(model, fault) for fault in ALL]
    for injection in reversed(injections):
        injection.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_balancer_that_works_against_it_keeps_what_it_has_moved():
    model = layers()
    injection = put(model, BiasRunaway("1", 5, 20.0))
    model[1].balancer.bias_E -= 0.25
    injection.remove()
    assert model[1].balancer.bias_E.tolist() == [-0.25] * E


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("fault", ALL, ids=kind)
def test_an_unknown_layer(fault):
    elsewhere = type(fault)(**{**vars(fault), "layer": "2"})
    with pytest.raises(ValueError, match=rf"^{kind(fault)}\.layer: expected one of 0, 1, got '2'"):
        put(layers(), elsewhere)


@pytest.mark.parametrize("expert", [-1, E])
@pytest.mark.parametrize("kind", [Collapse, Drift, DeadExpert, BiasRunaway, NaNExpert])
def test_an_unknown_expert(kind, expert):
    model = layers()
    before = bits(model)
    with pytest.raises(ValueError, match=rf"^{kind.__name__}\.expert: expected 0 to 7, got {expert}$"):
        put(model, kind("1", expert))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", [Collapse, Drift])
def test_unknown_and_repeated_experts_in_also(kind):
    with pytest.raises(ValueError, match=rf"^{kind.__name__}\.also: expected 0 to 7, got 9"):
        put(layers(), kind("1", 5, also=(9,)))
    for also in [(5,), (2, 2)]:
        with pytest.raises(ValueError, match=rf"^{kind.__name__}\.also: expected other experts than 5, each once"):
            kind("1", 5, also=also)


@pytest.mark.parametrize("intensity", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("fault", ALL, ids=kind)
def test_an_intensity_that_is_none(fault, intensity):
    with pytest.raises(
        ValueError, match=rf"^{kind(fault)}\.intensity: expected a number of more than 0, got {intensity}"
    ):
        type(fault)(**{**vars(fault), "intensity": intensity})


@pytest.mark.parametrize("fault", ALL, ids=kind)
def test_an_intensity_that_the_weight_cannot_hold(fault):
    """Infinite weights could not be taken out after one more step."""
    model = layers()
    before = bits(model)
    with pytest.raises(
        ValueError, match=rf"^{kind(fault)}\.intensity: expected a number that leaves 1 finite, got 1e\+300"
    ):
        put(model, type(fault)(**{**vars(fault), "intensity": 1e300}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bad_steps_and_seeds():
    with pytest.raises(ValueError, match=r"^Drift\.steps: expected at least 1, got 0"):
        Drift("1", 5, steps=0)
    for seed in (-1, 2**63):
        with pytest.raises(
            ValueError, match=rf"^RouterCorruption\.seed: expected a whole number from 0 to .*, got {seed}"
        ):
            RouterCorruption("1", seed=seed)


def test_a_layer_without_a_balancer():
    with pytest.raises(
        ValueError,
        match=r"^BiasRunaway\.layer: expected a layer with a selection bias, 1 has none; build it with balance=",
    ):
        put(layers(balance=()), BiasRunaway("1", 5))


@pytest.mark.parametrize("fault", WEIGHT, ids=kind)
def test_a_router_without_a_weight(fault):
    model = nn.Sequential(nn.Identity(), MoE(D, 8, E, router=Hash(vocab_size=10)))
    with pytest.raises(ValueError, match=rf"^{kind(fault)}\.layer: the router of 1 has no weight to break; choose"):
        inject(model, fault, lambda: model(inputs()))


@pytest.mark.parametrize("fault", ALONG, ids=kind)
def test_no_inputs_to_look_at(fault):
    with pytest.raises(
        ValueError, match=rf"^{kind(fault)}: inject needs run, a call that takes the model .*, got None"
    ):
        inject(layers(), fault)


@pytest.mark.parametrize("fault", [LogitBlowUp("1"), RouterCorruption("1"), BiasRunaway("1", 5)], ids=kind)
def test_faults_that_need_no_inputs_do_not_run_the_model(fault):
    model = layers()
    inject(model, fault)
    inject(model, fault, lambda: pytest.fail("was run"))


def test_what_is_no_fault_of_a_model():
    with pytest.raises(ValueError, match=r"^inject: expected a fault of a model, got SkewedInput; see .* skewed_rows"):
        inject(layers(), SkewedInput(1))
