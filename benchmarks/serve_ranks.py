"""What it costs to have a served model's experts in other processes. python -m benchmarks.serve_ranks

The same engine and requests, once with all of the model in one process, once over ranks that are processes of this
machine and talk over loopback; they take turns in one process. More ranks than cores share them. HTTP is not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.serve_peers import SIZES, SMOKE_SIZES
from benchmarks.serving import random_model, write_run
from equipoise.bench.harness import Effort, Variant, spread, time_side_by_side
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.models.run_files import Loaded, load
from equipoise.serve.engine import Engine
from equipoise.serve.ranks.front import Ranks, SpreadConfig
from equipoise.serve.ranks.holder import Holder
from equipoise.serve.ranks.lines import Line, Lines
from equipoise.serve.ranks.world import joined
from equipoise.serve.request import Request, Sampling

SPREAD = "over ranks"
# (answers at a time, tokens of each prompt, tokens of each answer): two that decode, and one that reads prompts
WORK = {"1 answer": (1, 16, 32), "16 answers": (16, 16, 32), "4 prompts of 240": (4, 240, 1)}
SMOKE_WORK = {"2 answers": (2, 8, 4)}


class Served:
    """An engine, and the same work for it each time."""

    def __init__(self, loaded: Loaded) -> None:
        self.engine = Engine(loaded.model, loaded.tokenizer, num_blocks=1024, prefix_reuse=False)

    def run(self, work: tuple[int, int, int], threads: int) -> None:
        """All requests, to their end."""
        torch.set_num_threads(threads)
        number, prompt, answer = work
        for n in range(number):
            ids = tuple(256 + (n + 7 * place) % 200 for place in range(prompt))
            self.engine.add(Request(str(n), ids, answer, Sampling(temperature=0.0)))
        while self.engine.has_work:
            self.engine.step()


def worker(runs: Mapping[str, str], works: Mapping[str, tuple[int, int, int]], rounds: int, threads: int) -> None:
    """One rank. The first prints seconds of each round, by model, work and variant."""
    torch.set_num_threads(1)
    with joined(60.0) as world:
        if world.rank:
            Holder(Line(0, world)).run()
            return
        lines = Lines(world)
        try:
            found: dict[str, Any] = {}
            for name, run in runs.items():
                ranks = Ranks(Path(run), lines, SpreadConfig(), None)
                alone, over = Served(load(run)), Served(ranks.loaded)
                for told, work in works.items():
                    variants = [
                        Variant(f"{n} threads" if n > 1 else "1 thread", partial(alone.run, work, n))
                        for n in sorted({1, threads})
                    ]
                    variants.append(Variant(SPREAD, partial(over.run, work, 1)))
                    seconds = time_side_by_side(variants, Effort(rounds, warmup=1))
                    found[f"{name}|{told}"] = {label: list(each) for label, each in seconds.items()}
            print(json.dumps(found), flush=True)
        finally:
            lines.close()


def on_ranks(world: int, arguments: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Start them with torchrun. Raises RuntimeError with what a rank wrote."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command = [*torchrun, "-m", "benchmarks.serve_ranks", "--worker", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"a rank failed:\n{done.stderr[:2000]}")
    [told] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return told  # type: ignore[no-any-return]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_ranks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--models", nargs="+", default=[name.partition(":")[0] for name in SIZES])
    parser.add_argument("--threads", type=int, default=1, help="of the one process, beside 1")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_output_arguments(parser)
    options = parser.parse_args()
    if options.worker:
        worker(**json.loads(options.worker))
        return
    works, rounds, worlds = WORK, options.rounds, options.ranks
    sizes = {name: config for name, config in SIZES.items() if name.partition(":")[0] in options.models}
    if options.smoke:
        sizes, works, rounds, worlds = SMOKE_SIZES, SMOKE_WORK, 2, [2]
    rows: list[tuple[Cell, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: str(write_run(Path(folder) / str(number), random_model(config, torch.float32)))
            for number, (name, config) in enumerate(sizes.items())
        }
        for world in worlds:
            announce(f"{world} ranks")
            arguments = {"runs": runs, "works": works, "rounds": rounds, "threads": options.threads}
            for key, seconds in on_ranks(world, arguments).items():
                name, _, told = key.partition("|")
                _, _, answer = works[told]
                over = torch.tensor(seconds.pop(SPREAD))
                ratios = [spread((over / torch.tensor(each)).numpy()) for each in seconds.values()]
                columns = ("model", "work", "ranks", "over ranks [ms a step]", *(f"/ {label}" for label in seconds))
                rows.append((name, told, world, spread(over.numpy()).times(1e3 / answer), *ratios))
    note = "fp32, one thread per rank; times one process with so many threads."
    emit(Report({"rounds": rounds}, (Table("Experts in other processes", columns, tuple(rows), note),)), options)


if __name__ == "__main__":
    main()
