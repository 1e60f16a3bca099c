"""The decoder's configuration: what can be chosen, whether it fits together, how many parameters it makes, JSON.

Nothing here makes a tensor with data. Strategy objects (router, balancers, capacity) are kept as they are and written
to JSON with their type's name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

import torch

from equipoise.layer import Capacity
from equipoise.layer.experts import BackendName
from equipoise.routing import BALANCERS, COEFFICIENTS, LOSSES, ROUTERS, TopK
from equipoise.routing.balancers import BalancerConfig
from equipoise.routing.losses import BalanceLoss
from equipoise.routing.router import RouterConfig

# What a configuration file may name besides the two classes below.
STRATEGIES: tuple[type[Any], ...] = (*ROUTERS, *LOSSES, *BALANCERS, *COEFFICIENTS, Capacity)

ShortcutName = Literal["pos1", "pos2", "pos3"]
# Sub-blocks behind which the communication of a shortcut can hide, from the one whose input the experts share to the
# shared experts: the last 2, 3 or 4 of attention, MLP (dense block), attention, shared experts (MoE block).
SHORTCUT_WINDOW: dict[ShortcutName, int] = {"pos1": 2, "pos2": 3, "pos3": 4}


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The MoE layers of a decoder; all of them are alike. The fields are those of `equipoise.layer.MoE`.

    checkpoint_experts: keep only the layer's input in training and compute the layer again in backward.
    first_layers, first_router: the first MoE layers, so many, take this router instead, without `balance`; as
    DeepSeek-V4 begins with hash routing.
    shortcut: the routed experts read an earlier stream than the shared experts (ScMoE, docs/scmoe.md). "pos1": the
    input of the MoE's block. "pos2", "pos3": the post-attention stream, or the input, of the block before it, which
    must be dense. They read it as the sub-block at that place does, through its norm: there are no parameters more.
    shortcut_slot: how many sub-blocks after that place the experts are computed; None is half of those that there
    are before the shared experts' end (`SHORTCUT_WINDOW`). It changes when, never what.
    """

    num_experts: int
    hidden_dim: int
    router: RouterConfig = field(default_factory=TopK)
    balance: tuple[BalanceLoss | BalancerConfig, ...] = ()
    capacity: Capacity | None = None
    shared_experts: int = 0
    shared_gate: bool = False
    backend: BackendName = "auto"
    checkpoint_experts: bool = False
    first_layers: int = 0
    first_router: RouterConfig | None = None
    shortcut: ShortcutName | None = None
    shortcut_slot: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_experts", "hidden_dim"):
            _require_positive(self, name)
        if self.first_layers < 0 or (self.first_layers > 0) != (self.first_router is not None):
            raise ValueError(
                f"first_layers: expected 0, or 1 and more together with first_router, got {self.first_layers} with "
                f"first_router={self.first_router}. Set both, or none."
            )
        if self.shared_experts < 0 or (self.shared_gate and not self.shared_experts):
            raise ValueError(
                f"shared_experts: expected 0 or more, and at least 1 with shared_gate, got {self.shared_experts}. "
                "Set MoEConfig.shared_experts, or leave shared_gate off."
            )
        _check_shortcut(self)

    @property
    def expert_slot(self) -> int:
        """What `shortcut_slot` comes to."""
        assert self.shortcut is not None
        return SHORTCUT_WINDOW[self.shortcut] // 2 if self.shortcut_slot is None else self.shortcut_slot


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A causal decoder.

    num_kv_heads: key/value heads, shared by groups of query heads; None = num_heads. head_dim: None = dim/num_heads.
    hidden_dim: of the dense feed-forward layers. style: "modern" is RMSNorm, rotary positions and SwiGLU; "gpt2" is
    LayerNorm, learned positions and GELU. moe_layers: the layers with an MoE, ascending; None = every layer.
    qk_norm: RMS-norm each query and key head before the rotation.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    hidden_dim: int
    max_seq_len: int
    style: Literal["modern", "gpt2"] = "modern"
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    moe: MoEConfig | None = None
    moe_layers: tuple[int, ...] | None = None
    init_std: float = 0.02
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "hidden_dim", "max_seq_len"):
            _require_positive(self, name)
        if self.style not in ("modern", "gpt2"):
            raise ValueError(f"style: expected 'modern' or 'gpt2', got {self.style!r}. Choose one of the two.")
        _check_heads(self)
        _check_moe_layers(self)
        _check_routers(self)

    @property
    def kv_heads(self) -> int:
        """Key/value heads per layer."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """The layers with an MoE, ascending; empty for a dense model."""
        if self.moe is None:
            return ()
        return tuple(range(self.num_layers)) if self.moe_layers is None else self.moe_layers

    def moe_router(self, number: int) -> RouterConfig:
        """The router of the MoE layer with that number, counted from 0 among the MoE layers."""
        assert self.moe is not None
        return self.moe.first_router if self.moe.first_router and number < self.moe.first_layers else self.moe.router

    @property
    def activation(self) -> Literal["swiglu", "gelu"]:
        """Of the feed-forward layers and experts."""
        return "gelu" if self.style == "gpt2" else "swiglu"

    def to_json(self) -> str:
        """The configuration as JSON text. Each nested object carries its type's name."""
        return json.dumps(_encode(self), indent=2)

    @staticmethod
    def from_json(text: str) -> DecoderConfig:
        """The configuration that `to_json` wrote. Raises ValueError for an unknown type, field or structure."""
        config = _decode(json.loads(text))
        if not isinstance(config, DecoderConfig):
            raise ValueError(
                f"config: expected a JSON object of type 'DecoderConfig', got {type(config).__name__}. "
                "Pass what DecoderConfig.to_json wrote."
            )
        return config


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part; the parts add up to `total`.

    active: those that one token uses, its row of the embedding counted as the whole table; subtract `embedding` for
    the other convention. experts: routed experts, all of them. head: 0 when tied to the embedding.
    """

    total: int
    active: int
    embedding: int
    attention: int
    dense: int
    experts: int
    shared: int
    router: int
    norm: int
    head: int


def parameter_counts(config: DecoderConfig) -> ParameterCounts:
    """Count the parameters of a decoder by arithmetic alone.

    With V vocabulary, D dim, L layers, h and kv heads of width d, E experts of which a token uses k:

        embedding  V D (+ max_seq_len D for learned positions)
        attention  L (2 D h d + 2 D kv d (+ 2 d for qk_norm))
        ffn(F)     3 D F for SwiGLU, 2 D F for GELU
        dense      ffn(hidden_dim) per layer without an MoE
        experts    E ffn(moe.hidden_dim) per MoE layer; active: k instead of E
        shared     ffn(shared_experts moe.hidden_dim) (+ D with a gate) per MoE layer
        router     E D per MoE layer for a linear router; others say themselves
        norm       (2 L + 1) D, twice that for LayerNorm, which has a bias
        head       0 if tied, else V D
    """
    D, L, head = config.dim, config.num_layers, config.head_size
    num_moe = len(config.moe_layer_ids)
    matrices = 3 if config.activation == "swiglu" else 2
    experts = shared = router = active_experts = 0
    if config.moe is not None:
        per_expert = matrices * D * config.moe.hidden_dim
        experts = num_moe * config.moe.num_experts * per_expert
        routers = [config.moe_router(number) for number in range(num_moe)]
        active_experts = sum(each.k for each in routers) * per_expert
        shared = num_moe * (config.moe.shared_experts * per_expert + (D if config.moe.shared_gate else 0))
        router = sum(_router_parameters(each, D, config.moe.num_experts) for each in routers)
    parts = {
        "embedding": (config.vocab_size + (config.max_seq_len if config.style == "gpt2" else 0)) * D,
        "attention": L * (2 * D * head * (config.num_heads + config.kv_heads) + (2 * head if config.qk_norm else 0)),
        "dense": (L - num_moe) * matrices * D * config.hidden_dim,
        "experts": experts,
        "shared": shared,
        "router": router,
        "norm": (2 * L + 1) * D * (2 if config.style == "gpt2" else 1),
        "head": 0 if config.tie_embeddings else config.vocab_size * D,
    }
    total = sum(parts.values())
    return ParameterCounts(total=total, active=total - experts + active_experts, **parts)


def _router_parameters(router: RouterConfig, dim: int, num_experts: int) -> int:
    with torch.device("meta"):  # shapes only
        return sum(parameter.numel() for parameter in router.build(dim, num_experts).parameters())


# ---------------------------------------------------------------------------------------------- validation


def _require_positive(config: object, name: str) -> None:
    value = getattr(config, name)
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}. Set {type(config).__name__}.{name}.")


def _check_shortcut(moe: MoEConfig) -> None:
    if moe.shortcut is None:
        if moe.shortcut_slot is not None:
            raise ValueError(
                f"shortcut_slot: expected None without a shortcut, got {moe.shortcut_slot}. Set MoEConfig.shortcut too."
            )
        return
    if moe.shortcut not in SHORTCUT_WINDOW:
        raise ValueError(f"shortcut: expected None or one of {', '.join(SHORTCUT_WINDOW)}, got {moe.shortcut!r}.")
    window = SHORTCUT_WINDOW[moe.shortcut]
    if not 0 <= moe.expert_slot < window:
        raise ValueError(
            f"shortcut_slot: expected 0 to {window - 1} for {moe.shortcut}, got {moe.shortcut_slot}. None is half-way."
        )
    if not moe.shared_experts:
        raise ValueError(
            "shared_experts: expected at least 1 with a shortcut, got 0. The MoE's own stream would have no "
            "feed-forward part: set shared_experts=1, and one expert less per token for the same arithmetic."
        )
    if moe.capacity is not None and moe.capacity.overflow == "shared":
        raise ValueError(
            'capacity: expected overflow "drop" or "next_choice" with a shortcut, got "shared". The shared expert '
            "reads another stream than the experts for which it would stand in."
        )
    if moe.checkpoint_experts:
        raise ValueError(
            "checkpoint_experts: expected False with a shortcut, got True. Dispatch and experts are apart, with other "
            "sub-blocks between, and can't be recomputed as one; use smaller micro-batches."
        )


def _check_heads(config: DecoderConfig) -> None:
    if config.head_dim is None and config.dim % config.num_heads:
        raise ValueError(
            f"num_heads: expected a divisor of dim={config.dim}, got {config.num_heads}. "
            "Choose another number of heads, or set head_dim."
        )
    if config.kv_heads < 1 or config.num_heads % config.kv_heads:
        raise ValueError(
            f"num_kv_heads: expected a divisor of num_heads={config.num_heads}, got {config.num_kv_heads}. "
            "Each key/value head serves the same number of query heads."
        )
    if config.head_size < 1 or (config.style == "modern" and config.head_size % 2):
        raise ValueError(
            f"head_dim: expected a positive even number, got {config.head_size}. "
            "Rotary positions turn pairs: change dim, num_heads or head_dim, or use style='gpt2'."
        )


def _check_routers(config: DecoderConfig) -> None:
    """A router that looks at later tokens teaches a causal model from what it will not have when it generates."""
    for router in (config.moe.router, config.moe.first_router) if config.moe else ():
        if router is None:
            continue
        known = router.traits.num_token_ids
        if known is not None and known < config.vocab_size:
            raise ValueError(
                f"router: {type(router).__name__}.vocab_size is {known}, fewer than the model's vocab_size = "
                f"{config.vocab_size} token ids. Raise it to that."
            )
        if not router.traits.causal and not router.traits.allow_future:
            raise ValueError(
                f"router: {type(router).__name__} lets a token's experts depend on later tokens, and a decoder is "
                "causal: what it learns from them is missing at generation. Use TopK or Threshold, or accept it with "
                "allow_future=True."
            )


def _check_moe_layers(config: DecoderConfig) -> None:
    ids = config.moe_layer_ids
    if config.moe is not None and config.moe.shortcut in ("pos2", "pos3"):
        bare = [layer for layer in ids if layer == 0 or layer - 1 in ids]
        if bare:
            raise ValueError(
                f"shortcut: expected a dense layer before each MoE layer for {config.moe.shortcut}, got none before "
                f"{bare}. Set moe_layers, such as every second one (1, 3, ...), or take pos1."
            )
    layers = config.moe_layers
    if layers is None:
        return
    if config.moe is None:
        raise ValueError(f"moe_layers: expected None without moe, got {layers}. Set moe=MoEConfig(...) as well.")
    if list(layers) != sorted(set(layers)) or (layers and not 0 <= layers[0] <= layers[-1] < config.num_layers):
        raise ValueError(
            f"moe_layers: expected ascending layer numbers in [0, num_layers={config.num_layers}), got {layers}. "
            "Number the layers from 0, each once."
        )


# ---------------------------------------------------------------------------------------------- JSON


def _encode(value: Any) -> Any:
    """Plain JSON data: a dataclass becomes an object with its type's name, a tuple a list."""
    if is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        _known_type(name)
        return {"type": name} | {each.name: _encode(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"config: expected numbers, strings, tuples and known strategies, got {type(value).__name__}. "
        "Use a strategy object of equipoise, or keep this configuration as Python."
    )


def _decode(data: Any) -> Any:
    """Undo `_encode`. Every strategy's constructor checks its own values."""
    if isinstance(data, list):
        return tuple(_decode(item) for item in data)
    if not isinstance(data, dict):
        return data
    cls = _known_type(data.get("type"))
    names = {each.name for each in fields(cls)}
    values = {name: _decode(value) for name, value in data.items() if name != "type"}
    if unknown := values.keys() - names:
        raise ValueError(
            f"config: {cls.__name__} has no {sorted(unknown)}, expected fields among {sorted(names)}. "
            "The file may come from another version of equipoise."
        )
    return cls(**values)


def _known_type(name: object) -> type[Any]:
    """The class of a type tag. The table is the whole list of what a configuration file may name."""
    known = {cls.__name__: cls for cls in (DecoderConfig, MoEConfig, *STRATEGIES)}
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"config: unknown type {name!r}, expected one of {sorted(known)}. "
            "The file may come from another version of equipoise."
        )
    return known[name]
