"""Which part of a decoder each weight belongs to: routers, routed experts, shared experts, attention, the rest."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from equipoise.models.decoder import Decoder
from equipoise.train.finetune.config import Group


def groups_of(model: Decoder) -> Mapping[str, Group]:
    """The group of each parameter, by its name, in the model's order. A gate of shared experts goes with them."""
    layers = tuple(model.moe_layers)
    return {name: _group(name, layers) for name, _ in model.named_parameters()}


def _group(name: str, layers: tuple[str, ...]) -> Group:
    layer = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
    if layer is not None:
        part = name[len(layer) + 1 :].split(".")[0]
        return "router" if part == "router" else "experts" if part == "experts" else "shared"
    return "attention" if ".self_attn." in name else "rest"


def trained_alone(model: nn.Module, names: frozenset[str]) -> None:
    """Let these parameters have gradients, and no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
