import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.models.parameters import parameter_counts
from equipoise.routing import Switch, TopK

MIXTRAL_8X7B = DecoderConfig(
    vocab_size=32000,
    dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    hidden_dim=14336,
    max_seq_len=32768,
    tie_embeddings=False,
    moe=MoEConfig(num_experts=8, hidden_dim=14336, router=TopK(k=2)),
)
OLMOE_1B_7B = DecoderConfig(
    vocab_size=50304,
    dim=2048,
    num_layers=16,
    num_heads=16,
    hidden_dim=1024,
    max_seq_len=4096,
    tie_embeddings=False,
    qk_norm=True,  # ours is per head; theirs over all heads has 61 thousand more, in the sixth digit
    moe=MoEConfig(num_experts=64, hidden_dim=1024, router=TopK(k=8)),
)
QWEN3_30B_A3B = DecoderConfig(
    vocab_size=151936,
    dim=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    hidden_dim=6144,
    max_seq_len=40960,
    tie_embeddings=False,
    qk_norm=True,
    moe=MoEConfig(num_experts=128, hidden_dim=768, router=TopK(k=8)),
)
PUBLISHED = pytest.mark.parametrize(
    ("config", "total", "active"),
    [(MIXTRAL_8X7B, 46.703, 12.880), (OLMOE_1B_7B, 6.919, 1.282), (QWEN3_30B_A3B, 30.532, 3.353)],
    ids=["mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b"],
)


@PUBLISHED
def test_published_totals(config, total, active):
    counts = parameter_counts(config)
    assert counts.total / 1e9 == pytest.approx(total, abs=0.0005)
    assert counts.active / 1e9 == pytest.approx(active, abs=0.0005)


@PUBLISHED
def test_published_models_build_on_meta(config, total, active):
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(p.numel() for p in model.parameters()) == parameter_counts(config).total
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_by_hand():
    # D=4, 1 layer, 2 heads of 2, 1 kv head; V=10; gpt2: 8 positions, LayerNorm with bias, GELU
    config = DecoderConfig(
        vocab_size=10,
        dim=4,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        hidden_dim=5,
        max_seq_len=8,
        style="gpt2",
        moe=MoEConfig(num_experts=3, hidden_dim=6, router=TopK(k=2), shared_experts=2, shared_gate=True),
    )
    counts = parameter_counts(config)
    assert counts.embedding == 10 * 4 + 8 * 4
    assert counts.attention == 4 * 4 + 2 * (4 * 2) + 4 * 4
    assert counts.dense == 0
    assert counts.experts == 3 * (2 * 4 * 6)
    assert counts.shared == 2 * 4 * 12 + 4
    assert counts.router == 3 * 4
    assert counts.norm == 3 * 8
    assert counts.head == 0
    assert counts.total == 72 + 48 + 144 + 100 + 12 + 24
    assert counts.active == counts.total - 48  # one of three experts is not used


@st.composite
def configs(draw):
    heads, kv_groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    layers = draw(st.integers(1, 3))
    experts = draw(st.integers(2, 5))
    shared = draw(st.integers(0, 2))
    moe = MoEConfig(
        num_experts=experts,
        hidden_dim=4 * draw(st.integers(1, 3)),
        router=draw(st.sampled_from([TopK(k=1), TopK(k=2), Switch()])),
        shared_experts=shared,
        shared_gate=shared > 0 and draw(st.booleans()),
    )
    has_moe = draw(st.booleans())
    chosen = tuple(sorted(draw(st.sets(st.integers(0, layers - 1)))))
    return DecoderConfig(
        vocab_size=draw(st.integers(2, 20)),
        dim=heads * kv_groups * 4 * draw(st.integers(1, 2)),
        num_layers=layers,
        num_heads=heads * kv_groups,
        num_kv_heads=draw(st.sampled_from([None, heads])),
        head_dim=draw(st.sampled_from([None, 2, 6])),
        hidden_dim=draw(st.integers(1, 9)),
        max_seq_len=draw(st.integers(1, 9)),
        style=draw(st.sampled_from(["modern", "gpt2"])),
        tie_embeddings=draw(st.booleans()),
        moe=moe if has_moe else None,
        moe_layers=chosen if has_moe and draw(st.booleans()) else None,
        qk_norm=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=60)
@given(config=configs())
def test_arithmetic_equals_the_modules(config):
    counts = parameter_counts(config)
    # the sum over the parameters of each part, told apart by name
    sums = dict.fromkeys(("embedding", "attention", "dense", "experts", "shared", "router", "norm", "head"), 0)
    for name, parameter in Decoder(config).named_parameters():
        sums[part_of(name)] += parameter.numel()
    assert {part: getattr(counts, part) for part in sums} == sums
    assert counts.total == sum(sums.values())
    idle_share = 0 if config.moe is None else 1 - config.moe.router.k / config.moe.num_experts
    assert counts.total - counts.active == pytest.approx(idle_share * counts.experts)


def part_of(name: str) -> str:
    for fragment, part in {
        "embed": "embedding",
        "lm_head": "head",
        "self_attn": "attention",
        "layernorm": "norm",
        "norm": "norm",
        "mlp.experts": "experts",
        "mlp.shared": "shared",
        "mlp.router": "router",
        "mlp": "dense",
    }.items():
        if fragment in name:
            return part
    raise AssertionError(name)
