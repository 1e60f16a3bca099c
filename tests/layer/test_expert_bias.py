"""Experts and routers with biases, as gpt-oss has them: the reference's numbers and gradients, through everything."""

from types import SimpleNamespace

import pytest
import torch

from equipoise.layer import Capacity, MoE
from equipoise.ops import reference
from equipoise.routing import TopK


def build(activation="clamped_swiglu", **options):
    layer = MoE(
        16, 8, 6, router=TopK(k=2, order="post", linear_bias=True), activation=activation, expert_bias=True, **options
    )
    layer.init_weights(0.5, 0.5)
    with torch.no_grad():
        for each in (layer.experts.up_bias, layer.experts.down_bias, layer.router.linear_bias):
            torch.nn.init.normal_(each)
    return layer.double()


def expected(layer, x_TD):
    logits_TE = x_TD @ layer.router.weight.t() + layer.router.linear_bias
    top = logits_TE.topk(2)
    tokens_N = torch.arange(len(x_TD)).repeat_interleave(2)
    experts = layer.experts
    return reference.experts(
        x_TD, tokens_N, top.indices.flatten(), top.values.softmax(-1).flatten(), experts.up, experts.down_proj,
        experts.activation, experts.biases,
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["clamped_swiglu", "swiglu", "gelu"])
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_equals_the_reference_forward_and_backward(activation, tokens):
    torch.manual_seed(tokens)
    layer = build(activation)
    x = torch.randn(tokens, 16, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    y, y_expected = layer(x), expected(layer, x)
    torch.testing.assert_close(y, y_expected)
    seed = torch.randn_like(y)
    got = torch.autograd.grad(y, wanted, seed)
    for ours, theirs in zip(got, torch.autograd.grad(y_expected, wanted, seed), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_probes_see_each_expert_and_change_nothing():
    layer = build()
    x = torch.randn(20, 16, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    plain = layer(x)
    log = []
    layer.experts.probes = (SimpleNamespace(begin=lambda e, n: log.append((e, n)), end=lambda e: None),)
    timed = layer(x)
    torch.testing.assert_close(timed, plain)
    assert sum(rows for _, rows in log) == 40
    seed = torch.randn_like(plain)
    pairs = zip(torch.autograd.grad(plain, wanted, seed), torch.autograd.grad(timed, wanted, seed), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_without_gradients_and_under_autocast():
    layer = build().float()
    x = torch.randn(20, 16)
    with torch.no_grad():
        plain = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            lower = layer(x)
    torch.testing.assert_close(plain, expected(layer, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lower.float(), plain, rtol=0.05, atol=0.1)


def test_a_dropped_assignment_brings_no_bias():
    layer = build(capacity=Capacity(factor=0.01))  # one row per expert
    with torch.no_grad():
        layer.router.linear_bias.zero_()[:2] = 50.0  # all tokens to experts 0 and 1
    x = torch.randn(20, 16, dtype=torch.float64)
    assert torch.equal(layer.train()(x)[1:], torch.zeros(19, 16, dtype=torch.float64))


def test_a_linear_bias_moves_the_choice():
    layer = build()
    with torch.no_grad():
        layer.router.linear_bias.zero_()[4:] = 100.0
    decision = layer.router(torch.randn(9, 16, dtype=torch.float64))
    assert set(decision.expert_ids_N.tolist()) == {4, 5}
