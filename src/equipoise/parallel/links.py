"""Measures what the ranks of a process group pay to talk: latency and bandwidth of each collective, and products.

The model is t = alpha + bytes / beta (Hockney 1994); `fit` looks for the least relative errors, as the time of a
kilobyte matters as much as that of a megabyte. docs/fleet.md says what is measured and how. The exchange of tokens
itself is in other files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.parallel.mesh import DispatcherName
from equipoise.plan.links import Cost, Links, Timing

SIZES = tuple(1024 * 4**n for n in range(8))  # bytes per rank: 1 KiB to 16 MiB
ROWS = (1, 4, 16, 64, 256, 1024)  # of the expert's product
Progress = Callable[[str, int, int], None]  # what is measured now, how many are done, of how many


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured. A size is repeated until it took `seconds`, at least `least` and at most `most` times.

    sizes: bytes that a rank sends or holds. rows: of the products with an expert of dim and hidden_dim.
    Raises ValueError for sizes or numbers below 1, and for fewer than two sizes or rows: a line needs two.
    """

    sizes: tuple[int, ...] = SIZES
    rows: tuple[int, ...] = ROWS
    seconds: float = 0.4
    least: int = 5
    most: int = 200
    dim: int = 512
    hidden_dim: int = 1024

    def __post_init__(self) -> None:
        for name in ("sizes", "rows"):
            values = getattr(self, name)
            if len(set(values)) < 2 or min(values) < 1:
                raise ValueError(f"Effort.{name}: expected two or more different numbers of at least 1, got {values}")
        for name in ("least", "most", "dim", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"Effort.{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class _Task:
    """One thing to time: run is called once per measurement."""

    operation: str
    amount: float
    run: Callable[[], object]


def measure(effort: Effort = Effort(), progress: Progress = lambda what, done, total: None) -> Links:
    """Measure between all ranks of the default process group; every rank calls it, and every rank gets the result.

    A measurement begins at a barrier and ends when the last rank is done. progress is called on every rank before each
    size. Raises RuntimeError where no process group is there, ValueError where it has one rank.
    """
    if not dist.is_initialized():
        raise RuntimeError("links: expected a process group; call torch.distributed.init_process_group first")
    world = dist.get_world_size()
    if world < 2:
        raise ValueError(f"links: expected at least 2 ranks, got {world}; one rank has no links to measure")
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    num_tasks = 5 * len(effort.sizes) + len(effort.rows) + 1
    timings: list[Timing] = []
    for task in _tasks(effort, world, device):
        progress(task.operation, len(timings), num_tasks)
        timings.append(_time(task, effort, device))
    fits = {name: fit([t for t in timings if t.operation == name]) for name in _FITTED}
    return Links(
        ranks=world,
        backend=dist.get_backend(),
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        barrier_s=next(t.seconds for t in timings if t.operation == "barrier"),
        dim=effort.dim,
        hidden_dim=effort.hidden_dim,
        timings=tuple(timings),
        **fits,
    )


_FITTED = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce", "expert")


def fit(timings: Sequence[Timing]) -> Cost:
    """The line start + amount / rate with the least sum of |relative errors|: one size that was disturbed doesn't tilt
    it. Neither part is negative: where the best line would be, that part is 0 (or the rate infinite).

    Iteratively reweighted least squares, as in Schlossmacher (1973). Raises ValueError for fewer than two amounts.
    """
    amount = np.array([t.amount for t in timings], dtype=np.float64)
    seconds = np.array([t.seconds for t in timings], dtype=np.float64)
    if len(np.unique(amount)) < 2:
        raise ValueError(f"fit: expected timings of at least two amounts, got {sorted(set(amount.tolist()))}")
    candidates = [_reweighted(columns, seconds) for columns in _columns(amount)]
    usable = [(start, per_unit) for start, per_unit in candidates if start >= 0 and per_unit >= 0]

    def errors(line: tuple[float, float]) -> np.ndarray:
        found: np.ndarray = np.abs(line[0] + amount * line[1] - seconds) / seconds
        return found

    start, per_unit = min(usable, key=lambda line: float(errors(line).sum()))
    rate = 1 / per_unit if per_unit > 0 else float("inf")
    return Cost(float(start), float(rate), float(np.median(errors((start, per_unit)))))


def _columns(amount: np.ndarray) -> Iterator[np.ndarray]:
    """The design matrix of a line, of a line through 0, and of a constant."""
    ones, zeros = np.ones_like(amount), np.zeros_like(amount)
    yield np.stack([ones, amount], axis=1)
    yield np.stack([zeros, amount], axis=1)
    yield np.stack([ones, zeros], axis=1)


def _reweighted(columns: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    used = columns.any(axis=0)
    relative = columns[:, used] / seconds[:, None]
    scale = relative.max(axis=0)  # bytes and latencies are many orders apart
    weights, found = np.ones(len(seconds)), np.zeros(columns.shape[1])
    for _ in range(50):
        root = np.sqrt(weights)
        solved = np.linalg.lstsq(relative / scale * root[:, None], root, rcond=None)[0]
        weights = 1 / np.maximum(np.abs(relative / scale @ solved - 1), 1e-6)
    found[used] = solved / scale
    return float(found[0]), float(found[1])


def faster_dispatcher(
    links: Links, tokens: int, dim: int, bytes_per_element: int, top_k: int, ranks: int
) -> DispatcherName:
    """Which way to the experts and back takes less time by these links, for `tokens` of dim on each of `ranks`.

    "all_to_all" sends a token once to each rank that it needs, with counts beforehand: R (1 - (1 - 1/R)^k) copies under
    even routing. "all_gather" sends every token everywhere, and sums results by a reduce-scatter: more bytes, fewer and
    simpler rounds. `dispatch_seconds` has the times. Raises ValueError for numbers below 1.
    """
    seconds = dispatch_seconds(links, tokens, dim, bytes_per_element, top_k, ranks)
    return "all_to_all" if seconds["all_to_all"] < seconds["all_gather"] else "all_gather"


def dispatch_seconds(
    links: Links, tokens: int, dim: int, bytes_per_element: int, top_k: int, ranks: int
) -> dict[DispatcherName, float]:
    """Seconds per layer of both dispatchers, there and back, without the experts' work.

    For another number of ranks than was measured, latencies are taken to grow with R - 1, the messages of a rank, and
    the bandwidth of a rank to stay. Two ranks send the same bytes either way with k of 2 or more.
    """
    given = {"tokens": tokens, "dim": dim, "bytes_per_element": bytes_per_element, "top_k": top_k, "ranks": ranks}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"faster_dispatcher: expected {name} of at least 1, got {value}")
    if ranks == 1:
        return {"all_to_all": 0.0, "all_gather": 0.0}
    more = (ranks - 1) / max(links.ranks - 1, 1)
    row = dim * bytes_per_element
    copies = (ranks - 1) * (1 - (1 - 1 / ranks) ** top_k)  # of R (1 - (1 - 1/R)^k), those to other ranks

    def seconds(cost: Cost, amount: float) -> float:
        return cost.start_s * more + amount / cost.rate

    counts = seconds(links.all_to_all, 8 * (ranks - 1))
    gathered = (ranks - 1) * tokens * row
    return {
        "all_to_all": counts + 2 * seconds(links.all_to_all, copies * tokens * row),
        "all_gather": seconds(links.all_gather, gathered) + seconds(links.reduce_scatter, gathered),
    }


# ---------------------------------------------------------------------------------------------- what is timed


def _tasks(effort: Effort, world: int, device: torch.device) -> Iterator[_Task]:
    yield _Task("barrier", 0.0, dist.barrier)
    for size in effort.sizes:
        yield from _collectives(size, world, device)
    gate_DF, up_DF = (torch.randn(effort.dim, effort.hidden_dim, device=device) / effort.dim**0.5 for _ in range(2))
    down_FD = torch.randn(effort.hidden_dim, effort.dim, device=device) / effort.hidden_dim**0.5
    for rows in effort.rows:
        x_RD = torch.randn(rows, effort.dim, device=device)

        def expert(x_RD: Tensor = x_RD) -> Tensor:
            y_RD: Tensor = (torch.nn.functional.silu(x_RD @ gate_DF) * (x_RD @ up_DF)) @ down_FD
            return y_RD

        yield _Task("expert", 6.0 * rows * effort.dim * effort.hidden_dim, expert)


def _collectives(size: int, world: int, device: torch.device) -> Iterator[_Task]:
    """All of about `size` bytes: what a rank sends in an all-to-all, holds before an all-gather, or all-reduces."""
    rank, shard = dist.get_rank(), max(1, size // world // 4)  # elements of fp32
    sent, got = (torch.ones(world * shard, device=device) for _ in range(2))
    mine = torch.ones(shard, device=device)
    bytes_to_others = 4.0 * (world - 1) * shard
    yield _Task("all_to_all", bytes_to_others, lambda: dist.all_to_all_single(got, sent))
    yield _uneven(rank, world, shard, device)
    # their names since torch 2.13, where the old ones warn
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    yield _Task("all_gather", bytes_to_others, lambda: all_gather(got, mine))
    yield _Task("reduce_scatter", bytes_to_others, lambda: reduce_scatter(mine, got))
    yield _Task("all_reduce", 2 * bytes_to_others, lambda: dist.all_reduce(sent))


def _uneven(rank: int, world: int, shard: int, device: torch.device) -> _Task:
    """Each rank sends two even shares to rank 0 and half of one to each other rank, as to the rank of a hot expert."""
    low, high = max(1, shard // 2), 2 * shard
    sends = [high, *[low] * (world - 1)]
    gets = [high if rank == 0 else low] * world
    sent, got = (torch.ones(sum(rows), device=device) for rows in (sends, gets))
    busiest = 4.0 * (world - 1) * high  # what rank 0 gets from others
    return _Task("uneven all_to_all", busiest, lambda: dist.all_to_all_single(got, sent, gets, sends))


def _time(task: _Task, effort: Effort, device: torch.device) -> Timing:
    first = max(_once(task, device) for _ in range(2))  # buffers and connections are made
    repeats = torch.tensor([effort.seconds / max(first, 1e-7)], dtype=torch.float64, device=device)
    dist.all_reduce(repeats, dist.ReduceOp.MIN)
    count = int(min(max(float(repeats), effort.least), effort.most))
    seconds = torch.tensor([_once(task, device) for _ in range(count)], dtype=torch.float64, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)  # done when the last rank is
    low, median, high = np.percentile(seconds.cpu().numpy(), (10, 50, 90))
    return Timing(task.operation, task.amount, float(median), float(low), float(high))


def _once(task: _Task, device: torch.device) -> float:
    dist.barrier()
    _wait(device)
    began = time.perf_counter()
    task.run()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
