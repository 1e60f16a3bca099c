"""The decoder's configuration: what can be chosen, whether it fits together, JSON.

Nothing here makes a tensor with data. Strategy objects (router, balancers, capacity) are kept as they are and written
to JSON with their type's name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from equipoise.layer import Capacity, Peer, ZeroExperts
from equipoise.layer.experts import BackendName
from equipoise.models.json_types import decode, encode
from equipoise.models.mamba import Mamba
from equipoise.models.rope import SCALINGS, RopeScaling
from equipoise.ops.activation import Activation
from equipoise.routing import BALANCERS, COEFFICIENTS, LOSSES, ROUTERS, TopK
from equipoise.routing.balancers import BalancerConfig
from equipoise.routing.losses import BalanceLoss
from equipoise.routing.router import RouterConfig

# What a configuration file may name besides the classes below and the scalings of positions.
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
    activation: of the experts and shared experts; None is the model's. expert_bias: both projections of the routed
    experts have one (gpt-oss).
    shortcut_slot: how many sub-blocks after that place the experts are computed; None is half of those that there
    are before the shared experts' end (`SHORTCUT_WINDOW`). It changes when, never what.
    zero_experts: experts that compute nothing, beside the num_experts that do (docs/alternatives.md).
    """

    num_experts: int
    hidden_dim: int
    router: RouterConfig = field(default_factory=TopK)
    balance: tuple[BalanceLoss | BalancerConfig, ...] = ()
    capacity: Capacity | None = None
    shared_experts: int = 0
    shared_gate: bool = False
    activation: Activation | None = None
    expert_bias: bool = False
    backend: BackendName = "auto"
    checkpoint_experts: bool = False
    zero_experts: ZeroExperts | None = None
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
    def num_choices(self) -> int:
        """E + Z: the experts that the router decides over, those that compute nothing included."""
        return self.num_experts + (self.zero_experts.count if self.zero_experts else 0)

    @property
    def expert_slot(self) -> int:
        """What `shortcut_slot` comes to."""
        assert self.shortcut is not None
        return SHORTCUT_WINDOW[self.shortcut] // 2 if self.shortcut_slot is None else self.shortcut_slot


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Attention over a latent (MLA, arXiv 2405.04434 section 2.1).

    kv_rank: width of the latent that keys and values come from. q_rank: of the queries' own; None is without.
    nope_dim, rope_dim: a head's key, the part without and with rotary positions. value_dim: a head's value.
    """

    kv_rank: int
    q_rank: int | None = None
    nope_dim: int
    rope_dim: int
    value_dim: int
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("kv_rank", "nope_dim", "rope_dim", "value_dim"):
            _require_positive(self, name)
        if self.rope_dim % 2 or (self.q_rank is not None and self.q_rank < 1):
            raise ValueError(
                f"latent: expected an even rope_dim and a positive q_rank or None, got {self.rope_dim} and "
                f"{self.q_rank}."
            )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A causal decoder.

    num_kv_heads: key/value heads, shared by groups of query heads; None = num_heads. head_dim: None = dim/num_heads.
    hidden_dim: of the dense feed-forward layers. style: "modern" is RMSNorm, rotary positions and SwiGLU; "gpt2" is
    LayerNorm, learned positions and GELU. moe_layers: the layers with an MoE, ascending; None = every layer.
    qk_norm: RMS-norm queries and keys before the rotation: each head (True, Qwen3), or all heads as one ("whole",
    OLMoE). attention_bias: of the projections to queries, keys and values, and of that of the output. sinks: a learned
    logit per head that takes part in each softmax (gpt-oss). window: in `window_layers` (None: all) a token sees the
    last so many, itself included. latent: attention over a latent, in place of num_kv_heads and head_dim.
    rope_scaling: how positions are stretched to a longer context. mamba: state spaces in place of the attention of
    `mamba_layers` (None: all). peer: single-neuron experts in place of the feed-forward of `peer_layers` (None: all).
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
    qk_norm: bool | Literal["whole"] = False
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    sinks: bool = False
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    latent: Latent | None = None
    rope_scaling: RopeScaling | None = None
    mamba: Mamba | None = None
    mamba_layers: tuple[int, ...] | None = None
    peer: Peer | None = None
    peer_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "hidden_dim", "max_seq_len"):
            _require_positive(self, name)
        if self.style not in ("modern", "gpt2"):
            raise ValueError(f"style: expected 'modern' or 'gpt2', got {self.style!r}. Choose one of the two.")
        _check_heads(self)
        _check_attention(self)
        _check_moe_layers(self)
        _check_layers(self, "mamba")
        _check_layers(self, "peer")
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
    def rope_dim(self) -> int:
        """Width of what is rotated in a head."""
        return self.head_size if self.latent is None else self.latent.rope_dim

    @property
    def cache_shape(self) -> tuple[int, int]:
        """(heads, width) of what a cache keeps per token, once for keys and once for values."""
        if self.latent is not None:
            return 1, self.latent.kv_rank + self.latent.rope_dim
        return self.kv_heads, self.head_size

    def window_of(self, layer: int) -> int | None:
        """How many tokens that layer's attention sees; None is all."""
        return self.window if self.window_layers is None or layer in self.window_layers else None

    @property
    def mamba_layer_ids(self) -> tuple[int, ...]:
        """The layers with a state space in place of attention, ascending."""
        return _layer_ids(self, "mamba")

    @property
    def peer_layer_ids(self) -> tuple[int, ...]:
        """The layers with single-neuron experts, ascending."""
        return _layer_ids(self, "peer")

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """The layers with an MoE, ascending; empty for a dense model."""
        return _layer_ids(self, "moe")

    def moe_router(self, number: int) -> RouterConfig:
        """The router of the MoE layer with that number, counted from 0 among the MoE layers."""
        assert self.moe is not None
        return self.moe.first_router if self.moe.first_router and number < self.moe.first_layers else self.moe.router

    @property
    def activation(self) -> Activation:
        """Of the feed-forward layers, and of the experts that name none."""
        return "gelu" if self.style == "gpt2" else "swiglu"

    @property
    def expert_activation(self) -> Activation:
        """Of the experts."""
        return (self.moe.activation if self.moe else None) or self.activation

    def to_json(self) -> str:
        """The configuration as JSON text. Each nested object carries its type's name."""
        return json.dumps(encode(self, _known_types()), indent=2)

    @staticmethod
    def from_json(text: str) -> DecoderConfig:
        """The configuration that `to_json` wrote. Raises ValueError for an unknown type, field or structure."""
        config = decode(json.loads(text), _known_types())
        if not isinstance(config, DecoderConfig):
            raise ValueError(
                f"config: expected a JSON object of type 'DecoderConfig', got {type(config).__name__}. "
                "Pass what DecoderConfig.to_json wrote."
            )
        return config


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
    if config.latent is not None:
        return
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


def _check_attention(config: DecoderConfig) -> None:
    if config.qk_norm not in (False, True, "whole") or config.attention_bias not in ("none", "qkv", "qkvo"):
        raise ValueError(
            f"qk_norm: expected False, True or 'whole', got {config.qk_norm!r}; attention_bias: expected 'none', 'qkv' "
            f"or 'qkvo', got {config.attention_bias!r}."
        )
    if config.window is not None and config.window < 1:
        raise ValueError(f"window: expected at least 1 token, or None for all, got {config.window}.")
    if config.window_layers is not None and config.window is None:
        raise ValueError(f"window_layers: expected None without a window, got {config.window_layers}. Set window too.")
    if config.style == "gpt2" and (config.latent or config.rope_scaling):
        raise ValueError("latent, rope_scaling: expected None with style='gpt2', which has no rotary positions.")
    if config.latent and (config.num_kv_heads or config.head_dim or config.qk_norm or config.sinks or config.window):
        raise ValueError(
            "latent: expected neither num_kv_heads, head_dim, qk_norm, sinks nor window with it, got at least one. The "
            "latent says how wide heads are, and all share its keys; leave them out."
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
    if both := sorted(set(ids) & set(config.peer_layer_ids)):
        raise ValueError(
            f"peer_layers: expected other layers than those with an MoE, got {both} for both. Set moe_layers and "
            "peer_layers apart: a block has one feed-forward part."
        )
    if config.moe is not None and config.moe.shortcut in ("pos2", "pos3"):
        bare = [layer for layer in ids if layer == 0 or layer - 1 in ids]
        if bare:
            raise ValueError(
                f"shortcut: expected a dense layer before each MoE layer for {config.moe.shortcut}, got none before "
                f"{bare}. Set moe_layers, such as every second one (1, 3, ...), or take pos1."
            )
    _check_layers(config, "moe")


def _layer_ids(config: DecoderConfig, kind: str) -> tuple[int, ...]:
    """The layers that have this kind of part: those of the field `<kind>_layers`, None being all."""
    if getattr(config, kind) is None:
        return ()
    layers: tuple[int, ...] | None = getattr(config, f"{kind}_layers")
    return tuple(range(config.num_layers)) if layers is None else layers


def _check_layers(config: DecoderConfig, kind: str) -> None:
    layers, part = getattr(config, f"{kind}_layers"), getattr(config, kind)
    if layers is None:
        return
    if part is None:
        name = {"moe": "MoEConfig", "mamba": "Mamba", "peer": "Peer"}[kind]
        raise ValueError(f"{kind}_layers: expected None without {kind}, got {layers}. Set {kind}={name}(...) as well.")
    if list(layers) != sorted(set(layers)) or (layers and not 0 <= layers[0] <= layers[-1] < config.num_layers):
        raise ValueError(
            f"{kind}_layers: expected ascending layer numbers in [0, num_layers={config.num_layers}), got {layers}. "
            "Number the layers from 0, each once."
        )


# ---------------------------------------------------------------------------------------------- JSON


def _known_types() -> tuple[type[Any], ...]:
    """The whole list of what a configuration file may name."""
    return (DecoderConfig, MoEConfig, Latent, Mamba, Peer, ZeroExperts, *SCALINGS, *STRATEGIES)
