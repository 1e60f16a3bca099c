"""Every router x dispatcher x backend x activation x dtype: output and all gradients equal the fp64 reference loop."""

import pytest
import torch

from equipoise.layer import Capacity, MoE
from equipoise.routing import BiasBalance, Switch, TopK

ROUTERS = {
    "top2": TopK(k=2),
    "top2-raw": TopK(k=2, renormalize=False),
    "top2-bias-on-scores": TopK(k=2, bias_on="scores"),
    "top2-sigmoid-bias-on-logits": TopK(k=2, score="sigmoid", bias_on="logits"),
    "top2-post": TopK(k=2, order="post", temperature=0.7),
    "top1-raw": TopK(k=1),
    "switch": Switch(jitter=0.0),
    "all-experts": TopK(k=4),
    "v3-groups": TopK(k=2, score="sigmoid", scale=2.5, num_groups=2, top_groups=1),
    "v2-groups": TopK(k=2, num_groups=2, top_groups=1, group_score="max", renormalize=False),
    "sqrtsoftplus": TopK(k=3, score="sqrtsoftplus", temperature=2.0),
}
BIASED = {
    "top2-raw",
    "top2-bias-on-scores",
    "top2-sigmoid-bias-on-logits",
    "v3-groups",
    "sqrtsoftplus",
}  # routers tested under a balancer's bias
CAPACITIES = {
    "dropless": None,
    "position": Capacity(1.0),
    "probability": Capacity(0.6, "probability"),
    "random": Capacity(0.75, "random"),
}
# Largest error allowed, relative to the largest number of the tensor. Measured over all cases: 1.5e-15, 7e-7, 1.4e-2.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
BACKENDS = [
    (backend, dtype)
    for backend in ("lean", "grouped", "reference")
    for dtype in TOLERANCE
    if (backend, dtype) != ("grouped", torch.float64)  # has no kernel, and says so
]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()


def build(router: str, capacity: Capacity | None, backend: str, activation: str, dtype: torch.dtype) -> MoE:
    layer = MoE(
        8,
        8,
        4,
        router=ROUTERS[router],
        balance=(BiasBalance(),) if router in BIASED else (),
        capacity=capacity,
        shared_experts=1,
        shared_gate=True,
        activation=activation,
        backend=backend,
    )
    layer.init_weights(0.5, 0.5)
    torch.nn.init.normal_(layer.router.weight, std=0.5)
    if layer.balancer is not None:
        layer.balancer.bias_E.copy_(torch.tensor([-0.1, 0.2, 0.0, -0.1]))
    return layer.to(dtype)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_output_and_gradients_equal_the_reference_loop(
    router, capacity, activation, backend, dtype, routed_by, reference_moe
):
    layer = build(router, CAPACITIES[capacity], backend, activation, dtype)
    x = torch.randn(10, 8).to(dtype).requires_grad_()
    cotangent = torch.randn(10, 8).to(dtype)

    torch.manual_seed(7)
    y, routed = routed_by(layer, x)
    y.backward(cotangent)
    expected = reference_moe(layer, x, seed=7)
    expected.y_TD.backward(cotangent.double())

    assert y.dtype == dtype
    assert torch.equal(routed.decision.expert_ids_N, expected.ids_TK.reshape(-1))
    assert routed.plan.counts_e.sum() == expected.kept_N.sum()
    errors = {"y": relative_error(y.detach(), expected.y_TD.detach())}
    for name, leaf in {**dict(layer.named_parameters()), "x": x}.items():
        assert leaf.grad is not None, name
        errors[name] = relative_error(leaf.grad, expected.leaves[name].grad)
    assert max(errors.values()) <= TOLERANCE[dtype], errors
