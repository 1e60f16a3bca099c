"""The attention module of a block, whichever kind the configuration says."""

from __future__ import annotations

from equipoise.models.attention import Attention
from equipoise.models.attention_experts.configs import MixtureOfAttention, MixtureOfHeads, SwitchHead
from equipoise.models.attention_experts.mixture_of_heads import MixtureOfHeadsLayer
from equipoise.models.attention_experts.moa import MixtureOfAttentionLayer
from equipoise.models.attention_experts.switch_head import SwitchHeadLayer
from equipoise.models.config import DecoderConfig
from equipoise.models.latent_attention import LatentAttention

AttentionExperts = MixtureOfAttentionLayer | SwitchHeadLayer | MixtureOfHeadsLayer


def build_attention(config: DecoderConfig, layer: int) -> Attention | LatentAttention | AttentionExperts:
    """Of one layer."""
    kind = config.attention_moe
    if isinstance(kind, MixtureOfAttention):
        return MixtureOfAttentionLayer(config, layer)
    if isinstance(kind, SwitchHead):
        return SwitchHeadLayer(config, layer)
    if isinstance(kind, MixtureOfHeads):
        return MixtureOfHeadsLayer(config, layer)
    return Attention(config, layer) if config.latent is None else LatentAttention(config, layer)
