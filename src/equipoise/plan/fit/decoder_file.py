"""Architectures from equipoise's own configuration: what `DecoderConfig.to_json` writes, and run folders' config.json.

Read as plain JSON: planning needs no torch. A test compares the counts with `models.parameters.parameter_counts`.
"""

from __future__ import annotations

from collections.abc import Callable

from equipoise.plan.fit.architecture import Architecture, GroupedQuery, Latent, Routed
from equipoise.plan.fit.config_fields import Fields


def _linear(router: Fields, dim: int, num: int) -> int:
    return num * dim + (num if router.flag("linear_bias", False) else 0)


def _noisy(router: Fields, dim: int, num: int) -> int:
    return 2 * num * dim


def _hash(router: Fields, dim: int, num: int) -> int:
    return num * dim if router.text("weights", "equal") == "learned" else 0


def _two_tier(router: Fields, dim: int, num: int) -> int:
    groups = router.size("num_groups") if router.text("first", "learned") == "learned" else 0
    return (num + groups) * dim


# Parameters of each router of `equipoise.routing.ROUTERS`.
ROUTERS: dict[str, Callable[[Fields, int, int], int]] = {
    "TopK": _linear,
    "Switch": _linear,
    "NoisyTopK": _noisy,
    "ExpertChoice": _linear,
    "Threshold": _linear,
    "Sinkhorn": _linear,
    "Hash": _hash,
    "TwoTier": _two_tier,
    "RoundRobin": _linear,
    "ReLURouting": _linear,
}


def architecture(config: Fields, name: str) -> Architecture:
    """Of a JSON object of type DecoderConfig. Raises ValueError for one that is incomplete or contradicts itself."""
    _refuse_unknown(config)
    dim, layers, heads = config.size("dim"), config.size("num_layers"), config.size("num_heads")
    attention = _latent(config, heads) if config.has("latent") else _grouped(config, dim, layers, heads)
    gpt2 = config.text("style", "modern") == "gpt2"
    context = config.size("max_seq_len")
    routed = _routed(config.part("moe"), dim) if config.has("moe") else None
    moe_layers = config.numbers("moe_layers")
    if moe_layers is None:
        moe_layers = tuple(range(layers)) if routed else ()
    return Architecture(
        name=name,
        vocab=config.size("vocab_size"),
        dim=dim,
        layers=layers,
        attention=attention,
        hidden_dim=config.size("hidden_dim"),
        routed=routed if moe_layers else None,
        moe_layers=moe_layers,
        gated=not gpt2,
        norm_size=2 if gpt2 else 1,
        tied=config.flag("tie_embeddings", True),
        positions=context if gpt2 else 0,
        context=context,
    )


def _refuse_unknown(config: Fields) -> None:
    """A plan that leaves a part out is worse than none."""
    unplanned = [name for name in ("mamba", "peer") if config.has(name)]
    if config.has("moe") and config.part("moe").has("zero_experts"):
        unplanned.append("zero_experts")
    if unplanned:
        raise ValueError(
            f"{config.source}: expected attention and experts that compute, got {', '.join(unplanned)}: the planner "
            "has no arithmetic for it. equipoise.models.parameters.parameter_counts says how many parameters there are."
        )


def _grouped(config: Fields, dim: int, layers: int, heads: int) -> GroupedQuery:
    if not config.has("head_dim") and dim % heads:
        raise ValueError(f"{config.source}: num_heads: expected a divisor of dim = {dim}, got {heads}")
    biased = config.text("attention_bias", "none")
    whole = config.values.get("qk_norm") == "whole"
    window = config.size("window", default=0, least=0)
    windowed = config.numbers("window_layers")
    return GroupedQuery(
        heads=heads,
        kv_heads=config.size("num_kv_heads", default=heads),
        head_dim=config.size("head_dim", default=dim // heads),
        qkv_bias=biased != "none",
        out_bias=biased == "qkvo",
        sinks=config.flag("sinks", False),
        norm="full" if whole else "head" if config.flag("qk_norm", False) else "none",
        windowed=(layers if windowed is None else len(windowed)) if window else 0,
        window=window,
    )


def _latent(config: Fields, heads: int) -> Latent:
    latent = config.part("latent")
    return Latent(
        heads=heads,
        q_rank=latent.size("q_rank", default=0, least=0),
        kv_rank=latent.size("kv_rank"),
        nope_dim=latent.size("nope_dim"),
        rope_dim=latent.size("rope_dim"),
        value_dim=latent.size("value_dim"),
        bias=config.text("attention_bias", "none") != "none",
    )


def _routed(config: Fields, dim: int) -> Routed:
    num, hidden_dim = config.size("num_experts"), config.size("hidden_dim")
    k, weights = _router(config.part("router"), dim, num)
    first_layers = config.size("first_layers", default=0, least=0)
    first_k, first_router = _router(config.part("first_router"), dim, num) if first_layers else (0, 0)
    return Routed(
        num=num,
        k=k,
        hidden_dim=hidden_dim,
        router_parameters=weights,
        shared_dim=config.size("shared_experts", default=0, least=0) * hidden_dim,
        shared_gate=config.flag("shared_gate", False),
        biases=config.flag("expert_bias", False),
        first_layers=first_layers,
        first_k=first_k,
        first_router=first_router,
    )


def _router(config: Fields, dim: int, num: int) -> tuple[int, int]:
    """(k, parameters)."""
    kind = config.text("type")
    if kind not in ROUTERS:
        raise ValueError(
            f"{config.source}: type: expected one of {', '.join(ROUTERS)}, got {kind!r}; the file may come from "
            "another version of equipoise"
        )
    return (1 if kind == "Switch" else config.size("k")), ROUTERS[kind](config, dim, num)
