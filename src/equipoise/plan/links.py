"""What ranks pay to talk and to compute, as `parallel/links.py` measures it: plain numbers, to and from JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import inf
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What doing something costs: start_s seconds whatever the amount is, then rate units per second.

    For links the unit is a byte and start_s their latency alpha, rate their bandwidth beta; for products it is a
    floating-point operation. error: the median of |measured - cost| / measured where it was fitted, 0 where it was
    set. Raises ValueError for a negative start_s, or a rate that isn't above 0; an infinite rate is allowed.
    """

    start_s: float
    rate: float
    error: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.start_s < inf and self.rate > 0):
            raise ValueError(
                f"Cost: expected start_s of at least 0 seconds and a rate above 0 per second, "
                f"got start_s = {self.start_s}, rate = {self.rate}"
            )

    def seconds(self, amount: float) -> float:
        """Of so many units."""
        return self.start_s + amount / self.rate


@dataclass(frozen=True)
class Timing:
    """One measured size of one operation: amount in bytes or floating-point operations, median and 10th and 90th
    percentile in seconds."""

    operation: str
    amount: float
    seconds: float
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Units per second, the latency included."""
        return self.amount / self.seconds


@dataclass(frozen=True)
class Links:
    """What `parallel/links.py` measured between the ranks of a process group, and what plans are made with.

    Amounts are the bytes that the busiest rank has to send to, or to get from, the others at the least: its rows in
    all_to_all, (R - 1) shards in all_gather and reduce_scatter, 2 (R - 1) / R of the tensor in all_reduce.
    barrier_s: median of a barrier. expert: the three products of a SwiGLU expert of dim and hidden_dim, in
    floating-point operations, on all ranks at the same time.
    Raises ValueError for fewer than one rank.
    """

    ranks: int
    backend: str
    device: str
    all_to_all: Cost
    all_gather: Cost
    reduce_scatter: Cost
    all_reduce: Cost
    barrier_s: float
    expert: Cost
    dim: int
    hidden_dim: int
    timings: tuple[Timing, ...] = ()

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"Links.ranks: expected at least 1, got {self.ranks}")

    def fields(self) -> dict[str, Any]:
        """For JSON, and `from_fields`."""
        return asdict(self)

    @staticmethod
    def from_fields(values: Any, source: str) -> Links:
        """Of what `fields` gave and JSON kept. Raises ValueError with the source's name for anything else."""
        kinds: dict[str, Callable[[Any], Any]] = {"timings": lambda v: tuple(Timing(**each) for each in v)}
        kinds |= {name: lambda v: Cost(**v) for name in ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")}
        kinds |= {"expert": lambda v: Cost(**v)}
        try:
            return Links(**{name: kinds.get(name, lambda v: v)(value) for name, value in values.items()})
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{source}: expected the links that `equipoise bench links --out` writes, got something else ({error})"
            ) from error
