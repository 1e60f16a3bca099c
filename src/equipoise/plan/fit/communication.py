"""What dispatch and combine send, how long that takes, and what share of a step it is.

A token's row goes once to each distinct rank that holds one of its experts (or, without deduplication, once per
expert), and as many sums come back. An exchange takes alpha + bytes of the busiest rank / beta.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from equipoise.plan.fit.architecture import Architecture, Routed
from equipoise.plan.fit.imbalance import max_vio
from equipoise.plan.fit.parameters import parameters
from equipoise.plan.fit.setup import BYTES, Serving, Setup, Training
from equipoise.plan.links import Cost

LINK = Cost(10e-6, 43e9)  # DeepEP between 16 ranks over RDMA; see docs/fleet.md


@dataclass(frozen=True, kw_only=True)
class Machine:
    """link: of a rank, one way. flops: per second that products reach. memory: bytes per second of the rank's memory.

    dispatch, combine: bytes of an element on the way there and back. distinct: rows are sent once per rank.
    The defaults: 400 TFLOP/s are 40 % of an H100's dense bf16 peak, 3.35 TB/s its memory (the vendor's figures).
    """

    link: Cost = field(default_factory=lambda: LINK)
    flops: float = 400e12
    memory: float = 3.35e12
    dispatch: float = 2.0
    combine: float = 2.0
    distinct: bool = True

    def __post_init__(self) -> None:
        for name in ("flops", "memory", "dispatch", "combine"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")


def destinations(ranks: int, routed: Routed, *, distinct: bool = True, remote: bool = False, groups: int = 0) -> float:
    """Ranks that a token's row is sent to, on average, when choices are even.

    R (1 - (1 - 1/R)^k) distinct ones, R being the ranks that a token can reach: where routing is limited to some groups
    of experts, their share of the ranks. groups: of ranks, each of which gets one row that is spread inside it; 0: rows
    go to ranks. remote: without the token's own rank, which is one of all like any other.
    """
    spread = ranks >= routed.groups  # else a rank holds several groups of experts
    reached = ranks * routed.top_groups / routed.groups if spread else float(ranks)
    found = reached * (1 - (1 - 1 / reached) ** routed.k) if distinct else float(routed.k)
    found = found if spread else min(found, float(routed.top_groups))
    if groups:
        found = min(found, float(groups))
    return found * (ranks - 1) / ranks if remote else found


@dataclass(frozen=True)
class Communication:
    """Of one MoE layer in one direction, and of a step. Bytes and seconds of the busiest rank.

    dispatch_bytes, combine_bytes: to other ranks. max_vio: imbalance that is in the seconds. layers: MoE layers.
    passes: 1 in serving, 2 in training (backward sends as much). work_s: of a step without exchanges. step_share: what
    exchanges take of the step if nothing hides them. ratio: exchanges to products of the experts alone.
    """

    destinations: float
    dispatch_bytes: int
    combine_bytes: int
    dispatch_s: float
    combine_s: float
    max_vio: float
    layers: int
    passes: int
    work_s: float
    ratio: float

    @property
    def layer_s(self) -> float:
        """There and back, once."""
        return self.dispatch_s + self.combine_s

    @property
    def step_s(self) -> float:
        """All exchanges of a step."""
        return self.layers * self.passes * self.layer_s

    @property
    def step_share(self) -> float:
        """Exchanges in a step in which nothing overlaps."""
        return self.step_s / (self.step_s + self.work_s) if self.step_s else 0.0

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"layer_s": self.layer_s, "step_s": self.step_s, "step_share": self.step_share}


def communicate(model: Architecture, setup: Setup, machine: Machine) -> Communication:
    """Of the step that the setup describes: a micro-batch in training, one token of each sequence in serving."""
    tokens = setup.batch if isinstance(setup.work, Serving) else setup.tokens
    passes = 2 if isinstance(setup.work, Training) else 1
    work = work_seconds(model, setup, machine, tokens)
    if model.routed is None or setup.mesh.expert == 1:
        return Communication(0.0, 0, 0, 0.0, 0.0, 0.0, model.num_moe, passes, work, 0.0)
    ranks, routed = setup.mesh.expert, model.routed
    vio = max_vio(tokens * routed.k * ranks, ranks, setup.imbalance)
    copies = destinations(ranks, routed, distinct=machine.distinct, remote=True)
    there, back = (round(tokens * copies * model.dim * size) for size in (machine.dispatch, machine.combine))
    there_s, back_s = (machine.link.seconds((1 + vio) * size) for size in (there, back))
    products = 2 * tokens * routed.k * model.feed_forward(routed.hidden_dim, False) / machine.flops
    ratio = (there + back) / machine.link.rate / products
    return Communication(copies, there, back, there_s, back_s, vio, model.num_moe, passes, work, ratio)


def work_seconds(model: Architecture, setup: Setup, machine: Machine, tokens: int) -> float:
    """Of one rank's step without exchanges: products, or reading weights and cache once, whichever takes longer.

    2 floating-point operations per active parameter and token, 6 in training; attention over the context besides.
    A small batch reads only the experts that it meets: E (1 - (1 - k/E)^T) of them.
    """
    counts = parameters(model)
    passes = 3 if isinstance(setup.work, Training) else 1
    operations = 2 * counts.active_no_embedding + score_operations(model, setup)
    products = passes * tokens * operations / machine.flops
    if isinstance(setup.work, Training):
        return products
    return max(products, bytes_read(model, setup, tokens) / machine.memory)


def bytes_read(model: Architecture, setup: Setup, tokens: int) -> float:
    """Of weights and cache, by one rank in one decoding step of so many of its tokens."""
    counts = parameters(model)
    met = experts_met(model, tokens * setup.mesh.expert)
    experts = counts.experts * met / setup.mesh.expert * BYTES[setup.expert_precision]
    table = 0 if model.tied else counts.embedding
    return (counts.outside_experts - table) * BYTES[setup.precision] + experts + cache_bytes(model, setup)


def experts_met(model: Architecture, tokens: int) -> float:
    """Share of a layer's experts that so many tokens go to, when choices are even."""
    return 0.0 if model.routed is None else 1 - (1 - model.routed.k / model.routed.num) ** tokens


def cache_bytes(model: Architecture, setup: Setup) -> int:
    """Keys and values of a rank's sequences; layers with a window keep no more than that."""
    if not isinstance(setup.work, Serving):
        return 0
    seen = tokens_seen(model, setup.context)
    return round(setup.batch * seen * model.attention.cached * BYTES[setup.work.cache])


def tokens_seen(model: Architecture, context: float) -> float:
    """By a token at the end of the context, over all layers; a layer with a window shows no more than that."""
    attention = model.attention
    return (model.layers - attention.windowed) * context + attention.windowed * min(context, attention.window)


def score_operations(model: Architecture, setup: Setup) -> float:
    """Floating-point operations of a token in queries times keys and in weights times values, all layers.

    At the end of the context in serving, on average over it in training.
    """
    context = setup.context if isinstance(setup.work, Serving) else setup.context / 2
    return 4 * model.attention.query_dim * tokens_seen(model, context)
