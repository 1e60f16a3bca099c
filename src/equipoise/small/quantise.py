"""A model's experts in int8 or int4, in place: what else the model has stays as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from equipoise.layer import MoE, moe_layers
from equipoise.ops.packed import Full, Int4, Int8, WeightFormat
from equipoise.small.experts import Resident, StoredExperts, experts_of, packing, sizes_of

NAMES = ("full", "int8", "int4", "int4-32", "int4-64", "int4-128")
_GROUP = 64  # of "int4"


def format_of(name: str, dtype: torch.dtype) -> WeightFormat:
    """What the name means in a model of that type. Raises ValueError for an unknown one."""
    if name == "full":
        return Full(dtype)
    if name == "int8":
        return Int8()
    if name in NAMES:
        return Int4(int(name.partition("-")[2] or _GROUP))
    raise ValueError(f"expert_precision: expected one of {', '.join(NAMES)}, got {name!r}")


def layers_of(model: nn.Module) -> dict[str, MoE]:
    """The MoE layers by name. Raises ValueError for a model without any."""
    found = moe_layers(model)
    if not found:
        raise ValueError(f"experts: {type(model).__name__} has no MoE layer, so there is nothing to make smaller")
    return found


def quantize_experts(
    model: nn.Module, bits: int = 8, group: int = 64, *, products: torch.dtype = torch.bfloat16
) -> Mapping[str, int]:
    """Replace the experts of every MoE layer by quantised ones; returns bytes of experts, {"before": n, "after": n}.

    bits: 8, one scale per output channel; or 4, a scale and a zero per `group` (32, 64 or 128) weights. products: the
    type that they are computed in; float32 is many times slower. All else in the model keeps its type, and routers,
    shared experts, attention and embeddings are not touched.
    The model is for inference from then on: it is put into eval, and no parameter asks for a gradient.
    Raises ValueError, and changes nothing, for sizes or types that the format can't take, weights that are not finite,
    and experts that are quantised already.

    For example: quantize_experts(load("runs/demo").model, bits=4, group=32)
    """
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 8 or 4, got {bits}")
    layers = layers_of(model)
    new: dict[str, StoredExperts] = {}
    before = expert_bytes(model)
    for name, layer in layers.items():
        experts, sizes = experts_of(layer), sizes_of(layer)
        if isinstance(experts, StoredExperts):
            raise ValueError(f"{name}: its experts are kept in {experts.format.name} already; load the model anew")
        try:
            format = Int8(products) if bits == 8 else Int4(group, products)
            source = Resident(sizes, format, packing(format, experts.weights_of))
            new[name] = StoredExperts(sizes, format, source, experts.dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; nothing was changed") from error
    put_in(layers, new)
    model.requires_grad_(False).eval()
    return {"before": before, "after": expert_bytes(model)}


def put_in(layers: Mapping[str, MoE], experts: Mapping[str, StoredExperts]) -> None:
    """Replace the experts of layers, hooks and probes included: attach observers afterwards."""
    for name, layer in layers.items():
        layer.register_module("experts", experts[name].train(layer.training))


def expert_bytes(model: nn.Module) -> int:
    """Bytes of all weights that the experts of a model keep in memory all the time; offloaded ones keep none."""
    total = 0
    for layer in layers_of(model).values():
        experts = experts_of(layer)
        tensors = [*experts.parameters(), *experts.buffers()]
        total += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    return total
