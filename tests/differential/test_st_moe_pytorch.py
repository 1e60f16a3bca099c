"""Our layer against the installed st-moe-pytorch: choices, gates, both losses, and whole layers.

It follows ST-MoE (arXiv 2202.08906) by way of Mesh TensorFlow: one-hot dispatch per sequence, a random second expert,
losses in training only. Its noise, its distributed code and its extra feed-forward blocks are not compared.
"""

import pytest
import torch
from tests.differential.harness import assert_same, forward_and_see, loss_of, with_router
from torch import Tensor, nn

from equipoise.layer import Capacity, FeedForward
from equipoise.routing import SwitchLoss, TopK, ZLoss

st_moe = pytest.importorskip("st_moe_pytorch.st_moe_pytorch")

D, F, E, B, S = 16, 12, 8, 3, 10
T = B * S


def gating(weight_ED: Tensor, k: int, *, threshold: float = 0.0, capacity_factor: float | None = None) -> nn.Module:
    """Its gate with our router's weight.

    threshold 0 always routes to the second expert; a capacity factor of E has room for every token of a sequence.
    straight_through_dispatch_tensor=False: otherwise the gates' gradient is added to the experts' inputs as well.
    """
    num_experts, dim = weight_ED.shape
    factor = float(num_experts) if capacity_factor is None else capacity_factor
    gate = st_moe.TopNGating(
        dim,
        num_experts,
        top_n=k,
        threshold_train=threshold,
        threshold_eval=threshold,
        capacity_factor_train=factor,
        capacity_factor_eval=factor,
        straight_through_dispatch_tensor=False,
    )
    with torch.no_grad():
        gate.to_gates.weight.copy_(weight_ED)
    return gate


def twins() -> tuple[Tensor, Tensor]:
    """Two leaves with the same random input (B, S, D)."""
    x = torch.randn(B, S, D)
    return x.clone().requires_grad_(), x.clone().requires_grad_()


# ------------------------------------------------------------------------------------------- choices and gates


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_choices_normalised_gates_and_gradients(k, order):
    """Its gates are the softmax over all experts, divided by the sum of the chosen ones: our renormalised weights.

    Its combine tensor (B, S, E, C) holds each token's gate at the expert and the place in its queue.
    """
    weight = torch.randn(E, D)
    gate, layer = gating(weight, k).eval(), with_router(weight, TopK(k=k, order=order)).eval()
    x_theirs, x_ours = twins()
    _, combine, _, _ = gate(x_theirs)
    theirs = combine.sum(-1).view(T, E)
    decision = layer.router(x_ours.view(T, D), None, None)
    ids, weights = decision.expert_ids_N.view(T, k), decision.weights_N.view(T, k)
    dense = weights.new_zeros(T, E).scatter(1, ids, weights)

    assert torch.equal(ids, theirs.topk(k).indices)  # in order: the first choice has the largest gate
    assert_same(dense, theirs, "gates")
    torch.testing.assert_close(theirs.sum(1), torch.ones(T))

    cotangent = torch.randn(T, E)
    (theirs * cotangent).sum().backward()
    (dense * cotangent).sum().backward()
    assert_same(layer.router.weight.grad, gate.to_gates.weight.grad, "router weight")
    assert_same(x_ours.grad, x_theirs.grad, "x")


def test_by_default_its_second_expert_is_random_in_eval_too():
    """A second gate below 0.2 is followed with probability gate / 0.2 only, which saves capacity (GShard).

    Drawn anew in each forward, also in eval: a token's output is not a function of the token. Ours is.
    """
    weight, x = torch.randn(E, D), torch.randn(B, S, D)
    gate, layer = gating(weight, 2, threshold=0.2).eval(), with_router(weight, TopK(k=2)).eval()
    first, again = (gate(x)[1].sum(-1) for _ in range(2))
    assert not torch.equal(first, again)
    assert torch.equal(layer(x), layer(x))


# ---------------------------------------------------------------------------------------------------- the losses


def test_router_z_loss():
    """The mean over tokens of the squared log-sum-exp, value and gradient. It returns 0 in eval, ours no losses."""
    weight = torch.randn(E, D)
    gate, layer = gating(weight, 2), with_router(weight, TopK(k=2), balance=(ZLoss(coef=1.0),))
    x_theirs, x_ours = twins()
    *_, theirs = gate(x_theirs)
    theirs.backward()
    assert_same(loss_of(layer, x_ours), theirs.detach())
    assert_same(layer.router.weight.grad, gate.to_gates.weight.grad, "router weight")
    assert_same(x_ours.grad, x_theirs.grad, "x")
    assert gate.eval()(x_theirs)[-1].item() == 0
    assert forward_and_see(layer.eval(), x_ours)[1].losses == {}


@pytest.mark.parametrize("k", [2, 3])
def test_balance_loss_is_our_sequence_loss_of_first_choices(k):
    """Its load is that of first choices, whatever k, within each sequence; the mean over sequences is our "sequence".

    A top-1 router with the same weight makes those choices, so our loss of its decision is theirs, with the gradient.
    """
    weight = torch.randn(E, D)
    gate = gating(weight, k)
    first_choices = with_router(weight, TopK(k=1), balance=(SwitchLoss(coef=1.0, scope="sequence"),))
    x_theirs, x_ours = twins()
    _, _, theirs, _ = gate(x_theirs)
    theirs.backward()
    assert_same(loss_of(first_choices, x_ours), theirs.detach())
    assert_same(first_choices.router.weight.grad, gate.to_gates.weight.grad, "router weight")
    assert_same(x_ours.grad, x_theirs.grad, "x")


def test_balance_loss_does_not_see_second_choices_and_ours_does():
    """Four experts, four tokens: token t takes expert t first and expert 3 second; token 3 takes 3, then 0.

    First choices are even, so its loss is 4 * sum(P / 4) = 1 and has no gradient. All choices are not: the load is
    (2, 1, 1, 4) of 8, and ours, with those shares times the mean probabilities, is above 1 and pulls expert 3 down.
    """
    logits = torch.tensor([[4.0, 0, 0, 3], [0, 4.0, 0, 3], [0, 0, 4.0, 3], [3, 0, 0, 4.0]])
    z_theirs, z_ours = logits[None].clone().requires_grad_(), logits[None].clone().requires_grad_()
    _, _, theirs, _ = gating(torch.eye(4), 2)(z_theirs)
    theirs.backward()
    assert theirs.item() == pytest.approx(1, rel=1e-6)
    assert z_theirs.grad.abs().max() < 1e-7

    loss = loss_of(with_router(torch.eye(4), TopK(k=2), balance=(SwitchLoss(coef=1.0, scope="sequence"),)), z_ours)
    share, mean_p = torch.tensor([2.0, 1, 1, 4]) / 8, logits.softmax(-1).mean(0)
    assert loss.item() == pytest.approx(4 * (share * mean_p).sum().item(), rel=1e-6)
    assert loss.item() > 1.18
    assert z_ours.grad[0, :, 3].min() > 0.01


# ------------------------------------------------------------------------------------------------- whole layers


def test_its_capacity_leaves_out_k_and_ours_does_not():
    """Its capacity is int(S * factor / E), at least 4, per sequence: at factor 1 that is room for the first choices.

    16 tokens, 4 experts, k = 2, perfectly even: each expert is wanted 8 times and takes 4, so half of the assignments
    are dropped, all second choices among them. Ours is ceil(factor * T * k / E) = 8: nothing is dropped.
    """
    logits = torch.stack([torch.tensor([2.0, 1, 0, 0]).roll(t) for t in range(16)])
    dispatch, combine, _, _ = gating(torch.eye(4), 2, capacity_factor=1.0)(logits[None])
    assert dispatch.shape[-1] == 4
    assert dispatch.bool().sum().item() == 16  # of 32
    assert torch.equal(combine.sum(-1)[0].argmax(1), torch.arange(16) % 4)

    drops = {}
    for factor in (1.0, 0.5):
        layer = with_router(torch.eye(4), TopK(k=2), capacity=Capacity(factor))
        drops[factor] = forward_and_see(layer, logits)[1].plan.drops["capacity"].item()
    assert drops == {1.0: 0, 0.5: 16}


@pytest.mark.parametrize("k", [2, 3])
def test_output_and_gradients_of_the_whole_layer(k):
    """Its one-hot einsums over (B, S, E, C) and our ragged rows are the same function, given the same experts."""
    layer = with_router(torch.randn(E, D), TopK(k=k))
    experts = []
    for e in range(E):
        expert = FeedForward(D, F)
        expert.gate_up_proj.weight = nn.Parameter(layer.experts.gate_up_proj[e].detach().clone())
        expert.down_proj.weight = nn.Parameter(layer.experts.down_proj[e].detach().clone())
        experts.append(expert)
    moe = st_moe.MoE(D, num_experts=E, gating_top_n=k, experts=nn.ModuleList(experts))
    moe.gate = gating(layer.router.weight.detach(), k)

    x_theirs, x_ours = twins()
    expected, actual = moe(x_theirs).outputs, layer(x_ours)
    assert_same(actual, expected, "output")
    cotangent = torch.randn(B, S, D)
    expected.backward(cotangent)
    actual.backward(cotangent)
    assert_same(x_ours.grad, x_theirs.grad, "x")
    assert_same(layer.router.weight.grad, moe.gate.to_gates.weight.grad, "router weight")
    for name, own in (("gate_up_proj", layer.experts.gate_up_proj), ("down_proj", layer.experts.down_proj)):
        assert_same(own.grad, torch.stack([getattr(expert, name).weight.grad for expert in experts]), name)
