"""What the chunked scan gains over the plain one, and what the monitor's sums over product keys cost.

    python -m benchmarks.alternatives

One process, variants in alternation, results compared before they are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from equipoise.bench.harness import Effort, Variant, ratio, require_same, spread, time_side_by_side
from equipoise.bench.report import Report, Table, add_output_arguments, announce, emit
from equipoise.layer import Peer, ProductKeyExperts
from equipoise.monitor.recorder import Recorder
from equipoise.ops.selective_scan import ScanInputs, chunked_scan, plain_scan

Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = ((16, 64, 128, 16), (4, 256, 128, 16), (1, 512, 256, 16))  # batch, steps, channels, state
CHUNKS = (8, 32, 128)
EXPERTS = (1024, 4096, 16384)
Scan = Callable[[ScanInputs], tuple[Tensor, Tensor]]


def scan_inputs(shape: Shape) -> ScanInputs:
    """Step sizes and decays as a layer has them at the beginning."""
    B, S, I, N = shape  # noqa: E741 - the paper's letters
    rng = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(B, S, width, generator=rng) for width in (I, N, N))
    dt = torch.empty(B, S, I).uniform_(-6.9, -2.3, generator=rng).exp()
    A_IN = -torch.arange(1.0, N + 1).expand(I, N).clone()
    return ScanInputs(*(each.requires_grad_() for each in (x, dt, A_IN, b, c, torch.zeros(B, I, N))))


def train(scan: Scan, inputs: ScanInputs) -> list[Tensor]:
    """Forward and backward."""
    y, h = scan(inputs)
    return [y.detach(), *torch.autograd.grad(y.square().sum() + h.sum(), tuple(vars(inputs).values()))]


def infer(scan: Scan, inputs: ScanInputs) -> list[Tensor]:
    """Forward alone."""
    with torch.no_grad():
        return list(scan(inputs))


def scan_table(shapes: Sequence[Shape], effort: Effort) -> Table:
    """How many times as fast as the plain scan."""
    rows = []
    scans: dict[str, Scan] = {"plain": plain_scan}
    scans |= {f"chunks of {chunk}": partial(chunked_scan, chunk=chunk) for chunk in CHUNKS}
    for shape in shapes:
        inputs = scan_inputs(shape)
        for what, run in (("training", train), ("forward", infer)):
            for name, scan in scans.items():
                require_same(name, run(scan, inputs), run(plain_scan, inputs), 1e-4)
            variants = [Variant(name, partial(run, scan, inputs)) for name, scan in scans.items()]
            seconds = time_side_by_side(variants, effort)
            ms = spread(seconds["plain"]).times(1e3)
            rows.append((str(shape), what, ms, *(ratio(seconds, "plain", name) for name in list(scans)[1:])))
    columns = ("batch, steps, channels, state", "", "plain [ms]", *(f"{name} [x]" for name in list(scans)[1:]))
    return Table("How many times as fast as the plain scan", columns, tuple(rows))


def monitor_table(sizes: Sequence[int], effort: Effort) -> Table:
    """A PEER layer's training step with the monitor attached, against without."""
    rows = []
    for num_experts in sizes:
        torch.manual_seed(0)
        config = Peer(num_experts=num_experts, heads=4, k=8, key_dim=16)
        bare, watched = ProductKeyExperts(64, config), ProductKeyExperts(64, config)
        watched.load_state_dict(bare.state_dict())
        recorder = Recorder(watched)
        x = torch.randn(16, 64, 64)

        def step(layer: ProductKeyExperts, x: Tensor = x) -> Tensor:
            y: Tensor = layer(x)
            y.square().sum().backward()
            layer.zero_grad(set_to_none=True)
            return y.detach()

        require_same("watched", [step(watched)], [step(bare)], 0.0)
        both = [Variant("bare", partial(step, bare)), Variant("watched", partial(step, watched))]
        seconds = time_side_by_side(both, effort)
        ms = spread(seconds["bare"]).times(1e3)
        rows.append((num_experts, ms, ratio(seconds, "watched", "bare"), len(recorder._buffers.words) * 8 / 1024))
    columns = ("experts", "step [ms]", "watched [x]", "buffers [KiB]")
    return Table("A PEER layer under watch, 1024 tokens, 4 heads of 8, dim 64", columns, tuple(rows))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    add_output_arguments(parser)
    options = parser.parse_args()
    effort = Effort(options.rounds, 1)
    shapes, sizes = SHAPES, EXPERTS
    if options.smoke:
        effort, shapes, sizes = Effort(2, 1), ((1, 9, 4, 2),), (64,)
    announce("scans")
    scans = scan_table(shapes, effort)
    announce("product keys under watch")
    emit(Report({"rounds": effort.rounds}, (scans, monitor_table(sizes, effort))), options)


if __name__ == "__main__":
    main()
