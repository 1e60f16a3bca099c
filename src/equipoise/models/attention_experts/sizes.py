"""How many parameters attention experts have, and how many of them a token uses, by arithmetic alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from equipoise.models.attention_experts.configs import MixtureOfAttention, SwitchHead
from equipoise.routing.router import num_parameters

if TYPE_CHECKING:
    from equipoise.models.config import DecoderConfig


def attention_moe_parameters(config: DecoderConfig, plain: int) -> tuple[int, int]:
    """(all, unused by a token) of one layer. plain: those of plain attention of the same sizes.

    With D dim, d head_size, G key/value heads, H heads, E experts of which K are used, S shared and R routed heads:

        MoA         2 E D G d + 2 D G d (+ 2 d for qk_norm) + router;   unused 2 (E - K) D G d
        SwitchHead  2 D H d + 2 H E D d (+ 2 d) + 2 H E D;              unused 2 H (E - K) D d
        MoH         plain + router of R + (S + 2) D, if S;              unused (R - K) (2 D d (+ d for a query bias))
    """
    kind, D, d, norms = config.attention_moe, config.dim, config.head_size, 2 * config.head_size * bool(config.qk_norm)
    if kind is None:
        return plain, 0
    if isinstance(kind, MixtureOfAttention):
        expert, K = 2 * D * config.kv_heads * d, kind.router.k
        router = num_parameters(kind.router, D, kind.num_experts)
        return kind.num_experts * expert + expert + norms + router, (kind.num_experts - K) * expert
    if isinstance(kind, SwitchHead):
        H, E = config.num_heads, kind.num_experts
        return 2 * D * H * d + 2 * H * E * D * d + norms + 2 * H * E * D, 2 * H * (E - kind.k) * D * d
    S, R = kind.shared_heads, kind.num_routed(config)
    gates = num_parameters(kind.router, D, R) + ((S + 2) * D if S else 0)
    head = 2 * D * d + (d if config.attention_bias != "none" else 0)
    return plain + gates, (R - kind.router.k) * head
