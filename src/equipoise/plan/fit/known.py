"""Published models by name: their sizes, what their makers say they come to, and where the two differ, why.

Sizes are those of the models' own configuration files. What a checkpoint has besides the decoder, such as a vision
tower or a layer for multi-token prediction (MTP), is in `extra` and not in any count here.
"""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.plan.fit.architecture import Architecture, GroupedQuery, Latent, Routed


@dataclass(frozen=True, kw_only=True)
class Extra:
    """A part of the checkpoint that is not the decoder. parameters: of it. counted: in the published total."""

    what: str
    parameters: int
    counted: bool
    source: str


@dataclass(frozen=True, kw_only=True)
class Known:
    """total_b, active_b: as published, in billions, and rounded there. note: where it isn't what the sizes give."""

    model: Architecture
    total_b: float
    active_b: float
    source: str
    extra: Extra | None = None
    note: str = ""


def _gqa(heads: int, kv_heads: int = 8, head_dim: int = 128, **more: object) -> GroupedQuery:
    return GroupedQuery(heads=heads, kv_heads=kv_heads, head_dim=head_dim, **more)  # type: ignore[arg-type]


def _mla(heads: int, q_rank: int = 1536) -> Latent:
    return Latent(heads=heads, q_rank=q_rank, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)


def _moe(dim: int, num: int, k: int, hidden_dim: int, *, router_biases: int = 0, **more: object) -> Routed:
    """router_biases: of E each, a router's own and one for selection."""
    weights = num * dim + router_biases * num
    return Routed(num=num, k=k, hidden_dim=hidden_dim, router_parameters=weights, **more)  # type: ignore[arg-type]


def _from(first: int, layers: int, step: int = 1) -> tuple[int, ...]:
    return tuple(range(first, layers, step))


def _mixtral_8x7b() -> Known:
    model = Architecture(
        name="mixtral-8x7b",
        vocab=32000,
        dim=4096,
        layers=32,
        attention=_gqa(32),
        routed=_moe(4096, 8, 2, 14336),
        moe_layers=_from(0, 32),
        context=32768,
    )
    return Known(
        model=model, total_b=46.7, active_b=12.9, source="arXiv 2401.04088; mistral.ai/news/mixtral-of-experts"
    )


def _mixtral_8x22b() -> Known:
    model = Architecture(
        name="mixtral-8x22b",
        vocab=32768,
        dim=6144,
        layers=56,
        attention=_gqa(48),
        routed=_moe(6144, 8, 2, 16384),
        moe_layers=_from(0, 56),
        context=65536,
    )
    return Known(model=model, total_b=141, active_b=39, source="mistral.ai/news/mixtral-8x22b")


def _deepseek_v2_lite() -> Known:
    model = Architecture(
        name="deepseek-v2-lite",
        vocab=102400,
        dim=2048,
        layers=27,
        attention=_mla(16, q_rank=0),
        hidden_dim=10944,
        routed=_moe(2048, 64, 6, 1408, shared_dim=2816),
        moe_layers=_from(1, 27),
        context=32768,
    )
    return Known(model=model, total_b=15.7, active_b=2.4, source="arXiv 2405.04434, appendix B")


def _deepseek_v2() -> Known:
    model = Architecture(
        name="deepseek-v2",
        vocab=102400,
        dim=5120,
        layers=60,
        attention=_mla(128),
        hidden_dim=12288,
        routed=_moe(5120, 160, 6, 1536, shared_dim=3072, groups=8, top_groups=3),
        moe_layers=_from(1, 60),
        context=131072,
    )
    return Known(model=model, total_b=236, active_b=21, source="arXiv 2405.04434")


def _deepseek_v3() -> Known:
    model = Architecture(
        name="deepseek-v3",
        vocab=129280,
        dim=7168,
        layers=61,
        attention=_mla(128),
        hidden_dim=18432,
        routed=_moe(7168, 256, 8, 2048, router_biases=1, shared_dim=2048, groups=8, top_groups=4),
        moe_layers=_from(3, 61),
        context=131072,
    )
    mtp = Extra(
        what="module for multi-token prediction, without the embedding and head that it shares",
        parameters=11_500_000_000,
        counted=False,
        source="deepseek-ai/DeepSeek-V3:README_WEIGHTS.md",
    )
    return Known(model=model, total_b=671, active_b=37, source="arXiv 2412.19437", extra=mtp)


def _kimi_k2() -> Known:
    model = Architecture(
        name="kimi-k2",
        vocab=163840,
        dim=7168,
        layers=61,
        attention=_mla(64),
        hidden_dim=18432,
        routed=_moe(7168, 384, 8, 2048, router_biases=1, shared_dim=2048),
        moe_layers=_from(1, 61),
        context=131072,
    )
    return Known(
        model=model,
        total_b=1040,
        active_b=32.6,
        source="arXiv 2507.20534",
        note="the report rounds up: the sizes in its configuration come to 1,026 B, 1.3 % less than 1.04 T",
    )


def _qwen3_30b_a3b() -> Known:
    model = Architecture(
        name="qwen3-30b-a3b",
        vocab=151936,
        dim=2048,
        layers=48,
        attention=_gqa(32, 4, norm="head"),
        routed=_moe(2048, 128, 8, 768),
        moe_layers=_from(0, 48),
        context=32768,
    )
    return Known(model=model, total_b=30.5, active_b=3.3, source="arXiv 2505.09388; Qwen/Qwen3-30B-A3B:README.md")


def _qwen3_235b_a22b() -> Known:
    model = Architecture(
        name="qwen3-235b-a22b",
        vocab=151936,
        dim=4096,
        layers=94,
        attention=_gqa(64, 4, norm="head"),
        routed=_moe(4096, 128, 8, 1536),
        moe_layers=_from(0, 94),
        context=32768,
    )
    return Known(model=model, total_b=235, active_b=22, source="arXiv 2505.09388")


def _gpt_oss(size: str, layers: int, num: int, total_b: float, active_b: float) -> Known:
    attention = _gqa(64, 8, 64, qkv_bias=True, out_bias=True, sinks=True, windowed=layers // 2, window=128)
    model = Architecture(
        name=f"gpt-oss-{size}",
        vocab=201088,
        dim=2880,
        layers=layers,
        attention=attention,
        routed=_moe(2880, num, 4, 2880, router_biases=1, biases=True),
        moe_layers=_from(0, layers),
        context=131072,
    )
    return Known(
        model=model, total_b=total_b, active_b=active_b, source="arXiv 2508.10925, table 1 (active without embedding)"
    )


def _olmoe() -> Known:
    model = Architecture(
        name="olmoe-1b-7b",
        vocab=50304,
        dim=2048,
        layers=16,
        attention=_gqa(16, 16, norm="full"),
        routed=_moe(2048, 64, 8, 1024),
        moe_layers=_from(0, 16),
        context=4096,
    )
    return Known(model=model, total_b=6.9, active_b=1.3, source="arXiv 2409.02060")


VISION = Extra(
    what="vision tower and its projector: 34 layers of dim 1408 and 5632, patches, 5632 -> 4096 -> 4096 -> dim",
    parameters=871_932_416,
    counted=True,
    source="vision_config of meta-llama/Llama-4-Scout-17B-16E, counted as huggingface/transformers builds it",
)


def _llama_4(name: str, num: int, moe_layers: tuple[int, ...], total_b: float, context: int) -> Known:
    model = Architecture(
        name=name,
        vocab=202048,
        dim=5120,
        layers=48,
        attention=_gqa(40, windowed=36, window=8192),
        hidden_dim=16384,
        routed=_moe(5120, num, 1, 8192, shared_dim=8192),
        moe_layers=moe_layers,
        context=context,
    )
    source = "meta-llama/llama-models:models/llama4/MODEL_CARD.md"
    return Known(model=model, total_b=total_b, active_b=17, source=source, extra=VISION)


def _glm_4_5() -> Known:
    model = Architecture(
        name="glm-4.5",
        vocab=151552,
        dim=5120,
        layers=92,
        attention=_gqa(96, qkv_bias=True, norm="head"),
        hidden_dim=12288,
        routed=_moe(5120, 160, 8, 1536, router_biases=1, shared_dim=1536),
        moe_layers=_from(3, 92),
        context=131072,
    )
    mtp = Extra(
        what="layer 92, for multi-token prediction: an MoE layer and a projection of 2 dim to dim, without the copies "
        "of embedding and head that the checkpoint also has (1.55 B)",
        parameters=_mtp_of_glm(model),
        counted=False,
        source="config.json of zai-org/GLM-4.5 (num_nextn_predict_layers = 1)",
    )
    return Known(
        model=model,
        total_b=355,
        active_b=32,
        source="arXiv 2508.06471",
        extra=mtp,
        note="between the decoder alone, which has 0.6 % less than that, and 356.8 B with its layer for prediction",
    )


def _mtp_of_glm(model: Architecture) -> int:
    """An MoE layer, norms on its two inputs and before its head, and the projection of both inputs to dim."""
    routed, dim = model.routed, model.dim
    assert routed is not None
    experts = routed.num * model.feed_forward(routed.hidden_dim, False) + routed.router_parameters
    layer = model.attention.parameters(dim) + experts + model.feed_forward(routed.shared_dim, False) + 2 * dim
    return layer + 3 * dim + 2 * dim * dim


def _dbrx() -> Known:
    model = Architecture(
        name="dbrx",
        vocab=100352,
        dim=6144,
        layers=40,
        attention=_gqa(48),
        routed=_moe(6144, 16, 4, 10752),
        moe_layers=_from(0, 40),
        context=32768,
    )
    return Known(model=model, total_b=132, active_b=36, source="databricks/dbrx:README.md")


def _phi_3_5_moe() -> Known:
    model = Architecture(
        name="phi-3.5-moe",
        vocab=32064,
        dim=4096,
        layers=32,
        attention=_gqa(32, qkv_bias=True, out_bias=True),
        routed=_moe(4096, 16, 2, 6400),
        moe_layers=_from(0, 32),
        norm_size=2,
        head_bias=True,
        context=131072,
    )
    return Known(model=model, total_b=41.9, active_b=6.6, source="arXiv 2404.14219; microsoft/Phi-3.5-MoE-instruct")


def _qwen2_57b_a14b() -> Known:
    model = Architecture(
        name="qwen2-57b-a14b",
        vocab=151936,
        dim=3584,
        layers=28,
        attention=_gqa(28, 4, qkv_bias=True),
        routed=_moe(3584, 64, 8, 2560, shared_dim=20480, shared_gate=True),
        moe_layers=_from(0, 28),
        context=65536,
    )
    return Known(model=model, total_b=57.4, active_b=14, source="arXiv 2407.10671; Qwen/Qwen2-57B-A14B:README.md")


def _minimax_m2() -> Known:
    model = Architecture(
        name="minimax-m2",
        vocab=200064,
        dim=3072,
        layers=62,
        attention=_gqa(48, norm="full"),
        routed=_moe(3072, 256, 8, 1536, router_biases=1),
        moe_layers=_from(0, 62),
        context=196608,
    )
    return Known(
        model=model,
        total_b=230,
        active_b=10,
        source="MiniMaxAI/MiniMax-M2:README.md",
        note="rounded up: the sizes in its configuration come to 228.7 B, 0.6 % less than 230 B",
    )


KNOWN: dict[str, Known] = {
    each.model.name: each
    for each in (
        _mixtral_8x7b(),
        _mixtral_8x22b(),
        _deepseek_v2_lite(),
        _deepseek_v2(),
        _deepseek_v3(),
        _kimi_k2(),
        _qwen3_30b_a3b(),
        _qwen3_235b_a22b(),
        _gpt_oss("20b", 24, 32, 20.91, 3.61),
        _gpt_oss("120b", 36, 128, 116.83, 5.13),
        _olmoe(),
        _llama_4("llama-4-scout", 16, _from(0, 48), 109, 10_485_760),
        _llama_4("llama-4-maverick", 128, _from(1, 48, 2), 400, 1_048_576),
        _glm_4_5(),
        _dbrx(),
        _phi_3_5_moe(),
        _qwen2_57b_a14b(),
        _minimax_m2(),
    )
}
