"""What of a configuration a forward pass depends on, in one spelling: models with the same compute the same."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from equipoise.models.config import DecoderConfig
from equipoise.routing import TopK


def essence(config: DecoderConfig) -> dict[str, Any]:
    """What a forward pass depends on, in one spelling; not how the model is trained or computed."""
    found: dict[str, Any] = {each.name: getattr(config, each.name) for each in fields(config)}
    found |= {"num_kv_heads": config.kv_heads, "head_dim": config.head_size, "moe_layers": config.moe_layer_ids}
    if config.window is not None:
        layers = range(config.num_layers)
        found["window_layers"] = tuple(layer for layer in layers if config.window_of(layer) is not None)
    if len(config.moe_layer_ids) == config.num_layers:
        found["hidden_dim"] = None  # of dense layers, of which there are none
    if config.moe is not None:
        moe = replace(config.moe, balance=(), capacity=None, backend="auto", checkpoint_experts=False)
        found |= {f"moe.{each.name}": getattr(moe, each.name) for each in fields(moe) if each.name != "router"}
        found["moe.activation"] = config.expert_activation
        router = config.moe.router
        if isinstance(router, TopK):
            found |= {f"router.{name}": value for name, value in _essence(router).items()}
        else:
            found["router"] = router
    del found["moe"], found["init_std"]
    return found


def _essence(router: TopK) -> dict[str, Any]:
    grouped = router.top_groups < router.num_groups
    return {
        "k": router.k,
        "score": router.score,
        "renormalized": router.order == "post" or router.renormalizes,
        "scale": router.scale,
        "temperature": router.temperature if router.eval_temperature is None else router.eval_temperature,
        "groups": (router.num_groups, router.top_groups, router.group_score) if grouped else None,
        "linear_bias": router.linear_bias,
    }
