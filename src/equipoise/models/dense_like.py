"""The dense model that a sparse one is to be compared with: of equal active FLOPs, or of equal parameters.

Sparse and dense models are only comparable at one of the two; at equal FLOPs a sparse one has more parameters, at equal
parameters it computes less (Switch, arXiv 2101.03961, compares at both). What mixes tokens stays as it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.parameters import parameter_counts, router_parameters
from equipoise.ops.activation import is_gated


def dense_like(config: DecoderConfig, equal: Literal["flops", "parameters"]) -> DecoderConfig:
    """The same decoder with a dense feed-forward part in every layer, all of one width.

    equal: "flops", of one token's forward; "parameters", of the whole model. The width is the nearest whole number, so
    the two differ by at most half a hidden unit in every layer. Raises ValueError for another word, and for a model
    that is dense already.
    """
    if equal not in ("flops", "parameters"):
        raise ValueError(f"equal: expected 'flops' or 'parameters', got {equal!r}. Compare at one of them, or at both.")
    if not config.moe_layer_ids and not config.peer_layer_ids:
        raise ValueError(
            "config: expected a model with MoE or PEER layers, got a dense one. It is its own equal in both senses."
        )
    bare = replace(config, moe=None, moe_layers=None, peer=None, peer_layers=None, hidden_dim=1)
    if equal == "flops":
        per_unit = feed_forward_flops(bare)
        wanted = feed_forward_flops(config)
    else:
        per_unit = parameter_counts(bare).dense
        wanted = parameter_counts(config).total - parameter_counts(bare).total + per_unit
    return replace(bare, hidden_dim=max(1, round(wanted / per_unit)))


def feed_forward_flops(config: DecoderConfig) -> float:
    """FLOPs of one token's forward in training in all feed-forward parts, as torch.utils.flop_counter counts.

    Products alone, 2 per multiply-add. With M = 3 matrices for a gated activation, else 2:

        dense      2 M D hidden_dim per layer
        MoE        2 M D F (experts per token + shared_experts) + 2 D for a shared gate + 2 per weight of the router
        PEER       `Peer.flops`

    Of zero-computation experts a token takes the share that the balancing loss asks for (`ZeroExperts.fair_shares`);
    what it really takes is in the monitor's counts (`computing_per_token`). Of a router whose K varies it is the aim.
    """
    sparse = len(config.moe_layer_ids) + len(config.peer_layer_ids)
    matrices = 3 if is_gated(config.activation) else 2
    flops = 2.0 * matrices * config.dim * config.hidden_dim * (config.num_layers - sparse)
    if config.moe is not None:
        flops += sum(_moe_flops(config, config.moe, number) for number in range(len(config.moe_layer_ids)))
    if config.peer is not None:
        flops += len(config.peer_layer_ids) * config.peer.flops(config.dim)
    return flops


def mixer_flops(config: DecoderConfig) -> int:
    """The same for the Mamba layers, `Mamba.flops` each. Attention depends on the length and is not counted here."""
    return len(config.mamba_layer_ids) * config.mamba.flops(config.dim) if config.mamba else 0


def _moe_flops(config: DecoderConfig, moe: MoEConfig, number: int) -> float:
    router, zero = config.moe_router(number), moe.zero_experts
    computing, extra = float(router.k), 0
    if zero is not None:
        computing *= sum(zero.fair_shares(moe.num_experts)[: moe.num_experts])
        extra = zero.flops(config.dim)
    matrices = 3 if is_gated(config.expert_activation) else 2
    gate = 2 * config.dim if moe.shared_gate else 0
    experts = 2 * matrices * config.dim * moe.hidden_dim * (computing + moe.shared_experts)
    return experts + gate + extra + 2 * router_parameters(router, config.dim, moe.num_choices)
