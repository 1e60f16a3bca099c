"""Speed and memory of the MoE layer, forward and backward, beside dense blocks and what others use.

Every variant is first compared with plain fp32, outputs and gradients. Tokens are random, so the load is near even;
what skewed loads cost is not measured here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from equipoise.bench.device import host_ms
from equipoise.bench.harness import Effort, Seconds, Spread, Variant, fastest, ratio, spread, time_side_by_side
from equipoise.bench.ours import picked
from equipoise.bench.problem import Candidate, Layer, Problem, Shape, described, make_problem
from equipoise.bench.report import Cell, Table
from equipoise.bench.saved import MIB, lean_formula, saved_for_backward
from equipoise.bench.variants import available, drop_gradients, inference_errors, trained_layers, variants


def measure(
    shape: Shape,
    num_tokens: int,
    dtype: torch.dtype,
    effort: Effort,
    only: tuple[str, ...] = (),
    device: str = "cpu",
) -> Iterator[Table | str]:
    """Tables, and notes about what was left out, of one shape. The effort's clock is for that device."""
    problem = make_problem(shape, num_tokens, dtype, device=device)
    candidates, notes = available(variants(), problem, num_tokens, only, training=True)
    yield from notes
    effort.progress.begin(f"{shape.name}: comparing {len(candidates)} variants with fp32")
    layers, errors = trained_layers(problem, candidates)
    effort.progress.begin(f"{shape.name}: forward + backward")
    yield training_table(problem, candidates, layers, errors, effort)
    yield memory_table(problem, layers)
    if device == "cuda":
        yield peak_table(problem, layers)
    effort.progress.begin(f"{shape.name}: inference")
    yield inference_table(problem, candidates, layers, effort)


def training_table(
    problem: Problem,
    candidates: Mapping[str, Candidate],
    layers: Mapping[str, Layer],
    errors: Mapping[str, float],
    effort: Effort,
) -> Table:
    """Forward and backward of the whole layer, router included.

    As in a training loop, each run gets new tokens, so that no expert sees the same number of rows twice, and comes
    after another one of the same variant: the caches of libraries hold what this variant left in them.
    """
    x_TD = problem.x_TD.clone().requires_grad_()

    def run(layer: Layer) -> None:
        torch.autograd.backward(layer.forward(x_TD), problem.grad_TD)

    for layer in layers.values():
        layer.module.train()

    def renew(layer: Layer) -> None:
        for warm in (True, False):
            drop_gradients(layer, x_TD)
            with torch.no_grad():
                x_TD.normal_()
            if warm:
                run(layer)

    runs = [Variant(name, partial(run, layer), partial(renew, layer)) for name, layer in layers.items()]
    seconds = time_side_by_side(runs, effort)
    flops, unit = 3 * problem.shape.flops(len(x_TD)), 1e12 if x_TD.is_cuda else 1e9
    rows = tuple(
        (name, shown.times(1e3), flops / unit / shown.median, *ratios, errors[name])
        for name, shown, ratios in compared(seconds, candidates, picked(problem, len(x_TD), training=True))
    )
    columns = ("forward + backward", "ms", "TFLOP/s" if x_TD.is_cuda else "GFLOP/s", *COMPARED, "error")
    return Table(described(problem, len(x_TD)), columns, rows, note(seconds, candidates, problem, training=True))


def inference_table(
    problem: Problem, candidates: Mapping[str, Candidate], layers: Mapping[str, Layer], effort: Effort
) -> Table:
    """Forward of all tokens in inference mode: a prefill."""
    errors = inference_errors(problem, candidates, layers, len(problem.x_TD))

    def run(layer: Layer) -> Tensor:
        with torch.inference_mode():
            return layer.forward(problem.x_TD)

    seconds = time_side_by_side([Variant(name, partial(run, layer)) for name, layer in layers.items()], effort)
    ours = picked(problem, len(problem.x_TD), training=False)
    rows = tuple(
        (name, shown.times(1e3), *ratios, errors[name]) for name, shown, ratios in compared(seconds, candidates, ours)
    )
    title = described(problem, len(problem.x_TD))
    return Table(title, ("inference", "ms", *COMPARED, "error"), rows, note(seconds, candidates, problem, False))


def memory_table(problem: Problem, layers: Mapping[str, Layer]) -> Table:
    """Bytes that each variant keeps for its backward."""
    x_TD = problem.x_TD.clone().requires_grad_()
    kept = {
        name: saved_for_backward(partial(layer.forward, x_TD), layer.module.parameters()) / MIB
        for name, layer in layers.items()
    }
    shape, ours = problem.shape, kept.get(picked(problem, len(x_TD), training=True))
    formula = lean_formula(len(x_TD), shape.dim, shape.hidden_dim, shape.top_k, x_TD.dtype.itemsize) / MIB
    rows = tuple((name, mib, mib / ours if ours else None, mib / formula) for name, mib in kept.items())
    text = (
        f"The input is counted, parameters are not. formula: 2TD + 4TKF in bf16, twice that in fp32, {formula:.1f} "
        "MiB; the router's logits, probabilities and indices come on top."
    )
    columns = ("kept for backward", "MiB", "memory / equipoise", "memory / formula")
    return Table(described(problem, len(x_TD)), columns, rows, text)


def peak_table(problem: Problem, layers: Mapping[str, Layer]) -> Table:
    """What a GPU's allocator held at most beyond what it held before, and how long the host takes to send the work."""
    x_TD = problem.x_TD.clone().requires_grad_()
    gradients = 3 * problem.shape.num_experts * problem.shape.dim * problem.shape.hidden_dim * x_TD.element_size()
    rows = []

    def run(layer: Layer) -> None:
        torch.autograd.backward(layer.forward(x_TD), problem.grad_TD)

    for name, layer in layers.items():
        drop_gradients(layer, x_TD)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(layer)
        peak = (torch.cuda.max_memory_allocated() - before) / MIB
        drop_gradients(layer, x_TD)
        rows.append((name, peak, host_ms(partial(run, layer))))
        drop_gradients(layer, x_TD)
    text = f"Gradients of the experts' weights are in it: {gradients / MIB:.0f} MiB, dense has fewer."
    return Table(described(problem, len(x_TD)), ("forward + backward", "peak, MiB", "host, ms"), tuple(rows), text)


COMPARED = ("time / dense", "time / equipoise")


def compared(
    seconds: Seconds, candidates: Mapping[str, Candidate], ours: str
) -> list[tuple[str, Spread, tuple[Cell, ...]]]:
    """(name, seconds, the cells of `COMPARED`) of each variant."""
    dense = fastest_dense(seconds, candidates)
    return [
        (name, spread(times), tuple(ratio(seconds, name, base) if base in seconds else None for base in (dense, ours)))
        for name, times in seconds.items()
    ]


def fastest_dense(seconds: Seconds, candidates: Mapping[str, Candidate]) -> str:
    """The faster of the dense blocks; "" where none was measured."""
    names = [name for name in seconds if candidates[name].computes == "dense"]
    return fastest(seconds, names) if names else ""


def note(seconds: Seconds, candidates: Mapping[str, Candidate], problem: Problem, training: bool) -> str:
    """What the ratios are of."""
    dense, ours = fastest_dense(seconds, candidates), picked(problem, len(problem.x_TD), training)
    return (
        f"dense: {dense or 'not measured'}, the faster of the two of hidden size K F, with the same active arithmetic. "
        f'equipoise: {ours}, which backend="auto" picks here. Above 1 is slower.'
    )
