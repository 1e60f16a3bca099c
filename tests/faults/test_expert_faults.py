"""Faults of experts: a value that is none, and time that is lost. Outputs and weights, to the bit."""

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.bits import bits
from torch import nn

from equipoise.faults import NaNExpert, SlowExpert, SlowRank, inject
from equipoise.layer import MoE
from equipoise.routing import TopK

T, D, E = 48, 16, 8
SECONDS = 0.03


def layers():
    """Two layers, "0" and "1"."""
    torch.manual_seed(0)
    return nn.Sequential(*[MoE(D, 8, E, router=TopK(k=2)) for _ in range(2)])


def tokens_for(layer, experts):
    """Tokens that all go to these two experts: feature 0 is 1, and only their rows of the weight ask for it."""
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[list(experts), 0] = 9.0
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    x_TD[:, 0] = 1.0
    return x_TD


def same(model, before):
    return all(
        torch.equal(tensor.nan_to_num(), before[name].nan_to_num())
        and torch.equal(tensor.isnan(), before[name].isnan())
        for name, tensor in model.state_dict().items()
    )


def hooks(model):
    return [list(module._forward_pre_hooks) for module in model.modules()]


def timed(call):
    """(seconds on the clock that the fault reads, the result)."""
    since = time.perf_counter()
    result = call()
    return time.perf_counter() - since, result


# ------------------------------------------------------------------------------------------------ NaN


@given(expert=st.integers(0, E - 1), seed=st.integers(0, 2**63 - 1))
def test_one_value_of_one_expert_is_nan_and_comes_back(expert, seed):
    model = layers()
    before = bits(model)
    injection = inject(model, NaNExpert("1", expert, seed))
    hit = {name: tensor.isnan().nonzero() for name, tensor in model.state_dict().items() if tensor.isnan().any()}
    [(name, [place])] = hit.items()
    assert name.startswith("1.experts.")
    assert place[0] == expert
    assert sum(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()) == 1
    injection.remove()
    assert same(model, before)


def test_every_weight_can_be_hit():
    """Values are as likely as each other: of 60 seeds some meet each of the layer's weights."""
    model = layers()
    names = {name for name, parameter in model[1].experts.named_parameters()}
    met = set()
    for seed in range(60):
        injection = inject(model, NaNExpert("1", 2, seed))
        met |= {name for name, parameter in model[1].experts.named_parameters() if parameter.isnan().any()}
        injection.remove()
    assert met == names


def test_the_seed_repeats():
    places = []
    for seed in (5, 5, 6):
        model = layers()
        inject(model, NaNExpert("1", 2, seed))
        places.append(torch.cat([parameter.isnan().flatten() for parameter in model[1].experts.parameters()]))
    assert torch.equal(places[0], places[1])
    assert not torch.equal(places[0], places[2])


def test_tokens_of_the_expert_are_lost_and_no_others():
    model = layers()
    x_TD = tokens_for(model[1], (2, 5))
    y = model[1](x_TD)
    injection = inject(model, NaNExpert("1", 3))
    assert torch.equal(model[1](x_TD), y)
    injection.remove()
    injection = inject(model, NaNExpert("1", 2))
    assert model[1](x_TD).isnan().any(1).all()
    injection.remove()
    assert torch.equal(model[1](x_TD), y)


def test_nan_comes_back_also_after_other_weights_were_trained():
    model = layers()
    before = bits(model)
    injection = inject(model, NaNExpert("1", 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)  # NaN + 0.5 is NaN
    injection.remove()
    hit = 0
    for name, parameter in model.named_parameters():
        kept = parameter == before[name]  # the value that was put back is as it was
        hit += int(kept.sum())
        torch.testing.assert_close(parameter[~kept], before[name][~kept] + 0.5, rtol=0, atol=0)
    assert hit == 1


def test_a_number_that_a_rollback_put_there_stays():
    model = layers()
    before = bits(model)
    injection = inject(model, NaNExpert("1", 2))
    model.load_state_dict({name: tensor + 1 for name, tensor in before.items()})
    rolled = bits(model)
    injection.remove()
    assert same(model, rolled)


def test_nan_twice_is_once():
    model = layers()
    injection = inject(model, NaNExpert("1", 2))
    injection.remove()
    with torch.no_grad():
        for parameter in model[1].experts.parameters():
            parameter.fill_(math.nan)
    now = bits(model)
    injection.remove()
    assert same(model, now)


# ------------------------------------------------------------------------------------------------ slow


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fault", [SlowExpert("1", 2, SECONDS), SlowRank(SECONDS)], ids=["expert", "rank"])
def test_slow_outputs_and_gradients_are_bit_identical(fault, training):
    model = layers().train(training)
    x_TD = torch.randn(T, D)

    def run():
        model.zero_grad()
        y_TD = model(x_TD)
        y_TD.square().sum().backward()
        return [y_TD.detach(), *[parameter.grad.clone() for parameter in model.parameters()]]

    expected, before = run(), hooks(model)
    injection = inject(model, fault)
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    injection.remove()
    injection.remove()
    assert hooks(model) == before
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


def test_the_time_is_spent_when_the_expert_has_tokens():
    """At least so long on the clock: what else the machine does can only add to it."""
    model = layers()
    x_TD = tokens_for(model[1], (2, 5))
    for expert in (2, 5):
        injection = inject(model, SlowExpert("1", expert, SECONDS))
        assert timed(lambda: model[1](x_TD))[0] >= SECONDS
        injection.remove()


@pytest.fixture
def spent(monkeypatch):
    """A clock for the hook that goes on by 10 ms each time it is read; the list of readings."""
    readings = []

    def tick():
        readings.append(0.01 * len(readings))
        return readings[-1]

    monkeypatch.setattr("equipoise.faults.slow.time.perf_counter", tick)
    return readings


def test_no_time_is_spent_without_tokens_for_the_expert(spent):
    model = layers()
    x_TD = tokens_for(model[1], (2, 5))
    inject(model, SlowExpert("1", 3, SECONDS))
    model[1](x_TD)
    model[0](x_TD)
    assert spent == []  # the clock was not looked at
    x_TD = tokens_for(model[1], (2, 3))
    model[1](x_TD)
    assert spent[-1] - spent[0] >= SECONDS


class Probe:
    """Times nothing; keeps (expert, how often the clock was read before) of each begin and end."""

    def __init__(self, layer, readings):
        self.told, self._readings = [], readings
        layer.experts.probes = (self,)

    def begin(self, expert, num_rows):
        self.told.append((expert, len(self._readings)))

    def end(self, expert):
        self.told.append((expert, len(self._readings)))


def test_where_experts_are_timed_one_by_one_the_time_is_spent_in_that_one(spent):
    """Also when the timing comes after the fault; and without it, experts are computed together again."""
    model = layers()
    x_TD = tokens_for(model[1], (2, 5))
    expected = model[1](x_TD)
    injection = inject(model, SlowExpert("1", 5, SECONDS))
    probe = Probe(model[1], spent)
    assert torch.equal(model[1](x_TD), expected)
    (first, before), (_, after), (second, begun), (_, ended) = probe.told
    assert (first, before, after) == (2, 0, 0)
    assert (second, begun) == (5, 0)
    assert ended > SECONDS / 0.01
    model[1].experts.probes = tuple(each for each in model[1].experts.probes if each is not probe)
    assert torch.equal(model[1](x_TD), expected)
    assert model[1].experts.probes == ()
    model[1].experts.probes = (probe,)
    model[1](x_TD)
    injection.remove()
    assert model[1].experts.probes == (probe,)


def test_a_slow_rank_is_slow_in_every_layer(spent):
    model = layers()
    x_TD = torch.randn(T, D)
    injection = inject(model, SlowRank(SECONDS))
    for number in (0, 1):
        spent.clear()
        model[number](x_TD)
        assert spent[-1] - spent[0] >= SECONDS
    injection.remove()
    spent.clear()
    model(x_TD)
    assert spent == []


def test_two_slow_faults_add_up_and_go_one_by_one(spent):
    model = layers()
    x_TD = tokens_for(model[1], (2, 5))
    first, second = inject(model, SlowExpert("1", 2, 0.1)), inject(model, SlowRank(0.2))
    # readings are 0.01 apart: a wait of s takes one to start, and s / 0.01 more, give or take one for rounding
    for injection, waits in ((second, 2), (first, 1), (None, 0)):
        spent.clear()
        model[1](x_TD)
        assert abs(len(spent) - {2: 32, 1: 11, 0: 0}[waits]) <= waits
        if injection:
            injection.remove()


# ------------------------------------------------------------------------------------------------ errors


def test_errors_of_the_fields():
    for seconds in (0.0, -1.0, math.nan, math.inf, 61.0):
        for make in (lambda s: SlowExpert("1", 2, s), SlowRank):
            with pytest.raises(
                ValueError, match=r"^Slow\w+\.seconds: expected a number of more than 0 and at most 60, got"
            ):
                make(seconds)
    with pytest.raises(ValueError, match=r"^NaNExpert\.seed: expected a whole number from 0 to 2\^63 - 1, got -1"):
        NaNExpert("1", 2, seed=-1)


@pytest.mark.parametrize("fault", [NaNExpert("1", E), SlowExpert("1", E, SECONDS)], ids=["nan", "slow"])
def test_an_expert_that_is_not_there(fault):
    model = layers()
    before = hooks(model)
    with pytest.raises(ValueError, match=r"^(NaNExpert|SlowExpert)\.expert: expected 0 to 7, got 8"):
        inject(model, fault)
    assert hooks(model) == before


@pytest.mark.parametrize("fault", [NaNExpert("9", 0), SlowExpert("9", 0, SECONDS)], ids=["nan", "slow"])
def test_a_layer_that_is_not_there(fault):
    with pytest.raises(ValueError, match=r"^(NaNExpert|SlowExpert)\.layer: expected one of 0, 1, got '9'"):
        inject(layers(), fault)


def test_a_model_without_experts():
    with pytest.raises(ValueError, match=r"^SlowRank: expected a model with MoE layers, Linear has none"):
        inject(nn.Linear(2, 2), SlowRank(SECONDS))
