"""Attention over a latent (MLA, arXiv 2405.04434 section 2.1): keys and values of all heads come from one short vector.

Without a cache they are computed for each head; with one, the latent itself is cached and the up-projections move to
the query and the result, so that a cached token costs kv_rank + rope_dim numbers. Both are the same function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from equipoise.models.attend import WHOLE, attend
from equipoise.models.attention import normed
from equipoise.models.cache import KVCache
from equipoise.models.config import DecoderConfig
from equipoise.models.rope import Rotary, YarnScaling, rotate


class LatentAttention(nn.Module):
    """Latent attention of one layer, as in DeepSeek-V2 and V3. forward as `Attention`; `rotary` is needed.

    Each head's query and key are a part from the latent and a rotated part; the rotated key is the same for all heads.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        latent = config.latent
        assert latent is not None
        self.layer, self.latent, self.num_heads = layer, latent, config.num_heads
        q_dim = config.num_heads * (latent.nope_dim + latent.rope_dim)
        biased = config.attention_bias != "none"
        if latent.q_rank is None:
            self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.dim, latent.q_rank, bias=biased)
            self.q_a_layernorm = nn.RMSNorm(latent.q_rank, eps=latent.norm_eps)
            self.q_b_proj = nn.Linear(latent.q_rank, q_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.dim, latent.kv_rank + latent.rope_dim, bias=biased)
        self.kv_a_layernorm = nn.RMSNorm(latent.kv_rank, eps=latent.norm_eps)
        self.kv_b_proj = nn.Linear(latent.kv_rank, config.num_heads * (latent.nope_dim + latent.value_dim), bias=False)
        self.o_proj = nn.Linear(config.num_heads * latent.value_dim, config.dim, bias=biased)
        yarn = config.rope_scaling if isinstance(config.rope_scaling, YarnScaling) else None
        self.softmax_factor = 1.0 if yarn is None else yarn.softmax_factor

    def forward(
        self, x_BSD: Tensor, rotary: Rotary | None, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Attend from the S tokens of x to themselves and to what the cache holds."""
        assert rotary is not None
        nope, rank = self.latent.nope_dim, self.latent.kv_rank
        q_BHSD = _by_head(self._queries(x_BSD), self.num_heads)
        q_nope, q_rope = q_BHSD[..., :nope], q_BHSD[..., nope:]
        both_BSR = self.kv_a_proj_with_mqa(x_BSD)
        latent_BSR = normed(both_BSR[..., :rank], self.kv_a_layernorm)
        q_rope = rotate(q_rope, rotary).to(q_nope.dtype)
        k_rope_B1SR = rotate(both_BSR[..., rank:].unsqueeze(1), rotary).to(latent_BSR.dtype)
        if cache is None:
            y_BHSV = self._from_heads(torch.cat((q_nope, q_rope), dim=-1), latent_BSR, k_rope_B1SR, mask)
        else:
            y_BHSV = self._from_latent(q_nope, q_rope, torch.cat((latent_BSR[:, None], k_rope_B1SR), -1), mask, cache)
        out: Tensor = self.o_proj(y_BHSV.transpose(1, 2).flatten(2))
        return out

    def init_weights(self, std: float, output_std: float) -> None:
        """Draw the projections from normal(0, std), the output projection from normal(0, output_std)."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=output_std if module is self.o_proj else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()

    def _queries(self, x_BSD: Tensor) -> Tensor:
        q: Tensor
        if self.latent.q_rank is None:
            q = self.q_proj(x_BSD)
        else:
            q = self.q_b_proj(normed(self.q_a_proj(x_BSD), self.q_a_layernorm))
        return q

    def _from_heads(self, q_BHSD: Tensor, latent_BSR: Tensor, k_rope_B1SR: Tensor, mask: Tensor | None) -> Tensor:
        """Every head has keys and values of its own."""
        kv_BHSX = _by_head(self.kv_b_proj(latent_BSR), self.num_heads)
        k_nope, v = kv_BHSX[..., : self.latent.nope_dim], kv_BHSX[..., self.latent.nope_dim :]
        k_BHSD = torch.cat((k_nope, k_rope_B1SR.expand(-1, self.num_heads, -1, -1)), dim=-1)
        return attend(q_BHSD * self.softmax_factor, k_BHSD, v, mask)

    def _from_latent(
        self, q_nope: Tensor, q_rope: Tensor, key_B1SR: Tensor, mask: Tensor | None, cache: KVCache
    ) -> Tensor:
        """All heads read one key, which is the value too. The cache divides by the root of its own width: undone."""
        nope, rank = self.latent.nope_dim, self.latent.kv_rank
        up_HXR = self.kv_b_proj.weight.view(self.num_heads, -1, rank)
        width = nope + self.latent.rope_dim
        q_BHSR = torch.cat((q_nope @ up_HXR[:, :nope], q_rope), dim=-1)
        q_BHSR = q_BHSR * (self.softmax_factor * math.sqrt(q_BHSR.shape[-1] / width))
        y_BHSR = cache.attend(self.layer, q_BHSR, key_B1SR, key_B1SR, mask, WHOLE)
        y_BHSV: Tensor = y_BHSR[..., :rank] @ up_HXR[:, nope:].transpose(1, 2)
        return y_BHSV


def _by_head(x_BSX: Tensor, num_heads: int) -> Tensor:
    B, S, X = x_BSX.shape
    return x_BSX.view(B, S, num_heads, X // num_heads).transpose(1, 2)
