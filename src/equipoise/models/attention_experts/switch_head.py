"""SwitchHead (arXiv 2312.07987 section 2.2): per head, values and outputs are mixtures of experts with sigmoid gates.

v_sh = sum_e s_she x_s W_v^he over K experts that source token s chooses; y_t = sum_h sum_e d_the a_th W_o^he over K
that destination token t chooses. Queries and keys are dense. Cached values are mixed, so a cache is a usual one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equipoise.layer.choice import Choice
from equipoise.layer.tokens import TokenView, tokens_of
from equipoise.models.attend import Sight, attend
from equipoise.models.attention import normed
from equipoise.models.attention_experts.configs import SwitchHead
from equipoise.models.cache import KVCache
from equipoise.models.config import DecoderConfig
from equipoise.models.rope import Rotary, rotate
from equipoise.ops.grouped_linear import Grouping, grouped_linear
from equipoise.ops.ragged import sum_rows
from equipoise.types import BatchScope


class SwitchHeadLayer(nn.Module):
    """SwitchHead of one layer. values, outputs: choose each side's experts, and are watched. forward as `Attention`.

    v_experts: (H E, d, D), head by head. o_experts: (H E, D, d).
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        switch = config.attention_moe
        assert isinstance(switch, SwitchHead)
        H, d = config.num_heads, config.head_size
        self.layer, self.num_heads, self.head_dim = layer, H, d
        router, num_experts = switch.router(H), H * switch.num_experts
        self.values = Choice(router, config.dim, num_experts, switch.balance, H)
        self.outputs = Choice(router, config.dim, num_experts, switch.balance, H)
        self.q_proj = nn.Linear(config.dim, H * d, bias=False)
        self.k_proj = nn.Linear(config.dim, H * d, bias=False)
        self.v_experts = nn.Parameter(torch.empty(num_experts, d, config.dim))
        self.o_experts = nn.Parameter(torch.empty(num_experts, config.dim, d))
        self.q_norm = nn.RMSNorm(d, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(d, eps=config.norm_eps) if config.qk_norm else None
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
        v = self._by_head(view.restore(self._values(view, scope)))
        q, k = self._by_head(self.q_proj(x_BSD)), self._by_head(self.k_proj(x_BSD))
        q, k = normed(q, self.q_norm), normed(k, self.k_norm)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)
        sight = Sight(self.window)
        y = attend(q, k, v, mask, sight) if cache is None else cache.attend(self.layer, q, k, v, mask, sight)
        y_TX = view.pick(y.transpose(1, 2).flatten(2))
        return view.restore(self._outputs(y_TX, view, scope))

    def init_weights(self, std: float, output_std: float) -> None:
        """Draw all weights: std inside, output_std for what writes into the residual stream."""
        for weight in (self.q_proj.weight, self.k_proj.weight, self.v_experts):
            nn.init.normal_(weight, std=std)
        nn.init.normal_(self.o_experts, std=output_std)
        for choice in (self.values, self.outputs):
            choice.init_weights(std)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def _values(self, view: TokenView, scope: BatchScope | None) -> Tensor:
        """(T, H d): each head's mixture."""
        decision = self.values.route(view)
        groups = Grouping.of(decision.expert_ids_N, self.values.num_experts)
        v_Rd = grouped_linear(view.x_TD, decision.token_ids_N[groups.order_R], groups.counts_e, self.v_experts)
        v_Nd = v_Rd.index_select(0, groups.rows_N) * decision.weights_N.to(v_Rd.dtype)[:, None]
        K = self.values.k // self.num_heads
        v_TX = v_Nd.view(view.x_TD.shape[0], self.num_heads, K, self.head_dim).sum(2).flatten(1)
        return self.values.finish(v_TX, decision, groups.counts_e, view, scope)

    def _outputs(self, y_TX: Tensor, view: TokenView, scope: BatchScope | None) -> Tensor:
        """(T, D): every head's mixture, summed."""
        decision = self.outputs.route(view)
        groups = Grouping.of(decision.expert_ids_N, self.outputs.num_experts)
        K = self.outputs.k // self.num_heads
        y_Nd = y_TX.reshape(-1, self.head_dim).repeat_interleave(K, 0) * decision.weights_N.to(y_TX.dtype)[:, None]
        out_RD = grouped_linear(y_Nd, groups.order_R, groups.counts_e, self.o_experts)
        rows_TN = groups.rows_N.view(-1, self.outputs.k)
        out_TD = sum_rows(out_RD, decision.token_ids_N, rows_TN, view.x_TD.shape[0])
        return self.outputs.finish(out_TD, decision, groups.counts_e, view, scope)

    def _by_head(self, x_BSX: Tensor) -> Tensor:
        return x_BSX.view(*x_BSX.shape[:2], -1, self.head_dim).transpose(1, 2)
