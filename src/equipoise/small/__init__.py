"""Models on small machines: experts in few bits, and experts in a file with some of them in memory."""

from equipoise.small.cache import CacheCounts
from equipoise.small.load import Small, SmallConfig, bytes_of, load_small
from equipoise.small.offload import Offload, offload_experts, offload_of
from equipoise.small.quantise import expert_bytes, quantize_experts

__all__ = [
    "CacheCounts",
    "Offload",
    "Small",
    "SmallConfig",
    "bytes_of",
    "expert_bytes",
    "load_small",
    "offload_experts",
    "offload_of",
    "quantize_experts",
]
