"""Simulates a fleet of ranks that serve queries through MoE layers: latency, queues, load of links, what finds no room.

A step is the unit: what arrived waits, a step takes it along, all ranks go through all layers together, the queries are
served. Steps of a group of ranks follow each other; groups that don't share a step run beside each other. What one step
takes is in `step.py`, who wants which expert in `routes.py`. What it leaves out is on docs/fleet.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from equipoise.plan.fleet.arrivals import arrival_times, hashed_shares
from equipoise.plan.fleet.cell import Cell
from equipoise.plan.fleet.result import FleetResult, Tally, summarise
from equipoise.plan.fleet.routes import admit, draw, popularity
from equipoise.plan.fleet.scenario import Scenario
from equipoise.plan.fleet.step import Done, step, varied
from equipoise.types import Placement

Array = np.ndarray
Stop = Callable[[float], bool]  # gets the simulated seconds; True ends the simulation there


@dataclass(frozen=True, eq=False)
class Trace:
    """Recorded routing, of which tokens are drawn: ids_LTK int64, the experts of each token in each layer."""

    ids_LTK: Array

    def check(self, scenario: Scenario) -> None:
        """Raises ValueError where the scenario is another model's, or asks for more than was recorded."""
        model, (layers, _, top_k) = scenario.model, self.ids_LTK.shape
        if scenario.design.groups > 1:
            raise ValueError(f"trace: expected flat routing, as was recorded, got {scenario.design.groups} groups")
        if (layers, top_k) != (model.num_layers, model.top_k):
            raise ValueError(
                f"trace: expected {model.num_layers} layers of top-{model.top_k}, got {layers} layers of top-{top_k}"
            )
        if not self.ids_LTK.size or self.ids_LTK.min() < 0 or self.ids_LTK.max() >= model.num_experts:
            raise ValueError(f"trace: expected one or more tokens with experts in 0..{model.num_experts - 1}")
        if model.capacity is not None and model.overflow == "next_choice":
            raise ValueError("trace: expected overflow shared or drop: what tokens would choose next was not recorded")


def simulate(
    scenario: Scenario, *, seed: int = 0, trace: Trace | None = None, stop: Stop = lambda now: False
) -> FleetResult:
    """Simulate the scenario's traffic, from the first arrival to its last second.

    The same seed gives the same result, and the same arrivals to all designs. stop is asked before each step; where it
    says so, the result is of the time until then. trace: routing to replay instead of the traffic's popularity.
    Raises ValueError for a trace that doesn't fit.
    """
    if trace is not None:
        trace.check(scenario)
    times, rank_N = arrivals(scenario, seed)
    world = _World(scenario, seed, trace)
    cells = world.cells(times, rank_N)
    tally = Tally(scenario.machines.ranks)
    end = scenario.traffic.seconds
    order = [(cell.next_start(), number) for number, cell in enumerate(cells)]
    heapq.heapify(order)
    while order and order[0][0] < end:
        start, number = heapq.heappop(order)
        if stop(start):
            end = start
            break
        cell = cells[number]
        taken = cell.take(start)
        done = world.run(number, cell.rank_N[taken], start)
        cell.finish(taken, start, done.step.seconds)
        tally.add(world.ranks_of(number), done)
        heapq.heappush(order, (cell.next_start(), number))
    for cell in cells:
        cell.look(end)
    return summarise(scenario, cells, tally, end)


def arrivals(scenario: Scenario, seed: int) -> tuple[Array, Array]:
    """When queries arrive, float64 (N,) in ascending seconds, and on which rank, int64 (N,)."""
    rng = np.random.default_rng([seed, 0])
    times = arrival_times(rng, scenario.traffic)
    return times, rng.integers(scenario.machines.ranks, size=len(times))


def wanted(scenario: Scenario, seed: int) -> Array:
    """float64 (L, E): how popular each expert is at the beginning, shares per layer."""
    model, rng = scenario.model, np.random.default_rng([seed, 1])
    return popularity(rng, model.num_layers, model.num_experts, scenario.traffic.skew)


@dataclass(eq=False)
class _World:
    """The routers and the ranks of one simulation."""

    scenario: Scenario
    seed: int
    trace: Trace | None
    rng: np.random.Generator = field(init=False)
    vary_rng: np.random.Generator = field(init=False)
    popularity_LE: Array = field(init=False)
    shares_G: Array = field(init=False)
    holders: list[Array] = field(init=False)

    def __post_init__(self) -> None:
        scenario = self.scenario
        model, design = scenario.model, scenario.design
        self.rng = np.random.default_rng([self.seed, 2])
        self.vary_rng = np.random.default_rng([self.seed, 4])
        self.popularity_LE = wanted(scenario, self.seed)
        self.shares_G = hashed_shares(np.random.default_rng([self.seed, 3]), design.groups, scenario.traffic.key_skew)
        if design.first == "learned":  # one router for all layers of a query
            self.shares_G = self.popularity_LE[0].reshape(design.groups, -1).sum(axis=1)
        num_cells = design.groups if design.scope == "query" else 1
        experts, ranks = model.num_experts // num_cells, scenario.machines.ranks // num_cells
        tables = [holders(each) for each in design.placements or (Placement.even(experts, ranks),)]
        self.holders = [np.broadcast_to(np.stack(tables), (model.num_layers, experts, ranks))] * num_cells

    def ranks_of(self, number: int) -> slice:
        """The ranks of a cell."""
        ranks = self.holders[number].shape[2]
        return slice(number * ranks, (number + 1) * ranks)

    def cells(self, times: Array, rank_N: Array) -> list[Cell]:
        """The queues: one, or one per group that queries are assigned to before they are admitted."""
        batching, ranks = self.scenario.batching, self.holders[0].shape[2]
        group_N = self.rng.choice(len(self.holders), size=len(times), p=self._cell_shares())
        return [
            Cell(times[group_N == number], rank_N[group_N == number] % ranks, batching, ranks)
            for number in range(len(self.holders))
        ]

    def _cell_shares(self) -> Array:
        return self.shares_G if len(self.holders) > 1 else np.ones(1)

    def run(self, number: int, rank_N: Array, now: float) -> Done:
        """One step of a cell, of queries that are on the cell's ranks rank_N."""
        model = self.scenario.model
        home_T = np.repeat(rank_N, self.scenario.traffic.tokens)
        choices_LTC, experts = self._choices(number, len(home_T), now)
        wanted_LTK = choices_LTC[:, :, : model.top_k]
        if model.capacity is None:
            ids_LTK, fits_LTK = wanted_LTK, np.ones(wanted_LTK.shape, dtype=bool)
        else:
            room = model.room(len(home_T), experts)
            ids_LTK, fits_LTK = admit(choices_LTC, model.top_k, room)
        spent = step(model, self.scenario.machines, self.holders[number], ids_LTK, fits_LTK, home_T)
        moved = int((ids_LTK != wanted_LTK).sum())
        spent = replace(
            spent, seconds=spent.seconds * varied(self.scenario.machines.spread, spent.seconds, self.vary_rng)
        )
        return Done(spent, len(home_T), ids_LTK.size, moved, int((~fits_LTK).sum()))

    def _choices(self, number: int, tokens: int, now: float) -> tuple[Array, int]:
        """What so many tokens of a cell want, by the cell's own numbers of experts, and how many these are."""
        scenario, model = self.scenario, self.scenario.model
        if self.trace is not None:
            return self.trace.ids_LTK[:, self.rng.integers(self.trace.ids_LTK.shape[1], size=tokens)], model.num_experts
        drift_s, popularity_LE = scenario.traffic.drift_s, self.popularity_LE
        if drift_s is not None:
            popularity_LE = np.roll(popularity_LE, int(now / drift_s), axis=1)
        size, groups = scenario.experts_per_group, scenario.design.groups
        further = model.capacity is not None and model.overflow == "next_choice"
        num_choices = size if further else model.top_k
        by_group_LGe = popularity_LE.reshape(model.num_layers, groups, size)
        if scenario.design.scope == "query":
            return draw(self.rng, by_group_LGe[:, [number]], tokens, num_choices), size
        if groups == 1:
            return draw(self.rng, by_group_LGe, tokens, num_choices), size
        group_LT = self._groups(by_group_LGe, tokens)
        own_LTe = np.take_along_axis(by_group_LGe, group_LT[:, :, None], axis=1)
        choices_LTC = draw(self.rng, own_LTe, tokens, num_choices) + group_LT[:, :, None] * size
        return choices_LTC, model.num_experts

    def _groups(self, by_group_LGe: Array, tokens: int) -> Array:
        """int64 (L, T): the group of each token. A hash of the token is the same in all layers."""
        layers, groups, _ = by_group_LGe.shape
        if self.scenario.design.first == "hash":
            return np.broadcast_to(self.rng.choice(groups, size=tokens, p=self.shares_G), (layers, tokens))
        return np.stack([self.rng.choice(groups, size=tokens, p=shares_G) for shares_G in by_group_LGe.sum(axis=2)])


def holders(placement: Placement) -> Array:
    """int64 (E, R): which rank computes expert e for rank r's tokens: itself where it can, else replicas in turn."""
    ranks = np.arange(placement.num_ranks)
    table_ER = np.empty((placement.num_experts, placement.num_ranks), dtype=np.int64)
    for expert in range(placement.num_experts):
        holding = np.array(placement.ranks_of(expert))
        table_ER[expert] = np.where(np.isin(ranks, holding), ranks, holding[ranks % len(holding)])
    return table_ER
