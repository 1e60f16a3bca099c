"""Architectures from the `config.json` of Hugging Face models: one reader per `model_type`.

What a family always has (biases, norms, which layers are dense) is in its reader, as huggingface/transformers builds
it (src/transformers/models/*/modeling_*.py); sizes are from the file. A test builds small models of each family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from equipoise.plan.fit.architecture import Architecture, GroupedQuery, Latent, Routed
from equipoise.plan.fit.config_fields import Fields

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
Norm = Literal["none", "head", "full"]


def architecture(config: Fields, name: str) -> Architecture:
    """Of a parsed config.json. Raises ValueError for one that is incomplete, contradicts itself, or is unknown."""
    kind = config.text("model_type")
    if kind not in READERS and config.has("text_config"):  # a model for pictures and text: the decoder is inside
        return architecture(config.part("text_config"), name)
    if kind not in READERS:
        known = ", ".join(sorted(READERS))
        raise ValueError(
            f"{config.source}: model_type: expected one of {known}, got {kind!r}; for another one of the same make, "
            "change the word in a copy of the file"
        )
    try:
        return READERS[kind](config, name)
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith(config.source) else f"{config.source}: {said}") from error


# ---------------------------------------------------------------------------------------------- parts


def _base(config: Fields, name: str, attention: GroupedQuery | Latent, **more: object) -> Architecture:
    sizes = {
        "vocab": config.size("vocab_size"),
        "dim": config.size("hidden_size"),
        "layers": config.size("num_hidden_layers"),
        "tied": config.flag("tie_word_embeddings", False),
        "context": config.size("max_position_embeddings") if config.has("max_position_embeddings") else None,
    }
    return Architecture(name=name, attention=attention, **(sizes | more))  # type: ignore[arg-type]  # checked there


def _grouped(
    config: Fields, *, qkv_bias: bool = False, out_bias: bool = False, norm: Norm = "none", window: bool = False
) -> GroupedQuery:
    """window: whether `sliding_window` is in force, in all layers."""
    heads, dim = config.size("num_attention_heads"), config.size("hidden_size")
    if not config.has("head_dim") and dim % heads:
        raise ValueError(
            f"{config.source}: num_attention_heads: expected a divisor of hidden_size = {dim} without a head_dim, got "
            f"{heads}; the fields contradict each other"
        )
    windowed = window and config.has("sliding_window")
    return GroupedQuery(
        heads=heads,
        kv_heads=config.size("num_key_value_heads", default=heads),
        head_dim=config.size("head_dim", default=dim // heads),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        norm=norm,
        windowed=config.size("num_hidden_layers") if windowed else 0,
        window=config.size("sliding_window") if windowed else 0,
    )


def _latent(config: Fields) -> Latent:
    return Latent(
        heads=config.size("num_attention_heads"),
        q_rank=config.size("q_lora_rank", default=0, least=0),
        kv_rank=config.size("kv_lora_rank"),
        nope_dim=config.size("qk_nope_head_dim"),
        rope_dim=config.size("qk_rope_head_dim"),
        value_dim=config.size("v_head_dim"),
        bias=config.flag("attention_bias", False),
    )


def _routed(config: Fields, hidden_dim: int, *, router_biases: int = 0, **more: object) -> Routed:
    num = config.size(*EXPERTS)
    weights = num * config.size("hidden_size") + router_biases * num
    k = config.size("num_experts_per_tok")
    return Routed(num=num, k=k, hidden_dim=hidden_dim, router_parameters=weights, **more)  # type: ignore[arg-type]


def _every_layer(config: Fields) -> tuple[int, ...]:
    return tuple(range(config.size("num_hidden_layers")))


def _sparse_step(config: Fields) -> tuple[int, ...]:
    """Qwen's rule: every n-th layer, but for those that are named."""
    step, dense = config.size("decoder_sparse_step", default=1), config.numbers("mlp_only_layers") or ()
    return tuple(i for i in _every_layer(config) if (i + 1) % step == 0 and i not in dense)


def _after_first(config: Fields) -> tuple[int, ...]:
    """DeepSeek's rule: the first layers are dense."""
    first, step = config.size("first_k_dense_replace", default=0, least=0), config.size("moe_layer_freq", default=1)
    if first > config.size("num_hidden_layers"):
        raise ValueError(
            f"{config.source}: first_k_dense_replace: expected at most num_hidden_layers = "
            f"{config.size('num_hidden_layers')}, got {first}; the fields contradict each other"
        )
    return tuple(i for i in _every_layer(config) if i >= first and i % step == 0)


def _dense(config: Fields, name: str, attention: GroupedQuery, *, ffn_bias: bool = False) -> Architecture:
    return _base(config, name, attention, hidden_dim=config.size("intermediate_size"), ffn_bias=ffn_bias)


# ---------------------------------------------------------------------------------------------- families


def _llama(config: Fields, name: str) -> Architecture:
    bias = config.flag("attention_bias", False)
    attention = _grouped(config, qkv_bias=bias, out_bias=bias)
    return _dense(config, name, attention, ffn_bias=config.flag("mlp_bias", False))


def _mistral(config: Fields, name: str) -> Architecture:
    return _dense(config, name, _grouped(config, window=True))


def _qwen2(config: Fields, name: str) -> Architecture:
    return _dense(config, name, _grouped(config, qkv_bias=True))


def _qwen3(config: Fields, name: str) -> Architecture:
    bias = config.flag("attention_bias", False)
    return _dense(config, name, _grouped(config, qkv_bias=bias, out_bias=bias, norm="head"))


def _mixtral(config: Fields, name: str) -> Architecture:
    routed = _routed(config, config.size("intermediate_size"))
    return _base(config, name, _grouped(config, window=True), routed=routed, moe_layers=_every_layer(config))


def _olmoe(config: Fields, name: str) -> Architecture:
    bias = config.flag("attention_bias", False)
    attention = _grouped(config, qkv_bias=bias, out_bias=bias, norm="full")
    routed = _routed(config, config.size("intermediate_size"))
    return _base(config, name, attention, routed=routed, moe_layers=_every_layer(config))


def _granite(config: Fields, name: str) -> Architecture:
    bias = config.flag("attention_bias", False)
    routed = _routed(config, config.size("intermediate_size"))
    attention = _grouped(config, qkv_bias=bias, out_bias=bias)
    return _base(config, name, attention, routed=routed, moe_layers=_every_layer(config))


def _qwen2_moe(config: Fields, name: str) -> Architecture:
    shared = config.size("shared_expert_intermediate_size")
    routed = _routed(config, config.size("moe_intermediate_size"), shared_dim=shared, shared_gate=True)
    attention = _grouped(config, qkv_bias=config.flag("qkv_bias", True))
    return _qwen_layers(config, name, attention, routed)


def _qwen3_moe(config: Fields, name: str) -> Architecture:
    bias = config.flag("attention_bias", False)
    attention = _grouped(config, qkv_bias=bias, out_bias=bias, norm="head")
    return _qwen_layers(config, name, attention, _routed(config, config.size("moe_intermediate_size")))


def _qwen_layers(config: Fields, name: str, attention: GroupedQuery, routed: Routed) -> Architecture:
    hidden_dim = config.size("intermediate_size", default=routed.hidden_dim)
    layers = _sparse_step(config)
    return _base(config, name, attention, hidden_dim=hidden_dim, routed=routed if layers else None, moe_layers=layers)


def _deepseek(config: Fields, name: str, router_biases: int) -> Architecture:
    hidden_dim = config.size("moe_intermediate_size")
    groups = config.size("n_group", default=1)
    routed = _routed(
        config,
        hidden_dim,
        router_biases=router_biases,
        shared_dim=config.size("n_shared_experts", default=0, least=0) * hidden_dim,
        groups=groups,
        top_groups=config.size("topk_group", default=groups),
    )
    layers = _after_first(config)
    return _base(
        config,
        name,
        _latent(config),
        hidden_dim=config.size("intermediate_size"),
        routed=routed if layers else None,
        moe_layers=layers,
    )


def _deepseek_v2(config: Fields, name: str) -> Architecture:
    return _deepseek(config, name, 0)


def _deepseek_v3(config: Fields, name: str) -> Architecture:
    return _deepseek(config, name, 1)  # of selection; transformers keeps it as a buffer, checkpoints have it


def _glm4_moe(config: Fields, name: str) -> Architecture:
    hidden_dim = config.size("moe_intermediate_size")
    shared = config.size("n_shared_experts", default=0, least=0) * hidden_dim
    norm: Norm = "head" if config.flag("use_qk_norm", False) else "none"
    layers = _after_first(config)
    routed = _routed(config, hidden_dim, router_biases=1, shared_dim=shared)
    return _base(
        config,
        name,
        _grouped(config, qkv_bias=config.flag("attention_bias", False), norm=norm),
        hidden_dim=config.size("intermediate_size"),
        routed=routed if layers else None,
        moe_layers=layers,
    )


def _gpt_oss(config: Fields, name: str) -> Architecture:
    plain = _grouped(config)
    kinds = config.words("layer_types")
    layers = config.size("num_hidden_layers")
    windowed = kinds.count("sliding_attention") if kinds is not None else (layers + 1) // 2
    bias = config.flag("attention_bias", True)
    attention = GroupedQuery(
        heads=plain.heads,
        kv_heads=plain.kv_heads,
        head_dim=plain.head_dim,
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
        windowed=windowed if config.has("sliding_window") else 0,
        window=config.size("sliding_window", default=0, least=0),
    )
    routed = _routed(config, config.size("intermediate_size"), router_biases=1, biases=True)
    return _base(config, name, attention, routed=routed, moe_layers=_every_layer(config))


def _llama4(config: Fields, name: str) -> Architecture:
    bias = config.flag("attention_bias", False)
    plain, layers = _grouped(config, qkv_bias=bias, out_bias=bias), config.size("num_hidden_layers")
    kinds, every = config.words("layer_types"), config.size("no_rope_layer_interval", default=4)
    windowed = kinds.count("chunked_attention") if kinds is not None else layers - layers // every
    attention = GroupedQuery(
        heads=plain.heads,
        kv_heads=plain.kv_heads,
        head_dim=plain.head_dim,
        qkv_bias=bias,
        out_bias=bias,
        windowed=windowed if config.has("attention_chunk_size") else 0,
        window=config.size("attention_chunk_size", default=0, least=0),
    )
    moe_layers = config.numbers("moe_layers")
    if moe_layers is None:
        step = config.size("interleave_moe_layer_step", default=1)
        moe_layers = tuple(range(step - 1, layers, step))
    hidden_dim = config.size("intermediate_size")
    return _base(
        config,
        name,
        attention,
        hidden_dim=config.size("intermediate_size_mlp"),
        routed=_routed(config, hidden_dim, shared_dim=hidden_dim) if moe_layers else None,
        moe_layers=moe_layers,
    )


def _dbrx(config: Fields, name: str) -> Architecture:
    dim, heads, layers = config.size("d_model"), config.size("n_heads"), config.size("n_layers")
    attention, feed_forward = config.part("attn_config"), config.part("ffn_config")
    if dim % heads:
        raise ValueError(f"{config.source}: n_heads: expected a divisor of d_model = {dim}, got {heads}")
    num = feed_forward.size("moe_num_experts")
    routed = Routed(
        num=num,
        k=feed_forward.size("moe_top_k"),
        hidden_dim=feed_forward.size("ffn_hidden_size"),
        router_parameters=num * dim,
    )
    return Architecture(
        name=name,
        vocab=config.size("vocab_size"),
        dim=dim,
        layers=layers,
        attention=GroupedQuery(heads=heads, kv_heads=attention.size("kv_n_heads"), head_dim=dim // heads),
        routed=routed,
        moe_layers=tuple(range(layers)),
        tied=config.flag("tie_word_embeddings", False),
        context=config.size("max_seq_len") if config.has("max_seq_len") else None,
    )


def _phimoe(config: Fields, name: str) -> Architecture:
    bias = config.flag("attention_bias", False)
    routed = _routed(config, config.size("intermediate_size"))
    attention = _grouped(config, qkv_bias=bias, out_bias=bias, window=True)
    head_bias = config.flag("lm_head_bias", False)
    layers = _every_layer(config)
    return _base(config, name, attention, routed=routed, moe_layers=layers, norm_size=2, head_bias=head_bias)


def _minimax_m2(config: Fields, name: str) -> Architecture:
    norm: Norm = "full" if config.flag("use_qk_norm", True) else "none"
    routed = _routed(config, config.size("intermediate_size"), router_biases=1)
    return _base(config, name, _grouped(config, norm=norm), routed=routed, moe_layers=_every_layer(config))


READERS: dict[str, Callable[[Fields, str], Architecture]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "granitemoe": _granite,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
    "llama4_text": _llama4,
    "dbrx": _dbrx,
    "phimoe": _phimoe,
    "minimax_m2": _minimax_m2,
}
