"""The numbers that advice is decided by, all of them computed from one model, one setup and one machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from equipoise.plan.fit.architecture import Architecture, GroupedQuery
from equipoise.plan.fit.communication import (
    Communication,
    Machine,
    bytes_read,
    cache_bytes,
    communicate,
    experts_met,
    score_operations,
)
from equipoise.plan.fit.imbalance import chance_max_vio
from equipoise.plan.fit.memory import GIB, Memory, memory
from equipoise.plan.fit.parameters import Parameters, parameters
from equipoise.plan.fit.setup import BYTES, Mesh, Serving, Setup, Training


@dataclass(frozen=True)
class Facts:
    """limit: bytes of a rank, if known. target_s: of one step of decoding or training, if there is one."""

    model: Architecture
    setup: Setup
    machine: Machine
    limit: int | None = None
    target_s: float | None = None

    @cached_property
    def counts(self) -> Parameters:
        """Parameters by part."""
        return parameters(self.model)

    @cached_property
    def memory(self) -> Memory:
        """Of a rank."""
        return memory(self.model, self.setup)

    @cached_property
    def communication(self) -> Communication:
        """Of a step."""
        return communicate(self.model, self.setup, self.machine)

    @property
    def trains(self) -> bool:
        """Rather than serves."""
        return isinstance(self.setup.work, Training)

    @property
    def tokens(self) -> int:
        """Of a step, of an expert group together."""
        each = self.setup.batch if isinstance(self.setup.work, Serving) else self.setup.tokens
        return each * self.setup.mesh.expert

    @property
    def tokens_per_expert(self) -> float:
        """Of a step, on average."""
        assert self.model.routed is not None
        return self.tokens * self.model.routed.k / self.model.routed.num

    @property
    def chance(self) -> float:
        """MaxVio of experts that a fair router stays below in 99 of 100 layers, by chance."""
        assert self.model.routed is not None
        return chance_max_vio(self.tokens * self.model.routed.k, self.model.routed.num)

    @cached_property
    def weights_gib(self) -> float:
        """Of the whole model."""
        size = BYTES[self.setup.precision]
        return (self.counts.outside_experts * size + self.counts.experts * BYTES[self.setup.expert_precision]) / GIB

    @property
    def active_gib(self) -> float:
        """Of the weights that one token uses, which is what a dense model of the same arithmetic would have."""
        return self.counts.active * BYTES[self.setup.precision] / GIB

    @property
    def met(self) -> float:
        """Share of the experts that a step's tokens go to."""
        return experts_met(self.model, self.tokens)

    @property
    def read_gib(self) -> float:
        """Weights and cache that a rank reads in a step of decoding."""
        return bytes_read(self.model, self.setup, self.setup.batch) / GIB

    @property
    def cache_share(self) -> float:
        """Of the rank's memory."""
        return cache_bytes(self.model, self.setup) / self.memory.total

    @property
    def step_s(self) -> float:
        """Products or reading, and exchanges that nothing hides."""
        return self.communication.work_s + self.communication.step_s

    @cached_property
    def alone(self) -> Memory:
        """Of a rank that holds all experts."""
        return memory(
            self.model, replace(self.setup, mesh=Mesh(data=self.setup.mesh.ranks, shard=self.setup.mesh.shard))
        )

    @cached_property
    def fewest_ranks(self) -> int | None:
        """The smallest expert group in which a rank has room, if there is one."""
        assert self.model.routed is not None
        assert self.limit is not None
        for ranks in range(1, self.model.routed.num + 1):
            if self.model.routed.num % ranks:
                continue
            mesh = Mesh(expert=ranks, data=self.setup.mesh.data, shard=self.setup.mesh.shard)
            if memory(self.model, replace(self.setup, mesh=mesh)).total <= self.limit:
                return ranks
        return None

    @property
    def score_share(self) -> float:
        """Of attention's scores over the context in all floating-point operations of a token."""
        scores = self.scores
        return scores / (scores + 2 * self.counts.active_no_embedding)

    @property
    def scores(self) -> float:
        """Floating-point operations of a token in queries times keys and in weights times values."""
        return score_operations(self.model, self.setup)

    @property
    def attention_share(self) -> float:
        """Of scores and projections together."""
        projections = 2 * self.counts.attention
        return (self.scores + projections) / (self.scores + 2 * self.counts.active_no_embedding)

    @property
    def heads_per_cached(self) -> float:
        """Query heads that share one key/value head; for latent attention, all of them."""
        attention = self.model.attention
        return attention.heads / attention.kv_heads if isinstance(attention, GroupedQuery) else attention.heads
