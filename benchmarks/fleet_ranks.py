"""What each rank does in `benchmarks.fleet`: measure its links, then serve queries by a schedule, over collectives.

Each query is a token that goes through MoE layers: a row to each rank with one of its experts, the experts' products,
a sum home. The queue is the simulation's own, with the clock of the wall. Started by torchrun, or in namespaces.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.parallel.links import Effort, measure
from equipoise.plan.fleet.cell import Cell
from equipoise.plan.fleet.routes import draw, popularity
from equipoise.plan.fleet.scenario import Batching, Demand, Machines, ModelShape, Scenario
from equipoise.plan.fleet.simulate import arrivals, wanted

LEAST_STEPS = 8  # that are rehearsed of each size
Exchange = Callable[[Tensor, list[int], list[int]], Tensor]  # rows, rows to each rank, rows from each rank
Swap = Callable[[Tensor], Tensor]  # one number for each rank -> one from each


@dataclass(frozen=True)
class Work:
    """What all ranks are told. loads: queries per second, one run each. rehearsal_s: seconds of each rehearsal.

    There is a rehearsal before the first load and after each.
    """

    model: ModelShape
    batching: Batching
    ranks: int
    skew: float
    seconds: float
    loads: tuple[float, ...]
    seed: int
    effort: Effort
    rehearsal_s: float
    cores: int  # that the ranks share

    def scenario(self, qps: float, machines: Machines | None = None) -> Scenario:
        """One load, for the simulation and for the ranks."""
        traffic = Demand(qps=qps, seconds=self.seconds, skew=self.skew)
        return Scenario(
            model=self.model, machines=machines or Machines(ranks=self.ranks), batching=self.batching, traffic=traffic
        )

    @staticmethod
    def read(path: Path) -> Work:
        """Of the JSON of its fields."""
        values: dict[str, Any] = json.loads(path.read_text())
        values |= {"model": ModelShape(**values["model"]), "batching": Batching(**values["batching"])}
        effort = {name: tuple(v) if isinstance(v, list) else v for name, v in values["effort"].items()}
        return Work(**values | {"effort": Effort(**effort), "loads": tuple(values["loads"])})


@dataclass(frozen=True, eq=False)
class Rank:
    """One rank's experts. gate_eDF, up_eDF, down_eFD: of the experts first .. first + e - 1.

    computed_s: seconds that its experts have computed, layer by layer, without waiting for a core.
    """

    number: int
    world: int
    gate_eDF: Tensor
    up_eDF: Tensor
    down_eFD: Tensor
    computed_s: list[float] = field(default_factory=list)

    @staticmethod
    def made(model: ModelShape, number: int, world: int) -> Rank:
        """With weights drawn by its number."""
        torch.manual_seed(number)
        e, d, f = model.num_experts // world, model.dim, model.hidden_dim
        return Rank(number, world, torch.randn(e, d, f) / d, torch.randn(e, d, f) / d, torch.randn(e, f, d) / f)

    def expert(self, local: int, x_RD: Tensor) -> Tensor:
        """The products of one of its experts."""
        inner_RF = torch.nn.functional.silu(x_RD @ self.gate_eDF[local]) * (x_RD @ self.up_eDF[local])
        return inner_RF @ self.down_eFD[local]

    def layer(self, x_TD: Tensor, ids_TK: Tensor, exchange: Exchange, swap: Swap) -> Tensor:
        """There, the experts, and back: (T, D), the sum of each token's experts."""
        size, dim = len(self.gate_eDF), x_TD.shape[1]
        to_RT = torch.zeros(self.world, len(x_TD), dtype=torch.bool)
        to_RT[(ids_TK // size).flatten(), torch.arange(len(x_TD)).repeat_interleave(ids_TK.shape[1])] = True
        token_N = to_RT.nonzero()[:, 1]  # by rank, as they are sent
        sends = to_RT.sum(1)
        gets = swap(sends).tolist()
        # the ids travel in the row: exact in fp32
        rows_RD = torch.cat([x_TD[token_N], ids_TK[token_N].to(x_TD.dtype)], dim=1)
        came_RD = exchange(rows_RD, sends.tolist(), gets)
        x_RD, ids_RK = came_RD[:, :dim], came_RD[:, dim:].long()
        y_RD = torch.zeros_like(x_RD)
        began = time.thread_time()
        for local in range(size):
            row_n = (ids_RK == self.number * size + local).any(1).nonzero().squeeze(1)
            if len(row_n):
                y_RD.index_add_(0, row_n, self.expert(local, x_RD[row_n]))
        self.computed_s.append(time.thread_time() - began)
        home_ND = exchange(y_RD, gets, sends.tolist())
        return torch.zeros_like(x_TD).index_add_(0, token_N, home_ND)

    def step(self, x_TD: Tensor, ids_LTK: Tensor) -> Tensor:
        """All layers, between all ranks: (T, D)."""
        for ids_TK in ids_LTK:
            x_TD = x_TD + self.layer(x_TD, ids_TK, exchange_rows, swap_counts)
        return x_TD


def exchange_rows(rows: Tensor, sends: list[int], gets: list[int]) -> Tensor:
    """All ranks' rows to all ranks."""
    got = rows.new_empty(sum(gets), rows.shape[1])
    dist.all_to_all_single(got, rows, gets, sends)
    return got


def swap_counts(counts: Tensor) -> Tensor:
    """One number to each rank."""
    got = torch.empty_like(counts)
    dist.all_to_all_single(got, counts)
    return got


def serve(rank: Rank, work: Work, qps: float) -> Cell:
    """Serve one load; the cell of the main rank has the times."""
    scenario = work.scenario(qps)
    times, home_N = arrivals(scenario, work.seed)
    popularity_L1E, rng = wanted(scenario, work.seed)[:, None], np.random.default_rng([work.seed, 9])
    ids_LNK = torch.from_numpy(draw(rng, popularity_L1E, len(times), work.model.top_k))
    x_ND = torch.randn(len(times), work.model.dim)
    cell = Cell(times, home_N, work.batching, work.ranks)
    dist.barrier()
    began = time.perf_counter()
    while True:
        bounds, start = _next(cell, began) if rank.number == 0 else (torch.zeros(2, dtype=torch.int64), 0.0)
        dist.broadcast(bounds, 0)
        first, last = bounds.tolist()
        if first == last:
            return cell
        queries = np.arange(first, last)
        mine = torch.from_numpy(queries[home_N[first:last] == rank.number])
        rank.step(x_ND[mine], ids_LNK[:, mine])
        if rank.number == 0:
            cell.finish(queries, start, time.perf_counter() - began - start)


def _next(cell: Cell, began: float) -> tuple[Tensor, float]:
    """Wait until the next step is due; the queries it takes, first and last + 1, and when it began."""
    due = cell.next_start()
    if not np.isfinite(due):
        return torch.zeros(2, dtype=torch.int64), 0.0
    while (now := time.perf_counter() - began) < due:
        time.sleep(max(due - now - 2e-4, 0))  # queries arrive by the clock; the last moments are waited for awake
    taken = cell.take(now)
    return torch.tensor([int(taken[0]), int(taken[-1]) + 1]), now


@dataclass(eq=False)
class Rehearsal:
    """Draws steps to rehearse, the same on all ranks that ask for the same numbers of tokens.

    Experts have another popularity in each step, and half of the steps come after a rest as long as the window.
    """

    work: Work
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng([self.work.seed, 11])

    def draw(self, tokens: int) -> tuple[np.ndarray, np.ndarray, float]:
        """home_T, ids_LTK, and seconds to rest before."""
        model, ranks = self.work.model, self.work.ranks
        wanted_LE = popularity(self.rng, model.num_layers, model.num_experts, 2 * self.rng.random())
        ids_LTK = draw(self.rng, wanted_LE[:, None], tokens, model.top_k)
        rest_s = self.work.batching.window_s * int(self.rng.integers(2))
        return self.rng.integers(ranks, size=tokens), ids_LTK, rest_s


def rehearse(rank: Rank, work: Work, steps: Rehearsal) -> list[dict[str, Any]]:
    """Steps that are made for practice: tokens, seconds by the clock of the main rank, each rank's computing.

    First of 1 token, then of 2, 4, 8 ... as many as a step may have: each size gets the same time, and LEAST_STEPS at
    least. They come in blocks, as a small step after the largest one may find links and buffers full.
    """
    found: list[tuple[int, float, float]] = []
    most = work.batching.max_batch * work.ranks
    x_ND = torch.randn(most, work.model.dim)
    dist.barrier()
    for tokens in 2 ** np.arange(most.bit_length()):
        end, before = time.perf_counter() + work.rehearsal_s / most.bit_length(), len(found)
        while True:
            go_on = torch.tensor([len(found) - before < LEAST_STEPS or time.perf_counter() < end])
            dist.broadcast(go_on, 0)
            if not go_on:
                break
            home_T, ids_LTK, rest_s = steps.draw(int(tokens))
            mine, bounds = torch.from_numpy(np.flatnonzero(home_T == rank.number)), torch.tensor([0, tokens])
            if rank.number == 0:
                time.sleep(rest_s)
            rank.computed_s.clear()
            began = time.perf_counter()
            dist.broadcast(bounds, 0)
            rank.step(x_ND[mine], torch.from_numpy(ids_LTK)[:, mine])
            found.append((int(tokens), time.perf_counter() - began, sum(rank.computed_s)))
    computed_N = torch.tensor([each[2] for each in found], dtype=torch.float64)
    computed_RN = [torch.empty_like(computed_N) for _ in range(work.ranks)]
    dist.all_gather(computed_RN, computed_N)
    return [
        {"tokens": tokens, "seconds": seconds, "expert_R": computed_R}
        for (tokens, seconds, _), computed_R in zip(found, torch.stack(computed_RN, dim=1).tolist(), strict=True)
    ]


def main() -> None:
    """Of one rank: python -m benchmarks.fleet_ranks WORK.json RESULT.json"""
    work, out = Work.read(Path(sys.argv[1])), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = Rank.made(work.model, dist.get_rank(), dist.get_world_size())
    with torch.no_grad():
        links = measure(work.effort)
        serve(rank, replace(work, seconds=min(work.seconds, 0.2)), work.loads[0])  # connections and buffers are made
        steps = Rehearsal(work)
        rehearsed, cells = [rehearse(rank, work, steps)], []
        for qps in work.loads:
            cells.append(serve(rank, work, qps))
            rehearsed.append(rehearse(rank, work, steps))
    if rank.number == 0:
        served = [{"times": c.times.tolist(), "start": c.start_N.tolist(), "done": c.done_N.tolist()} for c in cells]
        out.write_text(json.dumps({"links": asdict(links), "rehearsed": rehearsed, "loads": served}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
