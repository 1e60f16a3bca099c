"""What the differential tests share: layers to compare, what a layer shows of one forward, and the comparison itself.

Everything goes through what a user of the package sees: the layer, its tap, its gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.layer import MoE
from equipoise.routing import TopK
from equipoise.types import Routed

# Largest difference allowed in fp32, relative to the tensor's largest number. Measured over all cases: 9e-7.
TOLERANCE = 2e-6


def assert_same(actual: Tensor, expected: Tensor, name: str = "") -> None:
    """Equal up to fp32 rounding."""
    assert actual.shape == expected.shape, name
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE, f"{name}: {error:.1e}"


def with_router(weight_ED: Tensor, router: TopK, **options) -> MoE:
    """A layer of random experts, with weight_ED (E, D) as its router's weight."""
    num_experts, dim = weight_ED.shape
    layer = MoE(dim, 12, num_experts, router=router, **options)
    layer.init_weights(0.5, 0.5)
    with torch.no_grad():
        layer.router.weight.copy_(weight_ED)
    return layer


def of_logits(num_experts: int, k: int = 1, **options) -> MoE:
    """A layer whose inputs are its logits: D = E, and the identity as the router's weight."""
    return with_router(torch.eye(num_experts), TopK(k=k), **options)


def forward_and_see(layer: MoE, x: Tensor, **options) -> tuple[Tensor, Routed]:
    """(output, what observers saw) of one forward."""
    seen: list[Routed] = []
    handle = layer.tap.register_forward_hook(lambda module, args, routed: seen.append(routed))
    try:
        return layer(x, **options), seen[0]
    finally:
        handle.remove()


def loss_of(layer: MoE, x: Tensor, **options) -> Tensor:
    """The layer's only balancing loss. Its gradient, and nothing else, is added to x and the parameters.

    The loss is attached to the output with its coefficient, so a coefficient of 1 gives its own gradient.
    """
    y, routed = forward_and_see(layer, x, **options)
    y.backward(torch.zeros_like(y))
    (loss,) = routed.losses.values()
    return loss
