"""Causal self-attention with grouped key/value heads, rotary positions, optional norms, biases, window and sinks.

Rotary tables are made once per forward (rope.py) and handed to every layer. The product itself is in attend.py; caches
are known only by their protocol. Attention over a latent is in latent_attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equipoise.models.attend import Sight, attend
from equipoise.models.cache import KVCache
from equipoise.models.config import DecoderConfig
from equipoise.models.rope import Rotary, rotate
from equipoise.ops.few_linear import projections


class Attention(nn.Module):
    """Multi-head attention of one layer; several query heads share a key/value head when kv_heads < num_heads.

    forward(x_BSD, rotary, mask, cache) -> (B, S, D). rotary: tables of `rotary_tables`, or None for models with
    learned positions. mask: as `attention_mask` or the cache makes it. cache: keeps the new keys and values, and
    attends to all that each token may see.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_size
        q_dim, kv_dim = config.num_heads * config.head_size, config.kv_heads * config.head_size
        biased = config.attention_bias != "none"
        self.q_proj = nn.Linear(config.dim, q_dim, bias=biased)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=biased)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=biased)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=config.attention_bias == "qkvo")
        self.norm_whole = config.qk_norm == "whole"
        q_width, k_width = (q_dim, kv_dim) if self.norm_whole else (self.head_dim, self.head_dim)
        self.q_norm = nn.RMSNorm(q_width, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(k_width, eps=config.norm_eps) if config.qk_norm else None
        self.window = config.window_of(layer)
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if config.sinks else None

    def forward(
        self, x_BSD: Tensor, rotary: Rotary | None, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Attend from the S tokens of x to themselves and to what the cache holds."""
        return projections(self.heads(x_BSD, rotary, mask, cache), [self.o_proj])[0]

    def heads(
        self, x_BSD: Tensor, rotary: Rotary | None, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """(B, S, heads * head_dim): what each head brings, before the output projection."""
        q, k, v = projections(x_BSD, [self.q_proj, self.k_proj, self.v_proj])
        if self.norm_whole:
            q, k = normed(q, self.q_norm), normed(k, self.k_norm)
        q, k, v = (self._by_head(each) for each in (q, k, v))
        if not self.norm_whole:
            q, k = normed(q, self.q_norm), normed(k, self.k_norm)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)
        sight = Sight(self.window, self.sinks)
        y = attend(q, k, v, mask, sight) if cache is None else cache.attend(self.layer, q, k, v, mask, sight)
        return y.transpose(1, 2).flatten(2)

    def _by_head(self, x_BSX: Tensor) -> Tensor:
        B, S, X = x_BSX.shape
        return x_BSX.view(B, S, X // self.head_dim, self.head_dim).transpose(1, 2)

    def init_weights(self, std: float, output_std: float) -> None:
        """Draw the projections from normal(0, std), the output projection from normal(0, output_std)."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(projection.weight, std=output_std if projection is self.o_proj else std)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()


def normed(x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """The norm runs in its weight's dtype: autocast leaves x lower."""
    if norm is None:
        return x
    y: Tensor = norm(x.to(norm.weight.dtype))
    return y
