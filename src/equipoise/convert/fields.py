"""Reading and writing the fields of a Hugging Face `config.json` that all families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equipoise.models.config import DecoderConfig
from equipoise.models.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

MOST = 2**24  # of any size in a configuration: above it a file lies


class ConversionError(ValueError):
    """A checkpoint can't be converted. The message says what is wrong where, and what to do."""


class Unfit(Exception):  # noqa: N818 - not an error by itself: the next family may fit
    """This configuration can't be written as this family; says why."""


Raw = Mapping[str, Any]


def number(raw: Raw, name: str, default: int | None = None, *, least: int = 1) -> int:
    """A whole number. Raises ConversionError when it is missing, none, or out of all proportion."""
    value = raw.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
        raise ConversionError(
            f"config.json: {name}: expected a whole number from {least} to {MOST}, got {value!r}; restore the file "
            "that belongs to the weights"
        )
    return value


def real(raw: Raw, name: str, default: float | None = None) -> float:
    """A positive number."""
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConversionError(f"config.json: {name}: expected a positive number, got {value!r}; restore it")
    return float(value)


def refuse(raw: Raw, **only: object) -> None:
    """Raise ConversionError for fields with another value than the one that is supported. Missing ones are fine."""
    for name, value in only.items():
        if raw.get(name, value) != value:
            raise ConversionError(
                f"config.json: {name}: expected {value!r}, got {raw[name]!r}, which this decoder does not compute; "
                "nothing was written"
            )


def common(raw: Raw, *, theta: float = 10000.0, head_dim: bool = True) -> dict[str, Any]:
    """What every family says alike, as arguments of `DecoderConfig`. theta: where the file names none."""
    refuse(raw, hidden_act="silu", partial_rotary_factor=1.0)
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    refuse(rope, partial_rotary_factor=1.0)
    heads = number(raw, "num_attention_heads")
    return {
        "vocab_size": number(raw, "vocab_size"),
        "dim": number(raw, "hidden_size"),
        "num_layers": number(raw, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": number(raw, "num_key_value_heads", heads),
        "head_dim": number(raw, "head_dim", number(raw, "hidden_size") // heads) if head_dim else None,
        "hidden_dim": number(raw, "intermediate_size"),
        "max_seq_len": number(raw, "max_position_embeddings"),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "rope_theta": real(rope, "rope_theta", real(raw, "rope_theta", theta)),
        "rope_scaling": _scaling(rope),
        "norm_eps": real(raw, "rms_norm_eps", 1e-6),
        "init_std": real(raw, "initializer_range", 0.02),
    }


def common_fields(config: DecoderConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The same as a `config.json` says it. Raises Unfit for what none of the families has."""
    if config.style != "modern":
        raise Unfit("style is gpt2; the families have RMSNorm, rotary positions and SwiGLU")
    if config.moe is not None and config.moe.shortcut is not None:
        raise Unfit("its experts are behind a shortcut")
    if config.mamba_layer_ids:
        raise Unfit("some of its layers are Mamba's, without attention")
    if config.peer_layer_ids:
        raise Unfit("some of its layers have single-neuron experts (PEER)")
    if config.moe is not None and config.moe.zero_experts is not None:
        raise Unfit("some of its experts compute nothing (zero_experts)")
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": _scaling_fields(config.rope_scaling) | {"rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias != "none",
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def _scaling(rope: Raw) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=real(rope, "factor"))
    if kind == "llama3":
        return Llama3Scaling(
            factor=real(rope, "factor"),
            low_freq_factor=real(rope, "low_freq_factor"),
            high_freq_factor=real(rope, "high_freq_factor"),
            original_max_seq_len=number(rope, "original_max_position_embeddings"),
        )
    if kind == "yarn":
        return YarnScaling(
            factor=real(rope, "factor"),
            original_max_seq_len=number(rope, "original_max_position_embeddings"),
            beta_fast=real(rope, "beta_fast", 32.0),
            beta_slow=real(rope, "beta_slow", 1.0),
            truncate=bool(rope.get("truncate", True)),
            attention_factor=None if rope.get("attention_factor") is None else real(rope, "attention_factor"),
            mscale=float(rope.get("mscale") or 0.0),
            mscale_all_dim=float(rope.get("mscale_all_dim") or 0.0),
        )
    raise ConversionError(
        f"config.json: rope_type: expected default, linear, llama3 or yarn, got {kind!r}; nothing was written"
    )


def _scaling_fields(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    fields: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
    }
    optional = {name: getattr(scaling, name) for name in ("attention_factor", "mscale", "mscale_all_dim")}
    return fields | {name: value for name, value in optional.items() if value}
