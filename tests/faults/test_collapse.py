"""The fault injector: it does what it says to the layer it names, and can be taken out again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from equipoise.faults import Collapse, constant_direction, inject
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.monitor.recorder import Recorder
from equipoise.monitor.watch import watch
from equipoise.routing import SwitchLoss, TopK

B, S, E, K = 32, 16, 8, 2


@pytest.fixture
def model():
    moe = MoEConfig(num_experts=E, hidden_dim=16, router=TopK(k=K), balance=(SwitchLoss(),))
    sizes = {"vocab_size": 64, "dim": 32, "num_layers": 3, "num_heads": 4, "hidden_dim": 32, "max_seq_len": S}
    return Decoder(DecoderConfig(**sizes, moe=moe, moe_layers=(1, 2), init_std=0.2))


def tokens():
    return torch.randint(0, 64, (B, S), generator=torch.Generator().manual_seed(3))


def routing(model):
    recorder = Recorder(model)
    model(tokens())
    recorder.detach()
    return {stats.layer: stats for stats in recorder.flush(1)}


# ---------------------------------------------------------------------------------------------- constant direction


def test_constant_direction_by_hand():
    # x = (1, a) for a = -1, 1: gram = identity, mean x = (1, 0), ridge 0.5 of mean square 1: w = (1, 0) / 1.5
    x_TD = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    torch.testing.assert_close(constant_direction(x_TD, ridge=0.5), torch.tensor([1 / 1.5, 0.0]))


@given(scale=st.floats(1e-3, 1e3), num_tokens=st.integers(1, 40))
def test_constant_direction_gives_every_token_the_same_logit(scale, num_tokens):
    """A token has a part in common with all others: the direction finds it, whatever the scale."""
    generator = torch.Generator().manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, 12, generator=generator)
    x_TD[:, 4] = 3.0
    logits_T = (scale * x_TD) @ constant_direction(scale * x_TD)
    assert logits_T.sub(1.0).abs().max() < 0.02


def test_constant_direction_is_fp32_whatever_the_input():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        direction = constant_direction(torch.ones(3, 4, dtype=dtype))
        assert (direction.shape, direction.dtype) == ((4,), torch.float32)


# ------------------------------------------------------------------------------------------------------- injection


def test_the_named_layer_collapses_onto_the_named_expert(model):
    before = routing(model)
    assert before["layers.2.mlp"].max_token_share < 0.6
    inject(model, Collapse("layers.2.mlp", expert=5), lambda: model(tokens()))
    after = routing(model)
    assert after["layers.2.mlp"].max_token_share > 0.9
    assert after["layers.2.mlp"].counts_E.argmax() == 5
    assert after["layers.1.mlp"].counts_E.tolist() == before["layers.1.mlp"].counts_E.tolist()


def test_the_logit_rises_by_about_the_intensity(model):
    seen = []
    model.moe_layers["layers.1.mlp"].tap.register_forward_hook(lambda m, args, routed: seen.append(routed.decision))
    inject(model, Collapse("layers.1.mlp", expert=0, intensity=4.0), lambda: model(tokens()))
    model(tokens())
    rise_T = seen[-1].logits_TE[:, 0] - seen[0].logits_TE[:, 0]
    assert 2.4 < rise_T.detach().mean().item() < 4.4  # random inputs have little in common: a regression falls short


def test_only_one_row_of_one_weight_changes(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject(model, Collapse("layers.1.mlp", expert=3), lambda: model(tokens()))
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["layers.1.mlp.router.weight"]
    rows = (model.state_dict()[changed[0]] != before[changed[0]]).any(1).nonzero()[:, 0]
    assert rows.tolist() == [3]


def test_injecting_trains_nothing_and_leaves_nothing_behind(model):
    recorder = Recorder(model)
    rng, hooks = torch.get_rng_state(), [dict(m._forward_pre_hooks) for m in model.modules()]
    with recorder.paused():
        inject(model, Collapse("layers.1.mlp", expert=3), lambda: model(tokens()))
    assert recorder.flush(1)[0].num_tokens == 0
    assert torch.equal(torch.get_rng_state(), rng)
    assert [dict(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("intensity", [0.5, 10.0, 100.0])
def test_remove_restores_the_weight_up_to_its_rounding(model, intensity):
    """w + c - c in fp32: off by at most the rounding of w + c, in each element."""
    weight = model.moe_layers["layers.1.mlp"].router.weight
    before = weight.clone()
    injection = inject(model, Collapse("layers.1.mlp", expert=3, intensity=intensity), lambda: model(tokens()))
    faulty = weight.clone()
    injection.remove()
    rounding = torch.finfo(torch.float32).eps * torch.maximum(faulty[3].abs(), before[3].abs())
    assert bool(((weight[3] - before[3]).abs() <= rounding).all())
    others = [row for row in range(E) if row != 3]
    assert torch.equal(weight[others], before[others])
    assert routing(model)["layers.1.mlp"].max_token_share < 0.6


def test_remove_keeps_what_was_learned_meanwhile(model):
    weight = model.moe_layers["layers.1.mlp"].router.weight
    before = weight.clone()
    injection = inject(model, Collapse("layers.1.mlp", expert=3), lambda: model(tokens()))
    learned = torch.randn_like(weight) * 0.01
    with torch.no_grad():
        weight += learned
    injection.remove()
    torch.testing.assert_close(weight, before + learned, rtol=0, atol=1e-5)


def test_the_watch_names_layer_and_expert_within_three_windows(model):
    with watch(model, every=1) as observer:
        model(tokens())
        observer.step(1)
        with observer.recorder.paused():
            inject(model, Collapse("layers.2.mlp", expert=6), lambda: model(tokens()))
        fired = []
        for step in (2, 3, 4):
            model(tokens())
            fired += observer.step(step)
    [alert] = [alert for alert in fired if alert.finding.rule == "collapse"]
    assert (alert.state, alert.finding.layer, alert.finding.expert) == ("firing", "layers.2.mlp", 6)


# ---------------------------------------------------------------------------------------------------------- errors


def test_unknown_layer(model):
    with pytest.raises(
        ValueError, match=r"Collapse\.layer: expected one of layers\.1\.mlp, layers\.2\.mlp, got 'layers\.0"
    ):
        inject(model, Collapse("layers.0.mlp", expert=0), lambda: model(tokens()))
    with pytest.raises(ValueError, match=r"Collapse\.layer: expected one of none, got 'mlp'"):
        inject(nn.Linear(2, 2), Collapse("mlp", expert=0), lambda: None)


@pytest.mark.parametrize("expert", [-1, E])
def test_unknown_expert(model, expert):
    with pytest.raises(ValueError, match=rf"Collapse\.expert: expected 0 to 7, got {expert}"):
        inject(model, Collapse("layers.1.mlp", expert=expert), lambda: model(tokens()))


def test_a_run_that_does_not_reach_the_layer(model):
    before = model.moe_layers["layers.1.mlp"].router.weight.clone()
    with pytest.raises(ValueError, match=r"inject: run\(\) did not reach the layer; let it call the model"):
        inject(model, Collapse("layers.1.mlp", expert=0), lambda: None)
    assert torch.equal(model.moe_layers["layers.1.mlp"].router.weight, before)


def run_that_fails():
    raise RuntimeError("no data")


def test_an_error_in_the_run_leaves_the_model_alone(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="no data"):
        inject(model, Collapse("layers.1.mlp", expert=0), run_that_fails)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert not model.moe_layers["layers.1.mlp"].router._forward_pre_hooks
