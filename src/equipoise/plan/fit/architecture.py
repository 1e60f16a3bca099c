"""The sizes of a decoder language model that parameters, memory and communication follow from.

Nothing here knows where the sizes came from: `known.py` has a table of published models, `hugging_face.py` and
`decoder_file.py` read configuration files.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

MOST = 10**9  # of any one size: what is larger is a damaged file, and its parameters mean nothing
MOST_LAYERS = 100_000


@dataclass(frozen=True, kw_only=True)
class GroupedQuery:
    """Attention whose query heads share key/value heads; multi-head where kv_heads = heads.

    qkv_bias, out_bias: of the projections. sinks: a learned logit per head that takes attention away (gpt-oss).
    norm: RMS norm of queries and keys, per "head", or over all heads together ("full").
    windowed: layers that see the last `window` tokens only, and cache no more.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False
    norm: Literal["none", "head", "full"] = "none"
    windowed: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, "heads", "kv_heads", "head_dim")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: expected a divisor of heads = {self.heads}, got {self.kv_heads}; each key/value head "
                "serves the same number of query heads"
            )

    @property
    def query_dim(self) -> int:
        """Of all query heads."""
        return self.heads * self.head_dim

    @property
    def cached(self) -> int:
        """Elements per token and layer in the key/value cache."""
        return 2 * self.kv_heads * self.head_dim

    def parameters(self, dim: int) -> int:
        """Of one layer."""
        q, kv = self.query_dim, self.kv_heads * self.head_dim
        norm = {"none": 0, "head": 2 * self.head_dim, "full": q + kv}[self.norm]
        biases = (
            (q + 2 * kv if self.qkv_bias else 0) + (dim if self.out_bias else 0) + (self.heads if self.sinks else 0)
        )
        return 2 * dim * (q + kv) + norm + biases


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are made of one cached vector.

    q_rank: of the queries' bottleneck, 0 without. kv_rank: of the cached vector, beside which rope_dim are cached.
    bias: on the projections into the bottlenecks and out of the heads.
    """

    heads: int
    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    bias: bool = False
    windowed: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, "heads", "kv_rank", "nope_dim", "rope_dim", "value_dim")
        if self.q_rank:
            check_sizes(self, "q_rank")

    @property
    def query_dim(self) -> int:
        """Of all query heads."""
        return self.heads * (self.nope_dim + self.rope_dim)

    @property
    def cached(self) -> int:
        """Elements per token and layer: the latent vector and the part with positions, for all heads together."""
        return self.kv_rank + self.rope_dim

    def parameters(self, dim: int) -> int:
        """Of one layer."""
        into = dim * self.q_rank + self.q_rank + self.q_rank * self.query_dim if self.q_rank else dim * self.query_dim
        latent = dim * self.cached + self.kv_rank + self.kv_rank * self.heads * (self.nope_dim + self.value_dim)
        biases = (self.q_rank + self.cached + dim) if self.bias else 0
        return into + latent + self.heads * self.value_dim * dim + biases


@dataclass(frozen=True, kw_only=True)
class Routed:
    """The MoE layers, all alike but for their routers. num: E. k: of a token. hidden_dim: F, of each expert.

    shared_dim: hidden width of what every token uses besides, 0 for nothing. shared_gate: one output per token on it.
    biases: of the experts. router_parameters: of one router, the selection bias that a checkpoint keeps included.
    first_layers, first_k, first_router: the first so many MoE layers route otherwise (hash routing).
    groups, top_groups: a token's experts lie in so many of so many groups; 1, 1 is no limit.
    """

    num: int
    k: int
    hidden_dim: int
    router_parameters: int
    shared_dim: int = 0
    shared_gate: bool = False
    biases: bool = False
    first_layers: int = 0
    first_k: int = 0
    first_router: int = 0
    groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        check_sizes(self, "num", "k", "hidden_dim")
        if max(self.k, self.first_k) > self.num:
            raise ValueError(
                f"k: expected at most the {self.num} experts, got {max(self.k, self.first_k)} per token; check the "
                "configuration, the two contradict each other"
            )
        if not 1 <= self.top_groups <= self.groups:
            raise ValueError(
                f"top_groups: expected 1 to groups = {self.groups}, got {self.top_groups}; check the configuration"
            )


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder. moe_layers: ascending numbers of the layers with experts; the others are dense, of hidden_dim.

    gated: feed-forward parts and experts have three matrices, not two. norm_size: parameters of a norm over dim in
    units of dim: 1, or 2 with a bias. positions: learned ones. context: the longest that it was made for.
    Raises ValueError for sizes that are absurd or contradict each other.
    """

    name: str
    vocab: int
    dim: int
    layers: int
    attention: GroupedQuery | Latent
    hidden_dim: int = 0
    routed: Routed | None = None
    moe_layers: tuple[int, ...] = ()
    gated: bool = True
    ffn_bias: bool = False
    norm_size: int = 1
    tied: bool = False
    head_bias: bool = False
    positions: int = 0
    context: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "vocab", "dim", "layers")
        if self.layers > MOST_LAYERS:
            raise ValueError(f"layers: expected at most {MOST_LAYERS}, got {self.layers}; the file may be damaged")
        if self.num_dense:
            check_sizes(self, "hidden_dim")
        if bool(self.moe_layers) != (self.routed is not None):
            raise ValueError(
                f"moe_layers: expected some together with experts, and none without, got {len(self.moe_layers)}; "
                "check which layers the configuration says are dense"
            )
        if self.moe_layers and not 0 <= self.moe_layers[0] <= self.moe_layers[-1] < self.layers:
            raise ValueError(
                f"moe_layers: expected numbers below layers = {self.layers}, got {self.moe_layers[0]} to "
                f"{self.moe_layers[-1]}; check the configuration"
            )
        if not 0 <= self.attention.windowed <= self.layers:
            raise ValueError(
                f"windowed: expected at most layers = {self.layers} with a window, got {self.attention.windowed}; "
                "check the configuration"
            )

    @property
    def num_moe(self) -> int:
        """Layers with experts."""
        return len(self.moe_layers)

    @property
    def num_dense(self) -> int:
        """Layers without."""
        return self.layers - self.num_moe

    @property
    def matrices(self) -> int:
        """Of a feed-forward part or an expert."""
        return 3 if self.gated else 2

    def feed_forward(self, hidden_dim: int, bias: bool) -> int:
        """Parameters of a feed-forward part, or of one expert."""
        return self.matrices * self.dim * hidden_dim + ((self.matrices - 1) * hidden_dim + self.dim if bias else 0)


def check_sizes(config: Any, *names: str) -> None:
    """Raise ValueError for a size that is no whole number from 1 to a billion."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value != int(value):
            raise ValueError(f"{name}: expected a whole number, got {value!r}; check the configuration")
        if not 1 <= value <= MOST:
            raise ValueError(f"{name}: expected 1 to {MOST:,}, got {value}; check the configuration")
