"""One pre-norm block of the decoder, attention and a feed-forward part, and what all blocks of a forward share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equipoise.layer import FeedForward, MoE, ProductKeyExperts
from equipoise.models.attention_experts.build import AttentionExperts, build_attention
from equipoise.models.cache import KVCache
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.mamba import KeepsManyStates, KeepsStates, MambaMixer
from equipoise.models.rope import Rotary
from equipoise.types import BatchScope


@dataclass(frozen=True, eq=False)
class BatchView:
    """What every block of one forward shares: the new tokens, where they stand and what they may see.

    positions_BS: int64 (B or 1, S), of the new tokens. rotary: their tables; None with learned positions.
    mask: what they may see; None where causal attention or the cache says it all.
    padding_BS: True = padding, among the new tokens. cache: holds the keys and values of earlier tokens.
    scope: what the balancing losses of attention experts may know.
    """

    tokens_BS: Tensor
    positions_BS: Tensor
    rotary: Rotary | None
    mask: Tensor | None
    padding_BS: Tensor | None
    cache: KVCache | None
    scope: BatchScope | None = None


class Block(nn.Module):
    """One pre-norm block: x + mixer(norm(x)), then x + mlp(norm(x)), where mlp is an MoE, PEER or a FeedForward.

    The mixer is `self_attn`, or `mamba` in a Mamba layer, which has no attention.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        moe = config.moe if layer in config.moe_layer_ids else None
        self.input_layernorm = norm_of(config)
        mamba = config.mamba if layer in config.mamba_layer_ids else None
        self.mamba = None if mamba is None else MambaMixer(config.dim, mamba, layer)
        if self.mamba is None:
            self.self_attn = build_attention(config, layer)
        self.post_attention_layernorm = norm_of(config)
        self.mlp = _feed_forward(config, layer)
        self.checkpoint_experts = moe is not None and moe.checkpoint_experts

    @property
    def has_moe(self) -> bool:
        """Whether its feed-forward part is an MoE."""
        return isinstance(self.mlp, MoE)

    def forward(self, x_BSD: Tensor, view: BatchView, scope: BatchScope | None) -> Tensor:
        """Add what attention and the feed-forward part make of x; scope goes to the MoE."""
        x_BSD = x_BSD + self.mix(self.input_layernorm(x_BSD), view)
        out_BSD: Tensor = x_BSD + self._feed_forward(self.post_attention_layernorm(x_BSD), view, scope)
        return out_BSD

    def mix(self, x_BSD: Tensor, view: BatchView) -> Tensor:
        """What the block's attention, or its Mamba layer, makes of the normed stream."""
        if self.mamba is None:
            return self._attend(x_BSD, view)
        cache: object = view.cache
        if isinstance(cache, KeepsManyStates):
            mamba = self.mamba
            return cache.mix(mamba.layer, lambda x_BSD, states: mamba(x_BSD, None, states), x_BSD)
        if view.cache is not None and not isinstance(view.cache, KeepsStates):
            raise ValueError(
                f"cache: expected one that keeps the states of Mamba layers, got {type(view.cache).__name__}, which "
                "keeps keys and values only. Use ContiguousCache, or `generate`."
            )
        mixed_BSD: Tensor = self.mamba(x_BSD, view.padding_BS, view.cache)
        return mixed_BSD

    def _attend(self, x_BSD: Tensor, view: BatchView) -> Tensor:
        run: Callable[..., Tensor] = self.self_attn
        if isinstance(self.self_attn, AttentionExperts):
            run = partial(self.self_attn, padding_BS=view.padding_BS, scope=view.scope)
        return run(x_BSD, view.rotary, view.mask, view.cache)

    def _feed_forward(self, x_BSD: Tensor, view: BatchView, scope: BatchScope | None) -> Tensor:
        run: Callable[[Tensor], Tensor] = self.mlp
        if isinstance(self.mlp, MoE | ProductKeyExperts):
            run = partial(self.mlp, token_ids=view.tokens_BS, padding_mask=view.padding_BS, scope=scope)
        recompute = self.checkpoint_experts and self.training and torch.is_grad_enabled()
        return checkpoint(run, x_BSD, use_reentrant=False) if recompute else run(x_BSD)

    def init_weights(self, std: float, output_std: float) -> None:
        """Draw the weights afresh; output_std is for the two projections that end in the residual stream."""
        self.input_layernorm.reset_parameters()
        self.post_attention_layernorm.reset_parameters()
        (self.self_attn if self.mamba is None else self.mamba).init_weights(std, output_std)
        self.mlp.init_weights(std, output_std)


def norm_of(config: DecoderConfig) -> nn.RMSNorm | nn.LayerNorm:
    """The norm of the model's style."""
    make = nn.LayerNorm if config.style == "gpt2" else nn.RMSNorm
    return make(config.dim, eps=config.norm_eps)


def _feed_forward(config: DecoderConfig, layer: int) -> MoE | ProductKeyExperts | FeedForward:
    if config.peer is not None and layer in config.peer_layer_ids:
        return ProductKeyExperts(config.dim, config.peer)
    if config.moe is not None and layer in config.moe_layer_ids:
        return _moe(config, config.moe, config.moe_layer_ids.index(layer))
    return FeedForward(config.dim, config.hidden_dim, config.activation)


def _moe(config: DecoderConfig, moe: MoEConfig, number: int) -> MoE:
    """MoE layer `number`, counted among the MoE layers."""
    return MoE(
        config.dim,
        moe.hidden_dim,
        moe.num_experts,
        router=config.moe_router(number),
        balance=() if number < moe.first_layers else moe.balance,
        capacity=moe.capacity,
        shared_experts=moe.shared_experts,
        shared_gate=moe.shared_gate,
        activation=config.expert_activation,
        expert_bias=moe.expert_bias,
        backend=moe.backend,
        zero_experts=moe.zero_experts,
    )
