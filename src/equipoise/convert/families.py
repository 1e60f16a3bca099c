"""The families of checkpoints: for each, its configuration as one of ours and back, and where its tensors are.

A family fits a configuration of ours when what it writes reads back as the same model; so nothing is lost unsaid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from equipoise.convert import layouts
from equipoise.convert.essence import essence
from equipoise.convert.fields import ConversionError, Raw, Unfit, common, common_fields, number, real, refuse
from equipoise.convert.layouts import Layout
from equipoise.convert.parts import Part
from equipoise.models.config import DecoderConfig, Latent, MoEConfig
from equipoise.routing import BiasBalance, TopK

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint.

    read: its `config.json` as ours; raises ConversionError for what we don't compute. write: ours as its `config.json`;
    raises Unfit. parts: where each tensor of an MoE layer is, given (config, layer, layout).
    """

    name: str
    read: Callable[[Raw], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    moe_parts: Callable[[DecoderConfig, int, Layout], Iterator[Part]]

    def parts(self, config: DecoderConfig, layout: Layout) -> list[Part]:
        """All tensors of the checkpoint."""
        found = list(layouts.around(config))
        for layer in range(config.num_layers):
            found += layouts.attention(config, layer)
            if layer in config.moe_layer_ids:
                found += self.moe_parts(config, layer, layout)
            else:
                found += layouts.feed_forward(f"model.layers.{layer}.mlp", f"layers.{layer}.mlp", config.hidden_dim)
        return found

    def why_not(self, config: DecoderConfig) -> str | None:
        """Why a model of ours can't be this family's; None if it can."""
        try:
            again = self.read(self.write(config))
        except (Unfit, ConversionError) as reason:
            return str(reason)
        wanted, got = essence(config), essence(again)
        differing = sorted(name for name in wanted if wanted[name] != got[name])
        return f"it would lose {', '.join(f'{n}={wanted[n]!r}' for n in differing)}" if differing else None


def _moe_of(config: DecoderConfig) -> tuple[MoEConfig, TopK]:
    if config.moe is None:
        raise Unfit("it has no MoE layers")
    if not isinstance(config.moe.router, TopK):
        raise Unfit(f"its router is {type(config.moe.router).__name__}, the family's is TopK")
    return config.moe, config.moe.router


def _sparse(raw: Raw, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The MoE layers of Qwen's files."""
    step, without = number(raw, "decoder_sparse_step", 1), set(raw.get("mlp_only_layers") or ())
    return tuple(i for i in range(config["num_layers"]) if (i + 1) % step == 0 and i not in without)


def _sparse_fields(config: DecoderConfig) -> dict[str, Any]:
    dense = [layer for layer in range(config.num_layers) if layer not in config.moe_layer_ids]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _standard(prefix: str) -> Callable[[DecoderConfig, int, Layout], Iterator[Part]]:
    """Router and experts, and shared experts under that name."""

    def parts(config: DecoderConfig, layer: int, layout: Layout) -> Iterator[Part]:
        theirs, ours = f"model.layers.{layer}.mlp", f"layers.{layer}.mlp"
        assert config.moe is not None
        yield Part(f"{theirs}.gate.weight", f"{ours}.router.weight")
        yield from layouts.experts(config, f"{theirs}.experts", f"{ours}.experts", layout, GATE_UP_DOWN)
        if config.moe.shared_experts:
            width = config.moe.shared_experts * config.moe.hidden_dim
            yield from layouts.feed_forward(f"{theirs}.{prefix}", f"{ours}.shared", width)
        if config.moe.shared_gate:
            yield Part(f"{theirs}.{prefix}_gate.weight", f"{ours}.shared_gate.weight")

    return parts


# ---------------------------------------------------------------------------------------------- one by one


def _read_llama(raw: Raw) -> DecoderConfig:
    refuse(raw, attention_bias=False, mlp_bias=False)
    return DecoderConfig(**common(raw))


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    if config.moe is not None:
        raise Unfit("it has MoE layers")
    return common_fields(config, "llama", "LlamaForCausalLM") | {"mlp_bias": False}


def _no_moe(config: DecoderConfig, layer: int, layout: Layout) -> Iterator[Part]:
    return iter(())


def _read_mixtral(raw: Raw) -> DecoderConfig:
    shared = common(raw, theta=1e6)
    window = raw.get("sliding_window")
    moe = MoEConfig(
        num_experts=number(raw, "num_local_experts"),
        hidden_dim=shared["hidden_dim"],
        router=TopK(k=number(raw, "num_experts_per_tok"), renormalize=True),
    )
    return DecoderConfig(**shared, moe=moe, window=None if window is None else number(raw, "sliding_window"))


def _write_mixtral(config: DecoderConfig) -> dict[str, Any]:
    moe, router = _moe_of(config)
    if len(config.moe_layer_ids) < config.num_layers:
        raise Unfit("some of its layers are dense")
    return common_fields(config, "mixtral", "MixtralForCausalLM") | {
        "intermediate_size": moe.hidden_dim,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "sliding_window": config.window,
    }


def _mixtral_parts(config: DecoderConfig, layer: int, layout: Layout) -> Iterator[Part]:
    ours = f"layers.{layer}.mlp"
    theirs = f"model.layers.{layer}." + ("mlp" if layout == "fused" else "block_sparse_moe")
    yield Part(f"{theirs}.gate.weight", f"{ours}.router.weight")
    yield from layouts.experts(config, f"{theirs}.experts", f"{ours}.experts", layout, ("w1", "w3", "w2"))


def _read_olmoe(raw: Raw) -> DecoderConfig:
    refuse(raw, clip_qkv=None, attention_bias=False)
    shared = common(raw)
    moe = MoEConfig(
        num_experts=number(raw, "num_experts"),
        hidden_dim=shared["hidden_dim"],
        router=TopK(k=number(raw, "num_experts_per_tok"), renormalize=bool(raw.get("norm_topk_prob", False))),
    )
    return DecoderConfig(**shared, moe=moe, qk_norm="whole")


def _write_olmoe(config: DecoderConfig) -> dict[str, Any]:
    moe, router = _moe_of(config)
    if len(config.moe_layer_ids) < config.num_layers:
        raise Unfit("some of its layers are dense")
    return common_fields(config, "olmoe", "OlmoeForCausalLM") | {
        "intermediate_size": moe.hidden_dim,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.order == "post" or router.renormalizes,
        "clip_qkv": None,
    }


def _read_qwen3_moe(raw: Raw) -> DecoderConfig:
    refuse(raw, attention_bias=False, use_sliding_window=False)
    shared = common(raw)
    moe = MoEConfig(
        num_experts=number(raw, "num_experts", raw.get("num_local_experts")),
        hidden_dim=number(raw, "moe_intermediate_size"),
        router=TopK(k=number(raw, "num_experts_per_tok"), renormalize=bool(raw.get("norm_topk_prob", False))),
    )
    return DecoderConfig(**shared, moe=moe, moe_layers=_sparse(raw, shared), qk_norm=True)


def _write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    moe, router = _moe_of(config)
    return (
        common_fields(config, "qwen3_moe", "Qwen3MoeForCausalLM")
        | _sparse_fields(config)
        | {
            "moe_intermediate_size": moe.hidden_dim,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": router.k,
            "norm_topk_prob": router.order == "post" or router.renormalizes,
            "use_sliding_window": False,
        }
    )


def _read_qwen2_moe(raw: Raw) -> DecoderConfig:
    refuse(raw, use_sliding_window=False)
    shared = common(raw)
    width, F = number(raw, "shared_expert_intermediate_size"), number(raw, "moe_intermediate_size")
    if width % F:
        raise ConversionError(
            f"config.json: shared_expert_intermediate_size: expected a multiple of moe_intermediate_size={F}, got "
            f"{width}; shared experts here are as wide as whole experts"
        )
    moe = MoEConfig(
        num_experts=number(raw, "num_experts"),
        hidden_dim=F,
        router=TopK(k=number(raw, "num_experts_per_tok"), renormalize=bool(raw.get("norm_topk_prob", False))),
        shared_experts=width // F,
        shared_gate=True,
    )
    biased = raw.get("qkv_bias", True)
    layers = _sparse(raw, shared)
    return DecoderConfig(**shared, moe=moe, moe_layers=layers, attention_bias="qkv" if biased else "none")


def _write_qwen2_moe(config: DecoderConfig) -> dict[str, Any]:
    moe, router = _moe_of(config)
    if not moe.shared_experts:
        raise Unfit("it has no shared experts")
    return (
        common_fields(config, "qwen2_moe", "Qwen2MoeForCausalLM")
        | _sparse_fields(config)
        | {
            "moe_intermediate_size": moe.hidden_dim,
            "shared_expert_intermediate_size": moe.shared_experts * moe.hidden_dim,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": router.k,
            "norm_topk_prob": router.order == "post" or router.renormalizes,
            "use_sliding_window": False,
            "qkv_bias": config.attention_bias != "none",
        }
    )


def _read_deepseek_v3(raw: Raw) -> DecoderConfig:
    refuse(raw, rope_interleave=True, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    shared = common(raw, head_dim=False)
    shared["num_kv_heads"] = None
    latent = Latent(
        kv_rank=number(raw, "kv_lora_rank"),
        q_rank=None if raw.get("q_lora_rank") is None else number(raw, "q_lora_rank"),
        nope_dim=number(raw, "qk_nope_head_dim"),
        rope_dim=number(raw, "qk_rope_head_dim"),
        value_dim=number(raw, "v_head_dim"),
    )
    router = TopK(
        k=number(raw, "num_experts_per_tok"),
        score="sigmoid",
        renormalize=bool(raw.get("norm_topk_prob", True)),
        scale=real(raw, "routed_scaling_factor", 1.0),
        num_groups=number(raw, "n_group", 1),
        top_groups=number(raw, "topk_group", 1),
    )
    moe = MoEConfig(
        num_experts=number(raw, "n_routed_experts"),
        hidden_dim=number(raw, "moe_intermediate_size"),
        router=router,
        balance=(BiasBalance(),),
        shared_experts=number(raw, "n_shared_experts", 0, least=0),
    )
    first = number(raw, "first_k_dense_replace", 0, least=0)
    layers = tuple(range(first, shared["num_layers"]))
    biased = raw.get("attention_bias")
    return DecoderConfig(
        **shared, moe=moe, moe_layers=layers, latent=latent, attention_bias="qkvo" if biased else "none"
    )


def _write_deepseek_v3(config: DecoderConfig) -> dict[str, Any]:
    moe, router = _moe_of(config)
    latent = config.latent
    if latent is None:
        raise Unfit("its attention has no latent")
    return common_fields(config, "deepseek_v3", "DeepseekV3ForCausalLM") | {
        "num_key_value_heads": config.num_heads,
        "head_dim": latent.rope_dim,
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.q_rank,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "rope_interleave": True,
        "moe_intermediate_size": moe.hidden_dim,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.renormalizes,
        "routed_scaling_factor": router.scale,
        "n_group": router.num_groups,
        "topk_group": router.top_groups,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "first_k_dense_replace": config.num_layers - len(config.moe_layer_ids),
        "num_nextn_predict_layers": 0,
    }


def _deepseek_parts(config: DecoderConfig, layer: int, layout: Layout) -> Iterator[Part]:
    yield from _standard("shared_experts")(config, layer, layout)
    yield Part(f"model.layers.{layer}.mlp.gate.e_score_correction_bias", f"layers.{layer}.mlp.balancer.bias_E")


def _read_gpt_oss(raw: Raw) -> DecoderConfig:
    refuse(raw, swiglu_alpha=1.702, swiglu_limit=7.0)
    if not raw.get("rope_parameters") and not raw.get("rope_scaling"):
        refuse(raw, rope_parameters="those of the checkpoint")
    shared = common(raw, theta=150000.0)
    moe = MoEConfig(
        num_experts=number(raw, "num_local_experts"),
        hidden_dim=shared["hidden_dim"],
        router=TopK(k=number(raw, "num_experts_per_tok"), order="post", linear_bias=True),
        activation="clamped_swiglu",
        expert_bias=True,
    )
    window = None if raw.get("sliding_window") is None else number(raw, "sliding_window")
    kinds = raw.get("layer_types") or ["sliding_attention", "full_attention"] * shared["num_layers"]
    sliding = tuple(i for i, kind in enumerate(kinds[: shared["num_layers"]]) if kind == "sliding_attention")
    return DecoderConfig(
        **shared,
        moe=moe,
        sinks=True,
        window=window,
        window_layers=None if window is None else sliding,
        attention_bias="qkvo" if raw.get("attention_bias", True) else "none",
    )


def _write_gpt_oss(config: DecoderConfig) -> dict[str, Any]:
    moe, router = _moe_of(config)
    kinds = ["full_attention" if config.window_of(i) is None else "sliding_attention" for i in range(config.num_layers)]
    return common_fields(config, "gpt_oss", "GptOssForCausalLM") | {
        "intermediate_size": moe.hidden_dim,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "sliding_window": config.window,
        "layer_types": kinds,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    }


def _gpt_oss_parts(config: DecoderConfig, layer: int, layout: Layout) -> Iterator[Part]:
    theirs, ours = f"model.layers.{layer}.mlp", f"layers.{layer}.mlp"
    yield Part(f"{theirs}.router.weight", f"{ours}.router.weight")
    yield Part(f"{theirs}.router.bias", f"{ours}.router.linear_bias")
    yield from layouts.biased_experts(f"{theirs}.experts", f"{ours}.experts")


FAMILIES: dict[str, Family] = {
    each.name: each
    for each in (
        Family("llama", _read_llama, _write_llama, _no_moe),
        Family("mixtral", _read_mixtral, _write_mixtral, _mixtral_parts),
        Family("olmoe", _read_olmoe, _write_olmoe, _standard("shared_expert")),
        Family("qwen3_moe", _read_qwen3_moe, _write_qwen3_moe, _standard("shared_expert")),
        Family("qwen2_moe", _read_qwen2_moe, _write_qwen2_moe, _standard("shared_expert")),
        Family("deepseek_v3", _read_deepseek_v3, _write_deepseek_v3, _deepseek_parts),
        Family("gpt_oss", _read_gpt_oss, _write_gpt_oss, _gpt_oss_parts),
    )
}


def family_of(raw: Raw) -> Family:
    """The family that a `config.json` names. Raises ConversionError for another, naming ours."""
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConversionError(
            f"config.json: model_type: expected one of {', '.join(FAMILIES)}, got {name!r}; other architectures are "
            "not converted"
        )
    return FAMILIES[name]


def family_for(config: DecoderConfig, name: str | None = None) -> Family:
    """The first family that the model fits, or the named one. Raises ConversionError with each one's reason."""
    tried = [FAMILIES[name]] if name in FAMILIES else list(FAMILIES.values())
    reasons = {each.name: each.why_not(config) for each in tried}
    for each in tried:
        if reasons[each.name] is None:
            return each
    told = "; ".join(f"{family}: {reason}" for family, reason in reasons.items())
    raise ConversionError(f"no family of checkpoints has all that this model does. {told}")
