"""Which blocks are fastest for Triton's kernels on this GPU: what `equipoise.ops.triton.blocks` should hold.

    python -m benchmarks.gpu_blocks --shape olmoe --tokens 4096

Each product of forward and backward is timed with each way of cutting it, in bf16, on rows routed at random. Kernels
are compiled in parallel processes first. Ends with status 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.bench.device import cuda_seconds
from equipoise.bench.harness import spread
from equipoise.bench.problem import Shape, parse_shape
from equipoise.bench.report import Report, Table, add_output_arguments, announce, emit
from equipoise.ops.ragged import RaggedPlan, ragged_plan
from equipoise.ops.triton import launch
from equipoise.ops.triton.blocks import Blocks, Cut, cut_for, shared_memory
from equipoise.ops.triton.order import tiles_of

PRODUCTS = ("up", "down", "grad_a", "grad_x", "weights")
ROUNDS = 5


class Case(NamedTuple):
    """Rows of one routing, and weights."""

    plan: RaggedPlan
    x_TD: Tensor
    rows_RD: Tensor
    a_RF: Tensor
    z_RH: Tensor
    up_EHD: Tensor
    down_EDF: Tensor


def make_case(shape: Shape, num_tokens: int) -> Case:
    """Uniform routing: every expert has about its fair share."""
    random = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device="cuda", dtype=torch.bfloat16)

    T, D, F, E, K = num_tokens, shape.dim, shape.hidden_dim, shape.num_experts, shape.top_k
    ids_N = torch.rand(T, E, generator=random, device="cuda").topk(K).indices.flatten()
    tokens_N = torch.arange(T, device="cuda").repeat_interleave(K)
    plan = ragged_plan(tokens_N, ids_N, torch.rand(T * K, device="cuda"), E, top_k=K)
    return Case(plan, normal(T, D), normal(T * K, D), normal(T * K, F), normal(T * K, 2 * F), normal(E, 2 * F, D),
                normal(E, D, F))  # fmt: skip


def candidates(name: str, fitting: Cut) -> Iterator[Blocks]:
    """Ways to cut a product; `fitting` is what the package takes for these rows."""
    shared, now = shared_memory(torch.device("cuda")), getattr(fitting, name)
    yield now
    rows = (64, 128) if name == "weights" else sorted({now.rows, min(now.rows, 64), 128 if now.rows > 32 else now.rows})
    inners, least = ((64, 128), 4) if now.rows < 64 else ((32, 64) if name == "weights" else (64,), 16)
    for row, col, inner, warps, stages in product(rows, (32, 64, 128, 256), (32, 64, 128), (4, 8), (3, 4)):
        blocks = Blocks(row, col, inner, warps, stages)
        accumulators = row * col * (2 if name == "up" else 1) / (32 * warps)  # fp32 numbers per thread
        fits = blocks.fitting(2, 2 if name == "up" else 1, shared) == blocks
        if fits and blocks != now and least <= accumulators <= 128 and inner in inners:
            yield blocks


def runner(case: Case, name: str, blocks: Blocks) -> Callable[[], object]:
    """Launches one product, cut so."""
    num_rows, num_experts = case.rows_RD.shape[0], case.up_EHD.shape[0]
    cut = cut_for(num_rows, num_experts, 2, shared_memory(torch.device("cuda")))
    if name != "weights":
        cut = Cut(*(replace(one, rows=blocks.rows) for one in (cut.up, cut.down, cut.grad_a, cut.grad_x)), cut.weights)
    tiles = tiles_of(case.plan.counts_e, num_rows, 2, replace(cut, **{name: blocks}))
    runs: dict[str, Callable[[], object]] = {
        "up": lambda: launch.up_rows(case.x_TD, case.plan.token_ids_R, case.up_EHD, tiles, "swiglu", True),
        "down": lambda: launch.product_of_rows(case.a_RF, case.down_EDF, tiles, blocks, case.plan.weights_R),
        "grad_a": lambda: launch.product_of_rows(case.rows_RD, case.down_EDF, tiles, blocks, None, True),
        "grad_x": lambda: launch.product_of_rows(case.z_RH, case.up_EHD, tiles, blocks, None, True),
        "weights": lambda: launch.products_over_rows(case.z_RH, case.rows_RD, tiles),
    }
    return runs[name]


def flops(name: str, shape: Shape, num_tokens: int) -> int:
    """Of one product: those of z have twice the width of a."""
    one = 2 * num_tokens * shape.top_k * shape.dim * shape.hidden_dim
    return one if name in ("down", "grad_a") else 2 * one


def all_candidates(shape: Shape, num_tokens: int) -> list[tuple[str, Blocks]]:
    """Of each product."""
    fitting = cut_for(num_tokens * shape.top_k, shape.num_experts, 2, shared_memory(torch.device("cuda")))
    return [(name, blocks) for name in PRODUCTS for blocks in candidates(name, fitting)]


def compile_share(shape: Shape, num_tokens: int, share: int, of: int) -> None:
    """Compile every of-th kernel into Triton's cache, on rows of a small layer."""
    small = make_case(Shape("small", 64, 64, 2, 1), 64)
    for name, blocks in all_candidates(shape, num_tokens)[share::of]:
        runner(small, name, blocks)()
    torch.cuda.synchronize()


def table(shape: Shape, num_tokens: int, shown: int) -> Table:
    """The fastest ways to cut each product, and the one that the package takes."""
    case, rows = make_case(shape, num_tokens), []
    chosen = cut_for(num_tokens * shape.top_k, shape.num_experts, 2, shared_memory(torch.device("cuda")))
    for name in PRODUCTS:
        found = []
        for blocks in (blocks for kind, blocks in all_candidates(shape, num_tokens) if kind == name):
            run = runner(case, name, blocks)
            run()
            seconds = spread([cuda_seconds(run) for _ in range(ROUNDS)])
            found.append((seconds, blocks))
        found.sort(key=lambda each: each[0].median)
        for seconds, blocks in [*found[:shown], *(each for each in found[shown:] if each[1] == getattr(chosen, name))]:
            taken = "taken" if blocks == getattr(chosen, name) else ""
            rate = flops(name, shape, num_tokens) / seconds.median / 1e12
            rows.append((name, *vars(blocks).values(), seconds.times(1e6), rate, taken))
    columns = ("product", "rows", "cols", "inner", "warps", "stages", "us", "TFLOP/s", "")
    return Table(f"{shape.name}, T={num_tokens}", columns, tuple(rows))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_blocks", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["olmoe"], help="names or D,F,E,K")
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096])
    parser.add_argument("--best", type=int, default=4, help="how many of each product are shown")
    parser.add_argument("--compile-share", nargs=2, type=int, metavar=("N", "OF"), help=argparse.SUPPRESS)
    add_output_arguments(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu_blocks: expected a GPU, got none that torch sees", file=sys.stderr)
        return 2
    shapes = [parse_shape(text) for text in options.shape]
    cases = [(shape, tokens) for shape in shapes for tokens in options.tokens]
    if options.compile_share:
        for shape, tokens in cases:
            compile_share(shape, tokens, *options.compile_share)
        return 0
    workers = max(1, (os.cpu_count() or 1) - 1)
    announce(f"compiling {sum(len(all_candidates(*case)) for case in cases)} kernels in {workers} processes")
    command = [sys.executable, "-m", "benchmarks.gpu_blocks", *sys.argv[1:], "--compile-share"]
    running = [subprocess.Popen([*command, str(n), str(workers)]) for n in range(workers)]
    if max(worker.wait() for worker in running):
        return 1
    tables = []
    for shape, tokens in cases:
        announce(f"{shape.name}, T={tokens}")
        tables.append(table(shape, tokens, options.best))
    emit(Report({}, tuple(tables)), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
