"""Measuring on a GPU: a clock that waits for it, and a layer's forward as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from equipoise.bench.ceilings import product_rate, read_bandwidth
from equipoise.bench.harness import Clock, host_seconds
from equipoise.bench.ours import equipoise_moe
from equipoise.bench.problem import Candidate, Layer, Problem
from equipoise.bench.report import Table

DEVICES = ("cpu", "cuda")
_BUFFER = 2**31  # bytes, many times a GPU's cache
_HEAD_START = 10_000_000  # cycles, some 5 ms


def clock_for(device: str, busy: bool = False) -> Clock:
    """Times a call on that device; busy: without the host's time. Raises ValueError for a device that is not there."""
    if device not in DEVICES:
        raise ValueError(f"device: expected {' or '.join(DEVICES)}, got {device!r}")
    if device == "cpu":
        return host_seconds
    if not torch.cuda.is_available():
        raise ValueError("device: expected a GPU for cuda, got none that torch sees; use --device cpu")
    return busy_seconds if busy else cuda_seconds


def cuda_seconds(run: Callable[[], object]) -> float:
    """Seconds from when it is asked for to when the GPU has finished, by events: the host's time counts."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
    begin.record()
    result = run()
    end.record()
    end.synchronize()
    del result
    return float(begin.elapsed_time(end)) / 1e3


def busy_seconds(run: Callable[[], object]) -> float:
    """Seconds of the GPU's work alone: it is kept waiting until the host has sent some of it.

    A training loop is so, where the host runs ahead; what the host itself takes is `host_ms`.
    """
    torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]  # torch's
    return cuda_seconds(run)


def host_ms(run: Callable[[], object]) -> float:
    """Milliseconds in which the host sends it all to the GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e3 * seconds


def ceilings_of_the_gpu() -> Table:
    """What it can do at most, measured now."""
    products, reads = product_rate("cuda", cuda_seconds), read_bandwidth(_BUFFER, 0.2, "cuda", cuda_seconds)
    rows = (
        ("bf16 product of 8192 x 8192", products.times(1e-12), "TFLOP/s"),
        ("memory, read", reads.times(1e-9), "GB/s"),
    )
    return Table(torch.cuda.get_device_name(), ("ceiling", "measured", "unit"), rows)


def graphed_moe(problem: Problem) -> Layer:
    """The layer with Triton's kernels, its forward captured once per number of tokens and replayed."""
    layer = equipoise_moe(problem, "triton")
    graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def forward(x_TD: Tensor) -> Tensor:
        if len(x_TD) not in graphs:
            graphs[len(x_TD)] = _captured(layer.forward, x_TD)
        graph, taken, given = graphs[len(x_TD)]
        taken.copy_(x_TD)
        graph.replay()
        return given

    return Layer(layer.module, forward, layer.gradients)


def _captured(forward: Callable[[Tensor], Tensor], x_TD: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
    taken, graph = x_TD.clone(), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels
        forward(taken)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        given = forward(taken)
    return graph, taken, given


GRAPHED = Candidate("equipoise triton, graph", "moe", graphed_moe, trains=False, device="cuda")
