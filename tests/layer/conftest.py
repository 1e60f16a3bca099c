"""The MoE layer rebuilt in fp64 from the reference loops, given the layer's weights, and a way to see its decisions.

Both are functions; the fixtures at the end hand them to the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tests.seen import forward_and_see
from torch import Tensor

from equipoise.layer import Capacity, MoE
from equipoise.layer.admission import Capped
from equipoise.ops import reference
from equipoise.ops.activation import activate


@dataclass(frozen=True, eq=False)
class Oracle:
    """The expected result. leaves: "x" and the layer's parameters by name, in fp64, to differentiate by."""

    y_TD: Tensor
    ids_TK: Tensor
    kept_N: Tensor
    leaves: dict[str, Tensor]


def forward_in_fp64(layer: MoE, x_TD: Tensor, seed: int = 0) -> Oracle:
    """What layer(x_TD) should be; seed is what torch was seeded with, for random drops."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    x = leaves["x"] = x_TD.detach().double().requires_grad_()
    config, E = layer.router.config, layer.num_experts
    z = x @ leaves["router.weight"].t()
    bias = torch.zeros(E) if layer.balancer is None else layer.balancer.bias_E
    ids = _select(config, z.detach(), bias.double())
    weights = _weights(config, z, ids)
    tokens = torch.arange(len(x)).repeat_interleave(config.k)
    kept = _kept(layer, ids.reshape(-1), weights.detach().reshape(-1), seed)
    up = leaves["experts.gate_up_proj" if layer.experts.activation == "swiglu" else "experts.up_proj"]
    y = reference.experts(
        x,
        tokens[kept],
        ids.reshape(-1)[kept],
        weights.reshape(-1)[kept],
        up,
        leaves["experts.down_proj"],
        layer.experts.activation,
    )
    return Oracle(y + _shared(layer, leaves, x), ids, kept, leaves)


def _scores(score: str, z: Tensor) -> Tensor:
    if score == "softmax":
        return z.exp() / z.exp().sum(-1, keepdim=True)
    return 1 / (1 + (-z).exp()) if score == "sigmoid" else (1 + z.exp()).log().sqrt()


def _select(config, z: Tensor, bias: Tensor) -> Tensor:
    selection = (z if config.bias_is_on_logits else _scores(config.score, z)) + bias
    best = selection.sort(dim=1, descending=True).values
    # A tie decided by rounding would compare two right answers: the inputs must not have one.
    assert len(z) < 2 or z.shape[1] < 2 or (best[:, :-1] - best[:, 1:]).min() > 1e-6
    return reference.select(selection, config.k, config.num_groups, config.top_groups, config.group_score)


def _weights(config, z: Tensor, ids: Tensor) -> Tensor:
    z = z / config.temperature
    if config.order == "post":
        return config.scale * _scores("softmax", z.gather(1, ids))
    weights = _scores(config.score, z).gather(1, ids)
    if config.traits.weights_sum_to is not None:
        weights = weights / weights.sum(1, keepdim=True)
    return config.scale * weights


def _kept(layer: MoE, ids_N: Tensor, weights_N: Tensor, seed: int) -> Tensor:
    N, admission = len(ids_N), layer.admission
    if not isinstance(admission, Capped) or not (layer.training or admission.capacity.at_inference):
        return torch.ones(N, dtype=torch.bool)
    return reference.keep(ids_N, priorities(admission.capacity, weights_N, seed), limit_of(layer, N))


def priorities(capacity: Capacity, weights_N: Tensor, seed: int) -> Tensor:
    """(N,): the higher, the longer it stays."""
    N = len(weights_N)
    if capacity.policy == "probability":
        return weights_N
    if capacity.policy == "position":
        return -torch.arange(N)
    place = torch.empty(N, dtype=torch.int64)
    place[torch.randperm(N, generator=torch.Generator().manual_seed(seed))] = torch.arange(N)
    return -place


def limit_of(layer: MoE, num_assignments: int) -> int:
    k = layer.router.config.k
    return reference.capacity(num_assignments // k, k, layer.num_experts, layer.admission.capacity.factor)


def _shared(layer: MoE, leaves: dict[str, Tensor], x: Tensor) -> Tensor:
    if layer.shared is None:
        return torch.zeros_like(x)
    kind = layer.experts.activation
    up = leaves["shared.gate_up_proj.weight" if kind == "swiglu" else "shared.up_proj.weight"]
    y = activate(x @ up.t(), kind) @ leaves["shared.down_proj.weight"].t()
    return y if layer.shared_gate is None else y / (1 + (-x @ leaves["shared_gate.weight"].t()).exp())


@pytest.fixture(name="routed_by")
def _routed_by():
    return forward_and_see


@pytest.fixture(name="reference_moe")
def _reference_moe():
    return forward_in_fp64
