"""Causal self-attention with grouped key/value heads, rotary positions and an optional per-head RMS norm.

Rotary tables are made once per forward by the function here and handed to every layer. The product itself is in
attend.py; caches are known only by their protocol.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equipoise.models.attend import attend
from equipoise.models.cache import KVCache
from equipoise.models.config import DecoderConfig

Rotary = tuple[Tensor, Tensor]


def rotary_tables(positions_BS: Tensor, head_dim: int, theta: float) -> Rotary:
    """cos and sin of the rotary angles, fp32 (B, 1, S, head_dim): both halves have the same angles, the first one's sin
    is negative, as `rotate` needs it.

    The angle of pair i at position p is p * theta^(-2i / head_dim) (RoFormer, arXiv 2104.09864, section 3.2.2).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BS.device) / head_dim
    angles = positions_BS[:, None, :, None].float() * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x_BHSD: Tensor, rotary: Rotary) -> Tensor:
    """Turn the pair (i, i + D/2) of each head by its angle, in fp32. Hugging Face checkpoints pair halves this way."""
    cos, sin = rotary
    x_BHSD = x_BHSD.float()
    others_BHSD = x_BHSD.roll(x_BHSD.shape[-1] // 2, dims=-1)  # the halves change places
    return x_BHSD * cos + others_BHSD * sin


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
        self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self, x_BSD: Tensor, rotary: Rotary | None, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Attend from the S tokens of x to themselves and to what the cache holds."""
        q, k, v = (
            project(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _place(q, self.q_norm, rotary).to(v.dtype), _place(k, self.k_norm, rotary).to(v.dtype)
        y = attend(q, k, v, mask) if cache is None else cache.attend(self.layer, q, k, v, mask)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out

    def init_weights(self, std: float, output_std: float) -> None:
        """Draw the projections from normal(0, std), the output projection from normal(0, output_std)."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(projection.weight, std=std)
        nn.init.normal_(self.o_proj.weight, std=output_std)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()


def _place(x_BHSD: Tensor, norm: nn.RMSNorm | None, rotary: Rotary | None) -> Tensor:
    """Norm each head, then rotate it to its position. The norm runs in its weight's dtype: autocast leaves x lower."""
    if norm is not None:
        x_BHSD = norm(x_BHSD.to(norm.weight.dtype))
    return x_BHSD if rotary is None else rotate(x_BHSD, rotary)
