"""What a model's routers consist of: their weights, and all that adapts beside them. Tensors by full name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from equipoise.layer import MoE, ProductKeyExperts
from equipoise.monitor.adapters.transformers_moe import ROUTER_NAMES, experts_layers


@torch.no_grad()
def router_state(model: nn.Module) -> dict[str, Tensor]:
    """Clones of router parameters and of the saved buffers that adapt, of every MoE layer, named as in the state dict.

    In logical-expert coordinates. For equipoise's layers: the router, the balancer's bias and switches, coefficients.
    For transformers': the router's parameters and persistent buffers. Raises ValueError for a model without MoE layers.
    """
    parts: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, MoE | ProductKeyExperts):
            parts += [_join(name, part) for part in ("router.", "balancer.", "coefs.")]
    for name in experts_layers(model):
        block = model.get_submodule(name)
        parts += [
            _join(name, f"{child}.") for child in ROUTER_NAMES if isinstance(getattr(block, child, None), nn.Module)
        ]
    state = {
        name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name.startswith(tuple(parts))
    }
    if not parts or not state:
        raise ValueError(f"router_state: {type(model).__name__} has no MoE layer whose router could be kept")
    return state


def of_layer(state: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """The part of `router_state` that is one layer's, without its dense path."""
    prefix, dense = _join(layer, ""), _join(layer, "dense.")
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix) and not name.startswith(dense)}


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part
