"""Mixture of heads (MoH, arXiv 2410.11842 section 3.2): multi-head attention whose heads are weighted, or left out.

y_t = sum_h g_th head_th W_o^h. Shared heads: g = a_1 S softmax(W_s x), routed ones: a_2 K w, with w the weights
of the K chosen heads and 0 for the others, (a_1, a_2) = 2 softmax(W_a x). The factors are those of the authors' code
(SkyworkAI/MoH): all weights are 1 where nothing is preferred. All heads are computed, as there; only a kernel that
skips heads token by token would save their arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equipoise.layer.choice import Choice
from equipoise.layer.tokens import tokens_of
from equipoise.models.attention import Attention
from equipoise.models.attention_experts.configs import MixtureOfHeads
from equipoise.models.cache import KVCache
from equipoise.models.config import DecoderConfig
from equipoise.models.rope import Rotary
from equipoise.ops.count import count_assignments
from equipoise.ops.router_linear import router_linear
from equipoise.types import BatchScope


class MixtureOfHeadsLayer(nn.Module):
    """MoH of one layer. heads: chooses among the routed heads, and is watched. attention: the heads themselves.

    shared_weight (S, D): weights of the shared heads. parts_weight (2, D): of shared against routed heads. Both are
    absent without shared heads.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        moh = config.attention_moe
        assert isinstance(moh, MixtureOfHeads)
        self.shared_heads = moh.shared_heads
        self.attention = Attention(config, layer)
        self.heads = Choice(moh.router, config.dim, moh.num_routed(config), moh.balance)
        self.shared_weight = nn.Parameter(torch.empty(moh.shared_heads, config.dim)) if moh.shared_heads else None
        self.parts_weight = nn.Parameter(torch.empty(2, config.dim)) if moh.shared_heads else None

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
        decision = self.heads.route(view)
        gates_TH = decision.logits_TE.new_zeros(decision.logits_TE.shape)
        gates_TH = gates_TH.index_put((decision.token_ids_N, decision.expert_ids_N), self.heads.k * decision.weights_N)
        if self.shared_weight is not None and self.parts_weight is not None:
            parts_T2 = 2 * router_linear(view.x_TD, self.parts_weight).softmax(-1)
            shared_TS = self.shared_heads * router_linear(view.x_TD, self.shared_weight).softmax(-1)
            gates_TH = torch.cat((parts_T2[:, :1] * shared_TS, parts_T2[:, 1:] * gates_TH), dim=1)
        y_TX = view.pick(self.attention.heads(x_BSD, rotary, mask, cache))
        y_TX = (y_TX.view(*gates_TH.shape, self.attention.head_dim) * gates_TH.to(y_TX.dtype)[..., None]).flatten(1)
        counts_e = count_assignments(decision.expert_ids_N, self.heads.num_experts)
        out_TD = self.heads.finish(self.attention.o_proj(y_TX), decision, counts_e, view, scope)
        return view.restore(out_TD)

    def init_weights(self, std: float, output_std: float) -> None:
        """Draw all weights: std inside, output_std for what writes into the residual stream."""
        self.attention.init_weights(std, output_std)
        self.heads.init_weights(std)
        for weight in (self.shared_weight, self.parts_weight):
            if weight is not None:
                nn.init.normal_(weight, std=std)
