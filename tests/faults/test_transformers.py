"""Faults in models of transformers: each does to the named layer what it says, and is taken out to the bit."""

import functools
import time

import pytest
import torch
from tests.bits import bits
from tests.monitor.transformers_models import E, Witness, batch, blocks, build, router_of

from equipoise.faults import (
    BiasRunaway,
    Collapse,
    DeadExpert,
    Drift,
    LogitBlowUp,
    NaNExpert,
    RouterCorruption,
    SlowExpert,
    SlowRank,
    inject,
)

LAYER, OTHER = "model.layers.1.mlp", "model.layers.0.mlp"
FAMILIES = ["Mixtral", "Olmoe", "DeepseekV3", "GptOss"]
K = 3
SECONDS = 0.02


@functools.cache
def model_of(family):
    """Built once: each test takes out what it has put in, and says so."""
    return build(family)


@torch.no_grad()
def logits(model):
    return model(batch()[0]).logits


def hooks(model):
    return [list(module._forward_pre_hooks) for module in model.modules()]


def put(model, fault):
    injection = inject(model, fault, lambda: logits(model))
    for _ in range(getattr(fault, "steps", 0)):
        injection.advance()
    return injection


def selections(model):
    """By layer: what the experts were called with, (T, K)."""
    witness = Witness(model)
    logits(model)
    for block in blocks(model).values():  # the witness goes: its hooks are the newest
        block.experts._forward_pre_hooks.popitem()
        router_of(block)._forward_hooks.popitem()
    return {name: torch.tensor(calls[0]) for name, calls in witness.ids.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "fault",
    [
        Collapse(LAYER, 5, 20.0),
        Collapse(LAYER, 5, 20.0, also=(2,)),
        Drift(LAYER, 5, 20.0, steps=2),
        DeadExpert(LAYER, 5),
        LogitBlowUp(LAYER, 8.0),
        RouterCorruption(LAYER, seed=3),
        NaNExpert(LAYER, 5),
        SlowExpert(LAYER, 5, SECONDS),
        SlowRank(SECONDS),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_only_the_named_layer_is_touched_and_bits_come_back(family, fault):
    model = model_of(family)
    before, listening, y = bits(model), hooks(model), logits(model)
    injection = put(model, fault)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    if isinstance(fault, SlowExpert | SlowRank):
        assert changed == []
        assert torch.equal(logits(model), y)
    else:
        [name] = changed
        assert name.startswith(f"{LAYER}.experts." if isinstance(fault, NaNExpert) else LAYER)
        assert not torch.equal(logits(model), y)
    injection.remove()
    injection.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert hooks(model) == listening
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_experts_are_called_with(family):
    """Counted by a second observer. Random inputs have little in common: most of the 21 tokens, not all, follow."""
    model = model_of(family)
    usual = selections(model)
    share = (usual[LAYER] == 5).any(1).float().mean().item()
    for fault, follows in [
        (Collapse(LAYER, 5, 60.0), lambda share_now: share_now > 0.75 > share),
        (DeadExpert(LAYER, 5, 60.0), lambda share_now: share_now < 0.5 * share),
    ]:
        injection = put(model, fault)
        now = selections(model)
        assert follows((now[LAYER] == 5).any(1).float().mean().item()), (fault, share)
        assert torch.equal(now[OTHER], usual[OTHER])
        injection.remove()
    injection = put(model, LogitBlowUp(LAYER, 4.0))
    assert torch.equal(selections(model)[LAYER].sort(1).values, usual[LAYER].sort(1).values)
    injection.remove()
    assert torch.equal(selections(model)[LAYER], usual[LAYER])


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_reaches_the_tokens_of_the_expert(family):
    model = model_of(family)
    chosen = selections(model)[LAYER]
    expert = chosen.flatten().bincount(minlength=E).argmax().item()
    injection = put(model, NaNExpert(LAYER, expert))
    lost_T = logits(model).isnan().any(-1).flatten()
    injection.remove()
    assert torch.equal(lost_T, (chosen == expert).any(1))  # the last layer: nothing after it mixes tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_time_is_spent_when_the_expert_has_tokens_and_only_then(family, monkeypatch):
    """The clock is counted, not timed: it goes on by 10 ms each time it is read."""
    model = model_of(family)
    dead = put(model, DeadExpert(LAYER, 5, 1000.0))
    chosen = selections(model)[LAYER].flatten().bincount(minlength=E)
    assert chosen.max() > 0 == chosen.min()  # some expert has no tokens
    readings = []

    def tick():
        readings.append(0.01 * len(readings))
        return readings[-1]

    for expert in (int(chosen.argmax()), int(chosen.argmin())):
        injection = put(model, SlowExpert(LAYER, expert, 0.05))
        readings.clear()
        with monkeypatch.context() as patch:
            patch.setattr(time, "perf_counter", tick)
            logits(model)
        spent = readings[-1] - readings[0] if readings else 0.0
        assert (spent >= 0.05) == bool(chosen[expert])
        injection.remove()
    dead.remove()


def test_a_runaway_of_deepseek():
    model = model_of("DeepseekV3")
    before, y = bits(model), logits(model)
    name = f"{LAYER}.gate.e_score_correction_bias"
    injection = put(model, BiasRunaway(LAYER, 5, 20.0))
    assert (model.state_dict()[name] - before[name]).tolist() == [0, 0, 0, 0, 0, 20, 0, 0]
    chosen = selections(model)
    assert (chosen[LAYER] == 5).any(1).all()
    assert not (chosen[OTHER] == 5).any(1).all()
    injection.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "DeepseekV3"])
def test_a_family_without_a_bias(family):
    with pytest.raises(
        ValueError, match=rf"^BiasRunaway\.layer: expected a layer with a selection bias, {LAYER} has none"
    ):
        put(model_of(family), BiasRunaway(LAYER, 5))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_experts_that_are_not_there(family):
    model = model_of(family)
    with pytest.raises(ValueError, match=rf"^Collapse\.layer: expected one of {OTHER}, {LAYER}, got 'model\.layers\.7"):
        put(model, Collapse("model.layers.7.mlp", 5))
    for fault in (Collapse(LAYER, E), NaNExpert(LAYER, E), SlowExpert(LAYER, E, 0.1)):
        with pytest.raises(ValueError, match=rf"^{type(fault).__name__}\.expert: expected 0 to 7, got 8"):
            put(model, fault)


def test_bits_come_back_in_bfloat16_too():
    model = build("DeepseekV3").to(torch.bfloat16)
    before = bits(model)
    for fault in (Collapse(LAYER, 5), LogitBlowUp(LAYER), NaNExpert(LAYER, 5), BiasRunaway(LAYER, 5)):
        put(model, fault).remove()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), fault
