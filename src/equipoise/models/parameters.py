"""How many parameters a decoder has, by part, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from equipoise.models.config import DecoderConfig
from equipoise.ops.activation import is_gated, pre_activation_dim
from equipoise.routing.router import RouterConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part; the parts add up to `total`.

    active: those that one token uses, its row of the embedding counted as the whole table; subtract `embedding` for
    the other convention. With zero-computation experts it is the most that a token uses.
    experts: routed experts, all of them. head: 0 when tied to the embedding.
    """

    total: int
    active: int
    embedding: int
    attention: int
    mamba: int
    dense: int
    experts: int
    shared: int
    router: int
    zero: int
    peer: int
    norm: int
    head: int


def parameter_counts(config: DecoderConfig) -> ParameterCounts:
    """Count the parameters of a decoder by arithmetic alone.

    With V vocabulary, D dim, L layers, h and kv heads of width d, E experts of which a token uses k:

        embedding  V D (+ max_seq_len D for learned positions)
        attention  2 D h d + 2 D kv d (+ 2 d for qk_norm), or what `_attention` says for other kinds, per layer with it
        mamba      `Mamba.parameters` per Mamba layer
        ffn(F)     3 D F for SwiGLU, 2 D F for GELU
        dense      ffn(hidden_dim) per layer without an MoE or PEER
        experts    E ffn(moe.hidden_dim) (+ biases) per MoE layer; active: k instead of E
        shared     ffn(shared_experts moe.hidden_dim) (+ D with a gate) per MoE layer
        zero       3 D per constant among the zero-computation experts, per MoE layer
        peer       `Peer.parameters` per PEER layer; active: `Peer.active_parameters`
        router     E D per MoE layer for a linear router; others say themselves
        norm       (2 L + 1) D, twice that for LayerNorm, which has a bias
        head       0 if tied, else V D
    """
    D, L = config.dim, config.num_layers
    num_moe, num_peer = len(config.moe_layer_ids), len(config.peer_layer_ids)
    matrices = 3 if is_gated(config.activation) else 2
    experts = shared = router = zero = active_experts = 0
    if config.moe is not None:
        F = config.moe.hidden_dim
        per_shared = (3 if is_gated(config.expert_activation) else 2) * D * F
        biases = pre_activation_dim(F, config.expert_activation) + D if config.moe.expert_bias else 0
        per_expert = per_shared + biases
        experts = num_moe * config.moe.num_experts * per_expert
        routers = [config.moe_router(number) for number in range(num_moe)]
        active_experts = sum(each.k for each in routers) * per_expert
        shared = num_moe * (config.moe.shared_experts * per_shared + (D if config.moe.shared_gate else 0))
        zero_experts = config.moe.zero_experts
        router = sum(router_parameters(each, D, config.moe.num_choices) for each in routers)
        zero = num_moe * zero_experts.parameters(D) if zero_experts else 0
    parts = {
        "embedding": (config.vocab_size + (config.max_seq_len if config.style == "gpt2" else 0)) * D,
        "attention": (L - len(config.mamba_layer_ids)) * _attention(config),
        "mamba": len(config.mamba_layer_ids) * config.mamba.parameters(D) if config.mamba else 0,
        "dense": (L - num_moe - num_peer) * matrices * D * config.hidden_dim,
        "experts": experts,
        "shared": shared,
        "router": router,
        "zero": zero,
        "peer": num_peer * config.peer.parameters(D) if config.peer else 0,
        "norm": (2 * L + 1) * D * (2 if config.style == "gpt2" else 1),
        "head": 0 if config.tie_embeddings else config.vocab_size * D,
    }
    total = sum(parts.values())
    idle = experts - active_experts
    if config.peer is not None:
        idle += num_peer * (config.peer.parameters(D) - config.peer.active_parameters(D))
    return ParameterCounts(total=total, active=total - idle, **parts)


def _attention(config: DecoderConfig) -> int:
    """Of one layer."""
    D, h, latent = config.dim, config.num_heads, config.latent
    biased = config.attention_bias != "none"
    if latent is not None:
        q_dim, kv = h * (latent.nope_dim + latent.rope_dim), latent.kv_rank
        to_q = D * q_dim if latent.q_rank is None else latent.q_rank * (D + 1 + q_dim + biased)
        to_latent = D * (kv + latent.rope_dim) + kv + biased * (kv + latent.rope_dim)
        to_heads = kv * h * (latent.nope_dim + latent.value_dim)
        return to_q + to_latent + to_heads + h * latent.value_dim * D + biased * D
    q_dim, kv_dim = h * config.head_size, config.kv_heads * config.head_size
    norms = {False: 0, True: 2 * config.head_size, "whole": q_dim + kv_dim}[config.qk_norm]
    biases = (q_dim + 2 * kv_dim) * biased + D * (config.attention_bias == "qkvo")
    return 2 * D * (q_dim + kv_dim) + norms + biases + (h if config.sinks else 0)


def router_parameters(router: RouterConfig, dim: int, num_experts: int) -> int:
    """Of one router over so many experts."""
    with torch.device("meta"):  # shapes only
        return sum(parameter.numel() for parameter in router.build(dim, num_experts).parameters())
