"""Gradients of a step: the same however the batch is split, and every token counted once on the way."""

from dataclasses import replace

import pytest
import torch

from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.monitor.recorder import Recorder
from equipoise.routing import BiasBalance, QuantileBalance, SwitchLoss, TopK, ZLoss
from equipoise.train.data import IGNORE, Batch
from equipoise.train.step import global_counts, gradients, needs_global_counts, split

B, S, K, STEPS = 8, 16, 2, 3


def build(**moe):
    """Two layers, large initial weights: routing that is uneven, so that a wrong balancing loss shows."""
    torch.manual_seed(1)
    config = MoEConfig(**{"num_experts": 6, "hidden_dim": 16, "router": TopK(k=K)} | moe)
    sizes = {"vocab_size": 61, "dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "max_seq_len": S}
    return Decoder(DecoderConfig(**sizes, moe=config, init_std=0.3))


def make_batch(ignored=0):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 61, (B, S + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets.view(-1)[:ignored] = IGNORE  # all in the first sequences: micro-batches with unequal numbers of targets
    return Batch(tokens[:, :-1].contiguous(), targets, torch.zeros_like(targets))


def gradients_of(model, parts, ignored=0):
    """(loss, gradients by name, the recorder's window) of one step in so many micro-batches."""
    recorder = Recorder(model)
    loss = gradients(model, split(make_batch(ignored), parts), 1, False, recorder)
    window = recorder.flush(1)
    recorder.detach()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}, window


SCOPES = {
    "sequence": (SwitchLoss(coef=0.5, scope="sequence"), ZLoss(coef=0.1)),
    "global": (SwitchLoss(coef=0.5, scope="global"), ZLoss(coef=0.1)),
}


@pytest.mark.parametrize("ignored", [0, 40], ids=["all-targets", "some-targets"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scope", SCOPES)
def test_splitting_the_batch_changes_no_gradient(scope, dtype, ignored):
    tolerance = {torch.float64: 1e-5, torch.float32: 1e-4}[dtype]  # the routers compute in fp32 either way
    model = build(balance=SCOPES[scope]).to(dtype)
    whole_loss, whole, _ = gradients_of(model, 1, ignored)
    for parts in (2, 4, 8):
        model.zero_grad(set_to_none=True)
        loss, grads, _ = gradients_of(model, parts, ignored)
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        for name, grad in grads.items():
            scale = float(whole[name].abs().max())
            torch.testing.assert_close(grad, whole[name], rtol=tolerance, atol=tolerance * scale, msg=name)


def test_micro_scope_does_depend_on_the_split():
    """What the test above would find if a scope were not what its name says."""
    model = build(balance=(SwitchLoss(coef=0.5, scope="micro"),))
    _, whole, _ = gradients_of(model, 1)
    model.zero_grad(set_to_none=True)
    _, grads, _ = gradients_of(model, 4)
    name = "layers.0.mlp.router.weight"
    assert float((grads[name] - whole[name]).abs().max()) > 1e-3 * float(whole[name].abs().max())


def test_loss_is_the_mean_over_targets():
    model, batch = build(), make_batch(ignored=40)
    loss = gradients(model, split(batch, 4), 1, False, Recorder(model))
    logits = model(batch.tokens_BS)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten(), ignore_index=IGNORE)
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_split_keeps_order_and_everything():
    batch = make_batch()
    parts = split(batch, 4)
    assert [part.tokens_BS.shape for part in parts] == [(2, S)] * 4
    assert torch.equal(torch.cat([part.tokens_BS for part in parts]), batch.tokens_BS)
    assert torch.equal(torch.cat([part.targets_BS for part in parts]), batch.targets_BS)


# ----------------------------------------------------------------------------------------------- exact counts


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("scope", ["micro", "global"])
@pytest.mark.parametrize("balancer", [BiasBalance(), QuantileBalance()], ids=["bias", "quantile"])
def test_every_token_is_counted_once(parts, bf16, checkpointed, scope, balancer):
    """By the recorder and by the balancer: with accumulation, recomputation, the pass for global counts, bf16."""
    model = build(balance=(SwitchLoss(scope=scope), balancer), checkpoint_experts=checkpointed)
    recorder = Recorder(model)
    for step in range(STEPS):
        gradients(model, split(make_batch(), parts), step, bf16, recorder)
    for stats in recorder.flush(STEPS):
        assert stats.num_tokens == B * S * STEPS
        assert stats.counts_E.sum() == B * S * K * STEPS
        assert stats.losses.keys() == {f"switch_{scope}"}
    seen_per_token = 1 * K if isinstance(balancer, BiasBalance) else 6  # a margin per expert
    for layer in model.moe_layers.values():
        assert layer.balancer.pending.sum() == B * S * STEPS * seen_per_token


def test_recomputation_changes_neither_gradients_nor_counts():
    loss, grads, window = gradients_of(build(balance=SCOPES["global"]), 2)
    same_loss, same, same_window = gradients_of(build(balance=SCOPES["global"], checkpoint_experts=True), 2)
    assert loss == same_loss
    assert all(torch.equal(grads[name], same[name]) for name in grads)
    for a, b in zip(window, same_window, strict=True):
        assert a.counts_E.tolist() == b.counts_E.tolist()
        assert a.losses == b.losses


def test_global_counts_are_those_of_the_pass_that_trains():
    """Also with noise in the router's input: the random state is put back, the decisions are the same."""
    model = build(balance=SCOPES["global"], router=TopK(k=K, jitter=0.3))
    parts, recorder = split(make_batch(), 4), Recorder(model)
    before = torch.get_rng_state()
    with recorder.paused():
        counts_LE = global_counts(model, parts, bf16=False)
    assert torch.equal(torch.get_rng_state(), before)
    gradients(model, parts, 1, False, recorder)
    assert counts_LE.tolist() == [stats.counts_E.tolist() for stats in recorder.flush(1)]
    assert counts_LE.sum() == 2 * B * S * K
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert global_counts(model, parts, bf16=False).tolist() != counts_LE.tolist()  # the noise does matter


def test_global_counts_leave_no_hook():
    model = build(balance=SCOPES["global"])
    global_counts(model, split(make_batch(), 2), bf16=False)
    assert not any(layer.tap._forward_hooks for layer in model.moe_layers.values())


def test_who_needs_global_counts():
    assert needs_global_counts(build(balance=SCOPES["global"]))
    assert not needs_global_counts(build(balance=SCOPES["sequence"]))
    assert not needs_global_counts(Decoder(replace(build().config, moe=None)))
