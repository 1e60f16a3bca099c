"""Matrix-product FLOPs of one forward of a decoder, by arithmetic alone: what is computed for a token, layer by layer.

A multiplication and an addition are two. Norms, softmax, rotations and gathers are left out, as
`torch.utils.flop_counter` does. Products of queries and keys are counted over the whole square, as its formulas do and
the math kernel computes; a causal kernel may do half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from equipoise.models.attention_experts.configs import MixtureOfAttention, SwitchHead
from equipoise.models.config import DecoderConfig
from equipoise.ops.activation import is_gated
from equipoise.routing.router import RouterConfig


@dataclass(frozen=True)
class LayerFlops:
    """Of one block, routers included. mixer: attention, or what stands in its place."""

    mixer: int
    feed_forward: float


@dataclass(frozen=True)
class ActiveFlops:
    """Of one forward over one sequence. head: the product with the vocabulary."""

    layers: tuple[LayerFlops, ...]
    head: int

    @property
    def total(self) -> float:
        """All of it; whole but for zero-computation experts."""
        return self.head + sum(layer.mixer + layer.feed_forward for layer in self.layers)


def active_flops(config: DecoderConfig, seq_len: int) -> ActiveFlops:
    """FLOPs of a forward without cache over one sequence of seq_len tokens, dropless.

    Raises ValueError below one token.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len: expected at least 1, got {seq_len}. Pass the tokens of one sequence.")
    layers = tuple(
        LayerFlops(_mixer(config, seq_len, n), seq_len * feed_forward_flops(config, n))
        for n in range(config.num_layers)
    )
    return ActiveFlops(layers, 2 * seq_len * config.dim * config.vocab_size)


def _mixer(config: DecoderConfig, seq_len: int, layer: int) -> int:
    if config.mamba is not None and layer in config.mamba_layer_ids:
        return seq_len * config.mamba.flops(config.dim)
    return attention_flops(config, seq_len)


def attention_flops(config: DecoderConfig, seq_len: int) -> int:
    """Of one layer: 2 S (weights used per token) + 2 S S (widths of the query and value heads).

    MoA: D E + 2 K D G d + 2 D G d. SwitchHead: 2 H E D + 2 D H d + 2 H K D d. MoH: plain + D (R + S + 2), all its heads
    being computed.
    """
    S, D, H, d, kind = seq_len, config.dim, config.num_heads, config.head_size, config.attention_moe
    if config.latent is not None:
        return _latent(config, S)
    keys = S + bool(config.sinks)
    core = 4 * S * keys * H * d
    plain = 2 * D * (H + config.kv_heads) * d
    if kind is None:
        return 2 * S * plain + core
    if isinstance(kind, MixtureOfAttention):
        width = config.kv_heads * d
        weights = _router(kind.router, D, kind.num_experts) + 2 * D * width * (kind.router.k + 1)
    elif isinstance(kind, SwitchHead):
        weights = 2 * H * kind.num_experts * D + 2 * D * H * d * (1 + kind.k)
    else:
        weights = plain + _router(kind.router, D, kind.num_routed(config))
        weights += (kind.shared_heads + 2) * D if kind.shared_heads else 0
    return 2 * S * weights + core


def _latent(config: DecoderConfig, S: int) -> int:
    latent, D, h = config.latent, config.dim, config.num_heads
    assert latent is not None
    q_width = latent.nope_dim + latent.rope_dim
    weights = D * h * q_width if latent.q_rank is None else latent.q_rank * (D + h * q_width)
    weights += D * (latent.kv_rank + latent.rope_dim) + latent.kv_rank * h * (latent.nope_dim + latent.value_dim)
    return 2 * S * (weights + h * latent.value_dim * D) + 2 * S * S * h * (q_width + latent.value_dim)


def feed_forward_flops(config: DecoderConfig, layer: int) -> float:
    """FLOPs of one token in one layer, in training. With M = 3 matrices for a gated activation, else 2:

        dense      2 M D hidden_dim
        MoE        2 M D F (experts per token + shared_experts) + 2 D for a shared gate + 2 per weight of the router
        PEER       `Peer.flops`

    Of zero-computation experts a token takes the share that the balancing loss asks for (`ZeroExperts.fair_shares`);
    what it really takes is in the monitor's counts (`computing_per_token`). Of a router whose K varies it is the aim.
    """
    D, moe = config.dim, config.moe
    if config.peer is not None and layer in config.peer_layer_ids:
        return config.peer.flops(D)
    if moe is None or layer not in config.moe_layer_ids:
        return 2.0 * (3 if is_gated(config.activation) else 2) * D * config.hidden_dim
    router, zero = config.moe_router(config.moe_layer_ids.index(layer)), moe.zero_experts
    computing, extra = float(router.k), 0
    if zero is not None:
        computing *= float(sum(zero.fair_shares(moe.num_experts)[: moe.num_experts]))
        extra = zero.flops(D)
    expert = (3 if is_gated(config.expert_activation) else 2) * D * moe.hidden_dim
    gate = D if moe.shared_gate else 0
    weights = (computing + moe.shared_experts) * expert + gate + _router(router, D, moe.num_choices)
    return 2 * weights + extra


def _router(router: RouterConfig, dim: int, num_experts: int) -> int:
    """Weights that a token is multiplied with."""
    with torch.device("meta"):  # shapes only
        return sum(each.numel() for each in router.build(dim, num_experts).parameters() if each.dim() == 2)
