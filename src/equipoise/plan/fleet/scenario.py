"""What a fleet simulation is told: the model, the machines, how requests are batched, the traffic, and the design.

The defaults are the design that the simulation was made for: 100 000 queries per second, 64 experts on 16 GPUs. Where
each number comes from is on docs/fleet.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil, inf
from typing import Any, Literal

from equipoise.plan.links import Cost, Links
from equipoise.types import Placement

Overflow = Literal["shared", "next_choice", "drop"]

EXCHANGE = Cost(10e-6, 43e9)  # of 16 ranks over InfiniBand: seconds, bytes per second and rank
EXPERT = Cost(4e-6, 400e12)  # weights are read in 4 us, then 400 TFLOP/s


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The MoE layers of the model, and what becomes of tokens that find their expert full."""

    num_experts: int = 64
    """E, in each layer."""
    top_k: int = 2
    """K, experts per token."""
    num_layers: int = 16
    """MoE layers."""
    dim: int = 2048
    """Of a token."""
    hidden_dim: int = 1024
    """Of an expert, SwiGLU."""
    bytes_per_element: int = 2
    """Of what is sent, there and back."""
    capacity: float | None = 1.1
    """Factor on the even load, over the tokens of a step; None: experts take all that come."""
    overflow: Overflow = "shared"
    """Where tokens go that find their expert full: to a shared expert on their own rank, to their next choice, or
    nowhere."""

    def __post_init__(self) -> None:
        _at_least_1(self, "num_experts", "top_k", "num_layers", "dim", "hidden_dim", "bytes_per_element")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k: expected at most the {self.num_experts} experts, got {self.top_k}")
        if self.capacity is not None and not self.capacity > 0:
            raise ValueError(f"capacity: expected a factor above 0, or None for no limit, got {self.capacity}")

    @property
    def row_bytes(self) -> int:
        """Of one token on a link."""
        return self.dim * self.bytes_per_element

    @property
    def row_flops(self) -> int:
        """Of one token in one expert: three products."""
        return 6 * self.dim * self.hidden_dim

    def room(self, tokens: int, experts: int) -> int:
        """Rows that each of so many experts takes of so many tokens: ceil(factor T K / E), 1 to T."""
        if self.capacity is None:
            return tokens
        return min(max(ceil(self.capacity * tokens * self.top_k / experts), 1), tokens)


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The ranks and what their work takes.

    link: an exchange between all ranks, by the bytes of the busiest. expert: an expert with rows in a step, by
    floating-point operations. rest_s: per layer, all that is neither. step_s: per step, of the scheduler.
    counts_first: ranks tell each other how many rows come before they send them: one more latency per layer.
    cores: that all ranks compute on together; None: each has its own. spread: of measured steps, in ascending order,
    the seconds by these costs and how many times as long they took; each simulated step takes as many times as long as
    one of those most like it. Without: exactly as long as the costs say.
    """

    ranks: int = 16
    link: Cost = EXCHANGE
    expert: Cost = EXPERT
    rest_s: float = 0.0
    step_s: float = 0.0
    counts_first: bool = False
    cores: int | None = None
    spread: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        _at_least_1(self, "ranks", *["cores"] * (self.cores is not None))
        for name in ("rest_s", "step_s"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name}: expected at least 0 seconds, got {getattr(self, name)}")

    def exchange(self, ranks: int) -> Cost:
        """Between so many ranks: the latency goes with the messages that each sends, the bandwidth stays."""
        return replace(self.link, start_s=self.link.start_s * (ranks - 1) / max(self.ranks - 1, 1))

    @staticmethod
    def measured(links: Links, ranks: int) -> Machines:
        """Of what `equipoise bench links` has measured, for any number of ranks."""
        per_peer = links.all_to_all.start_s / max(links.ranks - 1, 1)
        return Machines(
            ranks=ranks, link=replace(links.all_to_all, start_s=per_peer * (ranks - 1)), expert=links.expert
        )


@dataclass(frozen=True, kw_only=True)
class Batching:
    """When a step begins, and what it takes along.

    A step begins when the ranks are free and the query that waits longest has waited window_s, or max_batch are there.
    """

    window_s: float = 1e-3
    """Seconds that a query may wait for others to come along."""
    max_batch: int = 1024
    """Queries per step and rank."""
    max_waiting: int = 65536
    """Queries that may wait per rank; more are turned away."""

    def __post_init__(self) -> None:
        _at_least_1(self, "max_batch", "max_waiting")
        if not 0 <= self.window_s < inf:
            raise ValueError(f"window_s: expected at least 0 seconds, got {self.window_s}")


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Queries, and which experts they want. Of popularity, 0 is even and 1 is Zipf's law."""

    qps: float = 100_000.0
    """Queries per second, a Poisson process."""
    tokens: int = 1
    """Of each query, all in the same step; 1 is one step of decoding."""
    seconds: float = 1.0
    """Of traffic that are simulated."""
    skew: float = 0.5
    """Zipf exponent of the experts' popularity, in an order of its own in each layer."""
    drift_s: float | None = None
    """Seconds after which each popularity moves on to the next expert; None: never."""
    burst: float = 1.0
    """How many times the mean rate arrives in a burst; 1: there are none."""
    burst_share: float = 0.1
    """Share of the time that is in a burst."""
    burst_s: float = 0.02
    """Mean seconds of a burst."""
    key_skew: float = 1.0
    """Zipf exponent of what a hashed first tier hashes, out of 50 000 different ones."""

    def __post_init__(self) -> None:
        _at_least_1(self, "tokens")
        for name in ("qps", "seconds", "burst_s"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("skew", "key_skew"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name}: expected an exponent of at least 0, got {getattr(self, name)}")
        if self.drift_s is not None and not self.drift_s > 0:
            raise ValueError(f"drift_s: expected seconds above 0, or None for no drift, got {self.drift_s}")
        if not 0 < self.burst_share < 1 or not 1 <= self.burst <= 1 / self.burst_share:
            raise ValueError(
                f"burst: expected 1 to 1 / burst_share with a share in (0, 1), got burst = {self.burst} and "
                f"burst_share = {self.burst_share}: bursts alone would be more than the mean"
            )


@dataclass(frozen=True, kw_only=True)
class Design:
    """How tokens find experts.

    groups: of consecutive ranks, with the experts that these hold; 1 is flat routing, where a token may go to any
        expert.
    scope: "token" chooses the group anew for each token, wherever its query is: one copy goes to that group. "query"
        chooses it once, before the query is admitted: the group is a fleet of its own, with its own steps.
    first: how a group is chosen: by the "hash" of a key, or "learned", which is as skewed as the experts' popularity.
    placements: of the experts, instead of consecutive ones on each rank: one for all layers, or one for each; flat
        routing only.
    """

    name: str = "flat"
    groups: int = 1
    scope: Literal["token", "query"] = "token"
    first: Literal["hash", "learned"] = "hash"
    placements: tuple[Placement, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """All that a simulation is told. Raises ValueError for parts that don't go together."""

    model: ModelShape = field(default_factory=ModelShape)
    machines: Machines = field(default_factory=Machines)
    batching: Batching = field(default_factory=Batching)
    traffic: Demand = field(default_factory=Demand)
    design: Design = field(default_factory=Design)

    def __post_init__(self) -> None:
        groups, ranks, experts = self.design.groups, self.machines.ranks, self.model.num_experts
        if groups < 1 or ranks % groups or experts % groups:
            raise ValueError(f"groups: expected a divisor of {ranks} ranks and of {experts} experts, got {groups}")
        if self.model.top_k > experts // groups:
            raise ValueError(
                f"top_k: expected at most the {experts // groups} experts of one of {groups} groups, "
                f"got {self.model.top_k}; take fewer groups"
            )
        placements = self.design.placements
        if placements and groups > 1:
            raise ValueError(f"placements: expected flat routing, got {groups} groups, which hold consecutive experts")
        if len(placements) not in (0, 1, self.model.num_layers):
            raise ValueError(
                f"placements: expected one, or one for each of {self.model.num_layers} layers, got {len(placements)}"
            )
        for each in placements:
            if (each.num_ranks, each.num_experts) != (ranks, experts):
                raise ValueError(
                    f"placements: expected {experts} experts on {ranks} ranks, "
                    f"got {each.num_experts} on {each.num_ranks}"
                )

    @property
    def experts_per_group(self) -> int:
        """Experts that a group holds."""
        return self.model.num_experts // self.design.groups


def _at_least_1(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(config, name)}")
