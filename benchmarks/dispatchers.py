"""Which way to the experts is faster: all-to-all, in chunks, or all-gather. python -m benchmarks.dispatchers

One MoE layer, forward and backward, on ranks that are processes of this machine and talk over loopback. All ways take
turns within each round, and the slowest rank counts. More ranks than cores share them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from equipoise.bench.harness import spread
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.layer import MoE
from equipoise.parallel import ParallelConfig, apply_expert_parallel, make_ranks
from equipoise.routing import TopK

WAYS: dict[str, dict[str, Any]] = {
    "all_to_all": {"dispatcher": "all_to_all"},
    "all_to_all, 2 chunks": {"dispatcher": "all_to_all", "chunks": 2},
    "all_gather": {"dispatcher": "all_gather"},
}


@dataclass(frozen=True)
class Size:
    """tokens: per rank."""

    tokens: int
    dim: int = 512
    hidden: int = 256
    num_experts: int = 16
    k: int = 2


SIZES = (Size(1), Size(16), Size(128), Size(1024))
SMOKE = (Size(8, dim=32, hidden=16),)


def worker(sizes: list[Size], rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of each round by way, a list per size."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    found: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    for size in sizes:
        layers = {}
        for name, way in WAYS.items():
            torch.manual_seed(0)
            layer = MoE(size.dim, size.hidden, size.num_experts, router=TopK(k=size.k))
            apply_expert_parallel(layer, make_ranks(ParallelConfig(expert=world, **way)))
            layers[name] = layer
        x = torch.randn(size.tokens, size.dim, requires_grad=True)
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for number in range(rounds + 2):
            for name, layer in layers.items():
                dist.barrier()
                begun = time.perf_counter()
                layer(x).sum().backward()
                took = time.perf_counter() - begun
                layer.zero_grad(set_to_none=True)
                if number > 1:  # the first two are for warming up
                    seconds[name].append(took)
        for name, values in seconds.items():
            found[name].append(values)
    slowest = {}
    for name, of_sizes in found.items():
        values = torch.tensor(of_sizes, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        slowest[name] = values.tolist()
    rank = dist.get_rank()
    dist.destroy_process_group()
    return slowest if rank == 0 else {}


def on_ranks(world: int, sizes: tuple[Size, ...], rounds: int) -> dict[str, np.ndarray]:
    """Start them with torchrun; seconds (size, round) by way. Raises RuntimeError with what a rank wrote."""
    sizes_json = json.dumps([vars(size) for size in sizes])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command = [*torchrun, "-m", "benchmarks.dispatchers", "--worker", sizes_json, "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"a rank failed:\n{done.stderr[-2000:]}")
    [told] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"all')]
    return {name: np.array(values) for name, values in told.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dispatchers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_output_arguments(parser)
    options = parser.parse_args()
    if options.worker:
        found = worker([Size(**size) for size in json.loads(options.worker)], options.rounds)
        if found:
            print(json.dumps(found), flush=True)
        return
    worlds, sizes, rounds = ([2], SMOKE, 3) if options.smoke else (options.ranks, SIZES, options.rounds)
    rows: list[tuple[Cell, ...]] = []
    for world in worlds:
        announce(f"{world} ranks")
        seconds = on_ranks(world, sizes, rounds)
        first, *others = seconds
        for number, size in enumerate(sizes):
            ours = seconds[first][number]
            ratios = [spread(ours / seconds[name][number]) for name in others]
            rows.append((f"{world} ranks, {size.tokens} tokens", spread(ours).times(1e3), *ratios))
    columns = ("ranks and tokens of each", "all_to_all [ms]", *(f"{name}: times as fast" for name in list(WAYS)[1:]))
    settings: dict[str, Any] = {"rounds": rounds, **{k: v for k, v in vars(sizes[0]).items() if k != "tokens"}}
    emit(Report(settings, (Table("One layer, forward and backward", columns, tuple(rows)),)), options)


if __name__ == "__main__":
    main()
