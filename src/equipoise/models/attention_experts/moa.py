"""Mixture of attention heads (MoA, arXiv 2210.05144 section 3): experts of queries and outputs, shared keys and values.

y_t = sum over a token's experts e of w_te softmax(q_te K^T / sqrt(d)) V W_o^e, q_te = x_t W_q^e. It doesn't make the
products of queries and keys fewer than those of K heads. With several key/value heads an expert is as many heads
(yikangshen's ModuleFormer).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equipoise.layer.choice import Choice
from equipoise.layer.tokens import tokens_of
from equipoise.models.attend import Sight, attend
from equipoise.models.attention import normed
from equipoise.models.attention_experts.configs import MixtureOfAttention
from equipoise.models.cache import KVCache
from equipoise.models.config import DecoderConfig
from equipoise.models.rope import Rotary, rotate
from equipoise.ops.grouped_linear import Grouping, grouped_linear
from equipoise.ops.ragged import sum_rows
from equipoise.types import BatchScope


class MixtureOfAttentionLayer(nn.Module):
    """MoA of one layer. heads: chooses the experts, and is what is watched. forward as `Attention`'s.

    q_experts: (E, G d, D) with G key/value heads of width d. o_experts: (E, D, G d).
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        moa = config.attention_moe
        assert isinstance(moa, MixtureOfAttention)
        self.layer, self.kv_heads, self.head_dim = layer, config.kv_heads, config.head_size
        width = config.kv_heads * config.head_size
        self.heads = Choice(moa.router, config.dim, moa.num_experts, moa.balance)
        self.q_experts = nn.Parameter(torch.empty(moa.num_experts, width, config.dim))
        self.o_experts = nn.Parameter(torch.empty(moa.num_experts, config.dim, width))
        self.k_proj = nn.Linear(config.dim, width, bias=False)
        self.v_proj = nn.Linear(config.dim, width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else None
        self.window = config.window_of(layer)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: Rotary | None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        padding_BS: Tensor | None = None,
        scope: BatchScope | None = None,
    ) -> Tensor:
        """Attend from the S tokens of x. padding_BS: True = padding, which is not routed; its output is 0."""
        view = tokens_of(x_BSD, padding_BS, None)
        decision, K = self.heads.route(view), self.heads.k
        groups = Grouping.of(decision.expert_ids_N, self.heads.num_experts)
        q_RX = grouped_linear(view.x_TD, decision.token_ids_N[groups.order_R], groups.counts_e, self.q_experts)
        q_TY = q_RX.index_select(0, groups.rows_N).reshape(view.x_TD.shape[0], K * q_RX.shape[1])
        q_BSKGd = view.restore(q_TY).view(*x_BSD.shape[:2], K, self.kv_heads, self.head_dim)
        q = q_BSKGd.permute(0, 3, 2, 1, 4).flatten(1, 2)  # a key/value head's K query heads lie together
        k, v = (_by_head(each, self.head_dim) for each in (self.k_proj(x_BSD), self.v_proj(x_BSD)))
        q, k = normed(q, self.q_norm), normed(k, self.k_norm)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)
        sight = Sight(self.window)
        y = attend(q, k, v, mask, sight) if cache is None else cache.attend(self.layer, q, k, v, mask, sight)
        y_BSY = y.reshape(len(y), self.kv_heads, K, *y.shape[2:]).permute(0, 3, 2, 1, 4).flatten(2)
        y_NX = view.pick(y_BSY).reshape(-1, self.kv_heads * self.head_dim)
        y_NX = y_NX * decision.weights_N.to(y_NX.dtype)[:, None]
        out_RD = grouped_linear(y_NX, groups.order_R, groups.counts_e, self.o_experts)
        out_TD = sum_rows(out_RD, decision.token_ids_N, groups.rows_N.view(-1, K), view.x_TD.shape[0])
        return view.restore(self.heads.finish(out_TD, decision, groups.counts_e, view, scope))

    def init_weights(self, std: float, output_std: float) -> None:
        """Draw all weights: std inside, output_std for what writes into the residual stream."""
        for weight in (self.q_experts, self.k_proj.weight, self.v_proj.weight):
            nn.init.normal_(weight, std=std)
        nn.init.normal_(self.o_experts, std=output_std)
        self.heads.init_weights(std)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()


def _by_head(x_BSX: Tensor, head_dim: int) -> Tensor:
    return x_BSX.view(*x_BSX.shape[:2], -1, head_dim).transpose(1, 2)
