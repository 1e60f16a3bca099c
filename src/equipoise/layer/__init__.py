"""The MoE layer: route, dispatch, experts, combine; and the dense feed-forward block that it replaces."""

from equipoise.layer.capacity import Capacity
from equipoise.layer.experts import Experts
from equipoise.layer.feed_forward import FeedForward
from equipoise.layer.moe import MoE, moe_layers, reduce_and_update
from equipoise.layer.product_keys import Peer, ProductKeyExperts
from equipoise.layer.zero_experts import ZeroExperts

__all__ = [
    "Capacity",
    "Experts",
    "FeedForward",
    "MoE",
    "Peer",
    "ProductKeyExperts",
    "ZeroExperts",
    "moe_layers",
    "reduce_and_update",
]
