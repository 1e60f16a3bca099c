"""The dense model that a sparse one is to be compared with: of equal active FLOPs, or of equal parameters.

Sparse and dense models are only comparable at one of the two; at equal FLOPs a sparse one has more parameters, at equal
parameters it computes less (Switch, arXiv 2101.03961, compares at both). What mixes tokens stays as it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from equipoise.models.config import DecoderConfig
from equipoise.models.flops import feed_forward_flops
from equipoise.models.parameters import parameter_counts


def dense_like(config: DecoderConfig, equal: Literal["flops", "parameters"]) -> DecoderConfig:
    """The same decoder with a dense feed-forward part in every layer, all of one width.

    equal: "flops", of one token's forward; "parameters", of the whole model. The width is the nearest whole number, so
    the two differ by at most half a hidden unit in every layer. Raises ValueError for another word, and for a model
    that is dense already.
    """
    if equal not in ("flops", "parameters"):
        raise ValueError(f"equal: expected 'flops' or 'parameters', got {equal!r}. Compare at one of them, or at both.")
    if not config.moe_layer_ids and not config.peer_layer_ids:
        raise ValueError(
            "config: expected a model with MoE or PEER layers, got a dense one. It is its own equal in both senses."
        )
    bare = replace(config, moe=None, moe_layers=None, peer=None, peer_layers=None, hidden_dim=1)
    if equal == "flops":
        per_unit = _feed_forward(bare)
        wanted = _feed_forward(config)
    else:
        per_unit = parameter_counts(bare).dense
        wanted = parameter_counts(config).total - parameter_counts(bare).total + per_unit
    return replace(bare, hidden_dim=max(1, round(wanted / per_unit)))


def _feed_forward(config: DecoderConfig) -> float:
    """FLOPs of one token's forward in all feed-forward parts."""
    return sum(feed_forward_flops(config, layer) for layer in range(config.num_layers))
