"""Which of their tensors is where in ours: attention, dense blocks, experts, and what is around the layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from equipoise.convert.parts import Change, Halved, Part, Same, Transposed, Zipped
from equipoise.models.config import DecoderConfig

Layout = Literal["per_expert", "fused"]


def around(config: DecoderConfig) -> Iterator[Part]:
    """Embedding, last norm, head."""
    yield Part("model.embed_tokens.weight", "embed_tokens.weight")
    yield Part("model.norm.weight", "norm.weight")
    if not config.tie_embeddings:
        yield Part("lm_head.weight", "lm_head.weight")


def attention(config: DecoderConfig, layer: int) -> Iterator[Part]:
    """Both norms of a layer and its attention."""
    prefix = f"layers.{layer}."
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        yield Part(f"model.{prefix}{name}", prefix + name)
    prefix += "self_attn."
    for name, change in _latent(config) if config.latent else _projections(config):
        yield Part(f"model.{prefix}{name}", prefix + name, change=change)


def _projections(config: DecoderConfig) -> Iterator[tuple[str, Change]]:
    for each in "qkvo":
        yield f"{each}_proj.weight", Same()
        if config.attention_bias == "qkvo" or (config.attention_bias == "qkv" and each != "o"):
            yield f"{each}_proj.bias", Same()
    if config.qk_norm:
        yield from (("q_norm.weight", Same()), ("k_norm.weight", Same()))
    if config.sinks:
        yield "sinks", Same()


def _latent(config: DecoderConfig) -> Iterator[tuple[str, Change]]:
    """DeepSeek's checkpoints rotate neighbours; ours, like the other families', halves."""
    latent = config.latent
    assert latent is not None
    biased = config.attention_bias != "none"
    in_heads, in_latent = Halved(latent.rope_dim, latent.nope_dim), Halved(latent.rope_dim, latent.kv_rank)
    if latent.q_rank is None:
        yield "q_proj.weight", in_heads
    else:
        yield from (("q_a_proj.weight", Same()), ("q_a_layernorm.weight", Same()), ("q_b_proj.weight", in_heads))
        if biased:
            yield "q_a_proj.bias", Same()
    yield "kv_a_proj_with_mqa.weight", in_latent
    if biased:
        yield from (("kv_a_proj_with_mqa.bias", in_latent), ("o_proj.bias", Same()))
    yield from ((f"{name}.weight", Same()) for name in ("kv_a_layernorm", "kv_b_proj", "o_proj"))


def feed_forward(theirs: str, ours: str, hidden_dim: int) -> Iterator[Part]:
    """A dense SwiGLU block: their two inner projections are the halves of ours."""
    F = hidden_dim
    yield Part(f"{theirs}.gate_proj.weight", f"{ours}.gate_up_proj.weight", rows=(0, F))
    yield Part(f"{theirs}.up_proj.weight", f"{ours}.gate_up_proj.weight", rows=(F, 2 * F))
    yield Part(f"{theirs}.down_proj.weight", f"{ours}.down_proj.weight")


def experts(
    config: DecoderConfig, theirs: str, ours: str, layout: Layout, names: tuple[str, str, str]
) -> Iterator[Part]:
    """Stacked in ours; in theirs three matrices per expert, or stacked too. names: of gate, up and down."""
    assert config.moe is not None
    F = config.moe.hidden_dim
    if layout == "fused":
        yield from (Part(f"{theirs}.{name}", f"{ours}.{name}") for name in ("gate_up_proj", "down_proj"))
        return
    gate, up, down = names
    for expert in range(config.moe.num_experts):
        yield Part(f"{theirs}.{expert}.{gate}.weight", f"{ours}.gate_up_proj", expert, (0, F))
        yield Part(f"{theirs}.{expert}.{up}.weight", f"{ours}.gate_up_proj", expert, (F, 2 * F))
        yield Part(f"{theirs}.{expert}.{down}.weight", f"{ours}.down_proj", expert)


def biased_experts(theirs: str, ours: str) -> Iterator[Part]:
    """gpt-oss's: stacked, transposed, gate and up alternating."""
    yield Part(f"{theirs}.gate_up_proj", f"{ours}.gate_up_proj", change=Zipped(transposed=True))
    yield Part(f"{theirs}.gate_up_proj_bias", f"{ours}.up_bias", change=Zipped())
    yield Part(f"{theirs}.down_proj", f"{ours}.down_proj", change=Transposed())
    yield Part(f"{theirs}.down_proj_bias", f"{ours}.down_bias")
