"""A tiny decoder configuration for the tests of this folder; each test overrides what it is about."""

import pytest
import torch

from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.routing import TopK


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def make_config():
    def make(**overrides) -> DecoderConfig:
        moe = MoEConfig(num_experts=4, hidden_dim=16, router=TopK(k=2), shared_experts=1, shared_gate=True)
        defaults = {
            "vocab_size": 61,
            "dim": 32,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "hidden_dim": 48,
            "max_seq_len": 32,
            "moe": moe,
            "moe_layers": (1, 2),
            "qk_norm": True,
            "init_std": 0.1,  # large enough that a wrong position or mask shows in the logits
        }
        return DecoderConfig(**(defaults | overrides))

    return make
