"""Every router x overflow x backend: output and all gradients equal an fp64 loop with the weights' formulas.

Who is chosen is the layer's own decision (test_moe_oracle selects again, for top-k). What it is weighted with, who is
kept, moved or spilled, and what the experts make of it is recomputed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.routing.cases import CASES, Case, D, E
from torch import Tensor

from equipoise.layer import Capacity, MoE
from equipoise.ops import reference
from equipoise.ops.activation import activate
from equipoise.routing import (
    ROUTERS,
    ExpertChoice,
    Hash,
    NoisyTopK,
    ReLURouting,
    RoundRobin,
    Sinkhorn,
    Switch,
    Threshold,
    TopK,
    TwoTier,
)
from equipoise.types import RoutingDecision

T, SEED = 10, 7
CAPACITIES = {
    "dropless": None,
    "drop": Capacity(0.5),
    "shared": Capacity(0.5, "probability", overflow="shared"),
    "next_choice": Capacity(0.75, overflow="next_choice"),
}
TOLERANCE = 1e-5  # fp32 against fp64, relative to the largest number of a tensor. Measured: 1.5e-6
Leaves = dict[str, Tensor]


# ------------------------------------------------------------- values (T, E) of which weights are made; are they summed


def top_k(config: TopK, z: Tensor, leaves: Leaves) -> tuple[Tensor, bool]:
    z = z / config.temperature
    scores = {"softmax": softmax(z), "sigmoid": sigmoid(z), "sqrtsoftplus": (1 + z.exp()).log().sqrt()}[config.score]
    return config.scale * scores, config.order == "post" or config.renormalizes


def noisy_top_k(config: NoisyTopK, z: Tensor, leaves: Leaves) -> tuple[Tensor, bool]:
    std = (1 + (leaves["x"] @ leaves["router.noise_weight"].t()).exp()).log() + 0.01
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(SEED))
    return softmax(z + noise.double() * std), True


def hashed(config: Hash, z: Tensor | None, leaves: Leaves) -> tuple[Tensor, bool]:
    if z is None:
        return torch.full((T, E), config.scale / config.k, dtype=torch.float64), False
    return sigmoid(z), True


def two_tier(config: TwoTier, z: Tensor, leaves: Leaves) -> tuple[Tensor, bool]:
    within = softmax(z.view(T, config.num_groups, -1))
    if config.first == "hash":
        return within.flatten(1), config.k > 1
    groups = softmax(leaves["x"] @ leaves["router.group_weight"].t())
    return (groups[:, :, None] * within).flatten(1), False


VALUES: dict[type[Any], Callable[[Any, Any, Leaves], tuple[Tensor, bool]]] = {
    TopK: top_k,
    Switch: lambda config, z, leaves: (softmax(z), False),
    NoisyTopK: noisy_top_k,
    ExpertChoice: lambda config, z, leaves: (softmax(z), False),
    Threshold: lambda config, z, leaves: (sigmoid(z), False),
    Sinkhorn: lambda config, z, leaves: (sigmoid(z) if config.k == 1 else softmax(z), False),
    Hash: hashed,
    TwoTier: two_tier,
    RoundRobin: lambda config, z, leaves: (softmax(z), config.k > 1),
    ReLURouting: lambda config, z, leaves: (z.clamp_min(0), False),
}


def softmax(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum(-1, keepdim=True)


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + (-z).exp())


def weights_of(case: Case, leaves: Leaves, tokens: Tensor, experts: Tensor) -> Tensor:
    """(N,) fp64: the weight of each assignment, by the formula."""
    z = leaves["x"] @ leaves["router.weight"].t() if "router.weight" in leaves else None
    if (jitter := getattr(case.config, "jitter", 0.0)) > 0:
        generator = torch.Generator().manual_seed(SEED)
        factor = torch.empty(T, D).uniform_(1 - jitter, 1 + jitter, generator=generator)
        z = (leaves["x"] * factor) @ leaves["router.weight"].t()
    values, summed = VALUES[type(case.config)](case.config, z, leaves)
    weights = values[tokens, experts]
    if not summed:
        return weights
    sums = torch.zeros(T, dtype=torch.float64).index_add(0, tokens, weights)
    return getattr(case.config, "scale", 1.0) * weights / sums[tokens]


# ------------------------------------------------------------------------------------------------ the rest of the layer


def fitted(decision: RoutingDecision, capacity: Capacity | None) -> tuple[Tensor, Tensor]:
    """(experts_N, kept_N): where each assignment ends up."""
    experts = decision.expert_ids_N
    if capacity is None:
        return experts, torch.ones_like(experts, dtype=torch.bool)
    N = len(experts)
    priority = decision.weights_N.detach() if capacity.policy == "probability" else -torch.arange(N)
    limit = reference.capacity(N, 1, E, capacity.factor)
    kept = reference.keep(experts, priority, limit)
    if capacity.overflow != "next_choice":
        return experts, kept
    shape = (T, decision.top_k)
    ranking = decision.preferences.ranking_TE
    moved, kept = reference.next_choice(
        ranking, experts.view(shape), kept.view(shape), torch.arange(N).view(shape), limit
    )
    return moved.reshape(-1), kept.reshape(-1)


def oracle(case: Case, layer: MoE, x: Tensor, decision: RoutingDecision, capacity: Capacity | None):
    """(y_TD, leaves): the expected output, and "x" and the parameters by name to differentiate by, all fp64."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    leaves["x"] = x.detach().double().requires_grad_()
    tokens, (experts, kept) = decision.token_ids_N, fitted(decision, capacity)
    weights = weights_of(case, leaves, tokens, experts)
    y = reference.experts(
        leaves["x"],
        tokens[kept],
        experts[kept],
        weights[kept],
        leaves["experts.gate_up_proj"],
        leaves["experts.down_proj"],
    )
    spilled = torch.zeros(T, dtype=torch.float64)
    if capacity is not None and capacity.overflow == "shared":
        spilled = spilled.index_add(0, tokens[~kept], weights[~kept])
    up, down = leaves["shared.gate_up_proj.weight"], leaves["shared.down_proj.weight"]
    return y + (1 + spilled)[:, None] * (activate(leaves["x"] @ up.t(), "swiglu") @ down.t()), leaves


def test_every_router_has_its_formula():
    assert set(VALUES) == set(ROUTERS)


@pytest.mark.parametrize("backend", ["lean", "grouped", "reference"])
@pytest.mark.parametrize(
    ("case", "overflow"),
    [(case, name) for case in CASES for name in CAPACITIES if name != "next_choice" or case.traits.ranks],
    ids=lambda value: getattr(value, "name", value),
)
def test_output_and_gradients_equal_the_reference_loop(case, overflow, backend, routed_by):
    capacity = CAPACITIES[overflow]
    layer = case.layer(capacity=capacity, shared_experts=1, backend=backend)
    layer.losses = ()  # the task's gradient alone; a needed loss has its own tests
    x, ids, cotangent = torch.randn(T, D, requires_grad=True), torch.randint(64, (T,)), torch.randn(T, D)

    torch.manual_seed(SEED)
    y, routed = routed_by(layer, x, token_ids=ids)
    y.backward(cotangent)
    expected, leaves = oracle(case, layer, x, routed.decision, capacity)
    expected.backward(cotangent.double())

    overflowed = any(routed.plan.drops.values())
    assert overflowed == (capacity is not None) or isinstance(case.config, RoundRobin)
    errors = {"y": relative_error(y.detach(), expected.detach())}
    for name, leaf in {**dict(layer.named_parameters()), "x": x}.items():
        assert leaf.grad is not None, name
        errors[name] = relative_error(leaf.grad, leaves[name].grad)
    assert max(errors.values()) <= TOLERANCE, errors


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()
