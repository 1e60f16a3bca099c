"""A router that sends everything to one expert with a probability of 1, and what brings it back."""

import pytest
import torch

from equipoise.layer import MoE, reduce_and_update
from equipoise.routing import BiasBalance, QuantileBalance, SwitchLoss, TopK

D, E = 16, 8


def collapsed(router: TopK, *balance, gap: float = 60.0) -> MoE:
    """Expert 0's logit leads by about `gap` for every token of `batch`."""
    layer = MoE(D, 8, E, router=router, balance=balance)
    torch.nn.init.normal_(layer.router.weight, std=0.3)
    with torch.no_grad():
        layer.router.weight[:, 0] = 0
        layer.router.weight[0, 0] = gap
    return layer


def batch() -> torch.Tensor:
    x = torch.randn(8, 64, D)
    x[..., 0] = 1
    return x


def max_violation(decision) -> float:
    counts = torch.bincount(decision.expert_ids_N, minlength=E)
    return (counts.max() / counts.double().mean() - 1).item()


@pytest.mark.parametrize("k", [1, 2])
def test_the_switch_loss_has_no_gradient_left_on_the_router(k):
    gradients = {}
    for gap in (2.0, 60.0):
        layer, x = collapsed(TopK(k=k, renormalize=False), SwitchLoss(1.0), gap=gap), batch()
        (layer(x) * 0).sum().backward()  # the task is silent: what arrives is the loss
        gradients[gap] = layer.router.weight.grad.abs().max().item()
    assert gradients[2.0] > 1e-2
    assert gradients[60.0] < 1e-9


@pytest.mark.parametrize(
    "router",
    [TopK(k=1), TopK(k=2), TopK(k=2, score="sigmoid"), TopK(k=2, score="sigmoid", bias_on="logits")],
    ids=["softmax-1", "softmax-2", "sigmoid", "sigmoid-on-logits"],
)
def test_quantile_balancing_restores_it_within_five_steps(router, routed_by):
    layer, violations = collapsed(router, QuantileBalance()), []
    for _ in range(6):  # fresh tokens each time
        _, routed = routed_by(layer, batch())
        violations.append(max_violation(routed.decision))
        reduce_and_update([layer])
    assert violations[0] > 2.9  # k = 2: half of the assignments, E / 2 - 1 = 3
    assert violations[5] < 0.5


def test_sign_bias_restores_it_in_about_half_the_gap_over_the_rate(routed_by):
    gap, rate = 4.0, 0.05  # expert 0 sinks by the rate per step, the starved ones rise by about as much
    layer, x = collapsed(TopK(k=1), BiasBalance(rate=rate), gap=gap), batch()
    steps = 0
    while steps < 200 and max_violation(routed_by(layer, x)[1].decision) >= 0.5:
        reduce_and_update([layer])
        steps += 1
    assert 0.5 * gap / (2 * rate) < steps < 3 * gap / (2 * rate)
