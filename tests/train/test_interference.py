"""Balancing against task gradient on routers: against formulas and plain autograd, and without a trace in training."""

import math
from dataclasses import fields, replace

import pytest
import torch

from equipoise.layer import Capacity
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.monitor.recorder import Recorder
from equipoise.ops.count import count_assignments
from equipoise.routing import ROUTERS, BiasBalance, QuantileBalance, SparsityCoef, SparsityLoss, SwitchLoss, TopK, ZLoss
from equipoise.train.data import Batch, Loader
from equipoise.train.interference import Interference, interference, router_gradients
from equipoise.train.loop import Trainer
from equipoise.train.report import Silent
from equipoise.train.run import open_data
from equipoise.train.step import gradients, split

B, S, V, E, STEP = 8, 16, 61, 6, 3


def build(num_layers=2, **moe):
    """Large initial weights: routing that is uneven, so that there is something to balance."""
    torch.manual_seed(1)
    config = MoEConfig(**{"num_experts": E, "hidden_dim": 16, "router": TopK(k=2)} | moe)
    sizes = {"vocab_size": V, "dim": 32, "num_layers": num_layers, "num_heads": 4, "hidden_dim": 32, "max_seq_len": S}
    return Decoder(DecoderConfig(**sizes, moe=config, init_std=0.3))


def make_batch(seed=2):
    tokens = torch.randint(0, V, (B, S + 1), generator=torch.Generator().manual_seed(seed))
    targets = tokens[:, 1:].contiguous()
    return Batch(tokens[:, :-1].contiguous(), targets, torch.zeros_like(targets))


def cross_entropy(model, batch):
    logits = model(batch.tokens_BS)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten())


def routers(model):
    return [layer.router.weight for layer in model.moe_layers.values()]


def decisions(model, forward):
    """What each layer decides in a forward, with its graph; and what the forward returns."""
    seen = []
    hooks = [
        layer.tap.register_forward_hook(lambda module, args, routed: seen.append(routed.decision))
        for layer in model.moe_layers.values()
    ]
    result = forward()
    for hook in hooks:
        hook.remove()
    return seen, result


def assert_close(actual, expected, tolerance=1e-4):
    for a, e in zip(actual, expected, strict=True):
        assert float((a - e).norm()) <= tolerance * float(e.norm())


# ------------------------------------------------------------------------------------------------------ slow twins


@pytest.mark.parametrize("k", [1, 2])
def test_one_layer_by_the_formula(k):
    """dL/dz_tj = alpha E/T p_tj (f_j - sum_i f_i p_ti), and dL/dW = sum_t dL/dz_t x_t^T; f has no gradient."""
    coef = 0.05
    model, batch = build(num_layers=1, balance=(SwitchLoss(coef=coef),), router=TopK(k=k)), make_batch()
    inputs = []
    hook = model.layers[0].mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    [decision], _ = decisions(model, lambda: model(batch.tokens_BS))
    hook.remove()
    x_TD, p_TE = inputs[0].flatten(0, 1).double(), decision.probs_TE.detach().double()
    f_E = count_assignments(decision.expert_ids_N, E) / (B * S * k)
    dz_TE = coef * E / (B * S) * p_TE * (f_E - (p_TE * f_E).sum(1, keepdim=True))

    task, balance = router_gradients(model, [batch], STEP, bf16=False)
    assert_close(balance, [dz_TE.T @ x_TD])
    # the task's gradient is that of the same weights without any balancing loss
    plain = build(num_layers=1, router=TopK(k=k))
    plain.load_state_dict(model.state_dict())
    cross_entropy(plain, batch).backward()
    assert_close(task, [weight.grad for weight in routers(plain)])

    [measured] = interference(model, [[batch]], STEP, bf16=False)
    a, b = task[0].flatten().double(), (dz_TE.T @ x_TD).flatten()
    assert measured.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-4)
    assert measured.ratio == pytest.approx(float(b.norm() / a.norm()), rel=1e-4)
    assert measured.negative_share == float(a @ b < 0)


CASES = {
    "plain": {},
    "jitter": {"router": TopK(k=2, jitter=0.3)},
    "top-1": {"router": TopK(k=1)},
    "sigmoid": {"router": TopK(k=2, score="sigmoid")},
    "capacity": {"capacity": Capacity(factor=1.0, policy="random")},
    "shared": {"shared_experts": 1},
    "recomputed": {"checkpoint_experts": True},
}


@pytest.mark.parametrize("case", CASES)
def test_several_layers_by_plain_autograd(case):
    """A model without balancing losses; the losses are added up by hand from what its routers decide.

    The first layer's router also feels the second layer's loss, through the residual stream.
    """
    coef, z_coef = 0.05, 0.01
    model = build(balance=(SwitchLoss(coef=coef), ZLoss(coef=z_coef)), **CASES[case])
    twin = build(**CASES[case] | {"checkpoint_experts": False})
    twin.load_state_dict(model.state_dict())
    batch, state = make_batch(), torch.get_rng_state()
    seen, loss = decisions(twin, lambda: cross_entropy(twin, batch))
    expected_task = torch.autograd.grad(loss, routers(twin), retain_graph=True)
    added = 0.0
    for decision in seen:
        share_E = count_assignments(decision.expert_ids_N, E) / len(decision.expert_ids_N)
        added = added + coef * E * (share_E * decision.probs_TE.mean(0)).sum()
        added = added + z_coef * decision.logits_TE.logsumexp(-1).square().mean()
    expected_balance = torch.autograd.grad(added, routers(twin))

    torch.set_rng_state(state)
    task, balance = router_gradients(model, [batch], STEP, bf16=False)
    assert_close(task, expected_task)
    assert_close(balance, expected_balance)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("scope", ["micro", "sequence", "global"])
def test_the_two_add_up_to_the_gradient_of_the_step(scope, parts):
    """Also in micro-batches, and when the loss needs the counts of the whole batch."""
    router = TopK(k=2, jitter=0.2)
    model = build(balance=(SwitchLoss(coef=0.5, scope=scope), QuantileBalance()), router=router)
    batches = split(make_batch(), parts)
    state = torch.get_rng_state()
    task, balance = router_gradients(model, batches, STEP, bf16=False)
    assert torch.equal(torch.get_rng_state(), state)
    gradients(model, batches, STEP, False, Recorder(model))
    assert_close([t + b for t, b in zip(task, balance, strict=True)], [weight.grad for weight in routers(model)])


def every_router():
    """Each with its default options, a loss that can move it, and leave to look ahead where it must."""
    for kind in ROUTERS:
        router = kind(allow_future=True) if "allow_future" in {f.name for f in fields(kind)} else kind()
        loss = SparsityLoss(SparsityCoef(1e-3)) if router.traits.needs_loss else SwitchLoss(coef=0.5)
        yield pytest.param(router, loss, id=kind.__name__)


@pytest.mark.parametrize(("router", "loss"), list(every_router()))
def test_every_router_that_has_a_weight(router, loss):
    """Whatever state a router or a coefficient adapts from step to step, measuring does not move it."""
    model = build(router=router, balance=(loss,))
    weights = {name: getattr(layer.router, "weight", None) for name, layer in model.moe_layers.items()}
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    buffers, state = {name: buffer.clone() for name, buffer in model.named_buffers()}, torch.get_rng_state()
    measured = interference(model, [[make_batch()]], STEP, bf16=False)
    assert [each.layer for each in measured] == list(weights)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    task, balance = router_gradients(model, [make_batch()], STEP, bf16=False)
    gradients(model, [make_batch()], STEP, False, Recorder(model))
    assert_close([t + b for t, b in zip(task, balance, strict=True)], [weight.grad for weight in weights.values()])


def test_the_ratio_is_proportional_to_the_coefficient_and_the_cosine_does_not_depend_on_it():
    batches = [[make_batch(seed)] for seed in range(3)]
    small, large = (
        interference(build(balance=(SwitchLoss(coef=coef),)), batches, STEP, bf16=False) for coef in (0.001, 0.1)
    )
    for a, b in zip(small, large, strict=True):
        assert a.layer == b.layer
        assert a.cosine != 0
        assert b.cosine == pytest.approx(a.cosine, abs=1e-5)
        assert b.ratio == pytest.approx(100 * a.ratio, rel=1e-4)


# --------------------------------------------------------------------------------------------------- what it returns


@pytest.mark.parametrize("balance", [(), (BiasBalance(rate=0.1),), (QuantileBalance(),), (SwitchLoss(coef=0.0),)])
def test_without_a_balancing_gradient_all_is_zero(balance):
    measured = interference(build(balance=balance), [[make_batch()]], STEP, bf16=False)
    assert measured == [Interference(f"layers.{i}.mlp", 0.0, 0.0, 0.0, 1) for i in (0, 1)]


def test_several_batches_are_averaged_and_the_negative_ones_counted():
    model = build(balance=(SwitchLoss(coef=0.05),))
    batches = [[make_batch(seed)] for seed in range(5)]
    single = [interference(model, [batch], STEP, bf16=False) for batch in batches]
    for layer, result in enumerate(interference(model, batches, STEP, bf16=False)):
        cosines = [measured[layer].cosine for measured in single]
        assert result.num_batches == 5
        assert result.cosine == pytest.approx(sum(cosines) / 5)
        assert result.ratio == pytest.approx(sum(measured[layer].ratio for measured in single) / 5)
        assert result.negative_share == sum(cosine < 0 for cosine in cosines) / 5


def test_a_router_that_the_task_does_not_reach():
    """Experts that all give zero leave the router without a task; the ratio says so."""
    model = build(num_layers=1, balance=(SwitchLoss(coef=0.05),))
    torch.nn.init.zeros_(model.layers[0].mlp.experts.down_proj)
    [measured] = interference(model, [[make_batch()]], STEP, bf16=False)
    assert (measured.cosine, measured.ratio) == (0.0, math.inf)


def test_layers_without_experts_are_left_out_and_a_dense_model_has_none():
    config = build(balance=(SwitchLoss(coef=0.05),)).config
    [measured] = interference(Decoder(replace(config, moe_layers=(1,))), [[make_batch()]], STEP, bf16=False)
    assert measured.layer == "layers.1.mlp"
    assert interference(Decoder(replace(config, moe=None)), [[make_batch()]], STEP, bf16=False) == []


def test_a_frozen_router_is_left_out():
    model = build(balance=(SwitchLoss(coef=0.05),))
    model.layers[0].mlp.router.weight.requires_grad_(False)
    [measured] = interference(model, [[make_batch()]], STEP, bf16=False)
    assert measured.layer == "layers.1.mlp"
    assert measured.ratio > 0


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="interference: expected at least one batch, got none"):
        interference(build(), [], STEP, bf16=False)


# -------------------------------------------------------------------------------------------------- leaves no trace


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("balancer", [BiasBalance(rate=0.1), QuantileBalance()], ids=["bias", "quantile"])
def test_everything_is_as_it_was(balancer, training, bf16):
    model = build(balance=(SwitchLoss(coef=0.1, scope="global"), balancer), router=TopK(k=2, jitter=0.2))
    recorder = Recorder(model)
    gradients(model, [make_batch()], STEP, bf16, recorder)  # gradients, pending counts and a window are there already
    model.train(training)
    model.layers[1].eval()  # a part may be in another mode than the whole
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    window, state = recorder.state_dict(), torch.get_rng_state()
    first = interference(model, [split(make_batch(), 2)], STEP, bf16, recorder)
    assert all(torch.equal(parameter.grad, grads[name]) for name, parameter in model.named_parameters())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, window[name]) for name, value in recorder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(measured.ratio > 0 for measured in first)  # also from eval: the losses exist in training only
    assert interference(model, [split(make_batch(), 2)], STEP, bf16, recorder) == first


def test_an_error_leaves_everything_as_it_was():
    model = build(balance=(SwitchLoss(coef=0.1), BiasBalance())).eval()
    batch = make_batch()
    batch.tokens_BS[-1, -1] = V  # the last micro-batch has an id that the model does not know
    with pytest.raises(ValueError, match="tokens_BS: expected ids"):
        interference(model, [split(batch, 2)], STEP, bf16=False)
    assert not model.training
    assert all(not layer.balancer.pending.any() for layer in model.moe_layers.values())


# ------------------------------------------------------------------------------------------------------ in training


def weights_after(trainer):
    trainer.run()
    trainer.close("finished")
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_a_run_that_measures_ends_with_the_same_bits(make_config, history, tmp_path):
    """With micro-batches, a loss over the global batch, jitter, random drops and an active balancer."""
    config, data = open_data(make_config())
    plain = weights_after(Trainer(config, data, tmp_path / "plain", Silent()))
    config = replace(config, interference_every=3)
    measured = weights_after(Trainer(config, data, tmp_path / "measured", Silent()))
    assert all(torch.equal(measured[name], plain[name]) for name in plain)
    recorded, expected = history(tmp_path / "measured"), history(tmp_path / "plain")
    added = recorded["scalars"].keys() - expected["scalars"].keys()
    layers = ("layers.0.mlp", "layers.1.mlp")
    kinds = ("cosine", "ratio", "negative_share")
    assert added == {f"interference_{kind}.{layer}" for kind in kinds for layer in layers}
    for layer in layers:
        cosines = recorded["scalars"][f"interference_cosine.{layer}"]
        assert [step for step, _ in cosines] == [3, 6, 9, 12]
        assert all(0 < abs(cosine) <= 1 for _, cosine in cosines)
        shares = recorded["scalars"][f"interference_negative_share.{layer}"]
        assert shares == [(step, float(cosine < 0)) for step, cosine in cosines]
    for name in added:
        del recorded["scalars"][name]
    assert recorded == expected


def test_what_a_run_records_is_of_the_batch_that_the_step_takes(make_config, history, tmp_path):
    """All of it, in its micro-batches, with the weights before the step."""
    config, data = open_data(make_config(interference_every=3, steps=3))
    trainer = Trainer(config, data, tmp_path / "run", Silent())
    trainer.run(until=2)
    loader = Loader(data.train, config.batch_size, config.data.seq_len, config.seed)
    batch = [loader.next_batch() for _ in range(3)][2]
    expected = interference(trainer.model, [split(batch.to(trainer.device), 2)], 3, bf16=False)
    trainer.run()
    trainer.close("finished")
    scalars = history(tmp_path / "run")["scalars"]
    for layer in expected:
        assert {name: scalars[name] for name in layer.scalars()} == {
            name: [(3, value)] for name, value in layer.scalars().items()
        }


def test_a_resumed_run_measures_the_same(make_config, history, tmp_path):
    config, data = open_data(make_config(interference_every=2, checkpoint_every=5))
    weights_after(Trainer(config, data, tmp_path / "straight", Silent()))
    first = Trainer(config, data, tmp_path / "resumed", Silent())
    first.run(until=7)
    first.close("failed")
    weights_after(Trainer(config, data, tmp_path / "resumed", Silent(), resume=True))
    assert history(tmp_path / "resumed") == history(tmp_path / "straight")


def test_a_negative_interval_is_refused(make_config):
    with pytest.raises(ValueError, match=r"interference_every: expected 0 \(never\) or more, got -1"):
        make_config(interference_every=-1)
