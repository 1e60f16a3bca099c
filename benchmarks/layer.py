"""Speed and memory of the MoE layer beside dense blocks and transformers: python -m benchmarks.layer

Every variant is first compared with plain fp32: outputs and gradients for training, outputs for inference. Tokens are
random, so the load is near even; what skewed loads cost is not measured here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.memory import MIB, lean_formula, saved_for_backward
from benchmarks.variants import (
    SHAPES,
    VARIANTS,
    Candidate,
    Layer,
    LeftOutError,
    Problem,
    Shape,
    dense_fused,
    make_problem,
    plain_moe,
)
from equipoise.bench.harness import (
    Effort,
    Seconds,
    Spread,
    Variant,
    fastest,
    ratio,
    require_same,
    spread,
    time_side_by_side,
)
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.layer.experts import backend_for

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ERROR_LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
DECODE_SIZES = (1, 16, 64)
DECODE_SECONDS = 0.02  # per round and variant: one call is too short for a clock
DECODE_NOTE = (
    "At decode sizes reading weights takes the time: an MoE reads every expert that any of the tokens uses, the dense "
    "block only its own K experts' worth."
)
SMOKE_SHAPES = (Shape("coarse", 64, 128, 4, 2), Shape("fine", 64, 32, 8, 4))


# ---------------------------------------------------------------------------------------------- building and checking


def available(problem: Problem, num_tokens: int, only: str = "") -> tuple[dict[str, Candidate], list[str]]:
    """(the variants of those asked for that can run with so many tokens, a note for each that can't)."""
    can_run, notes = {}, []
    for candidate in VARIANTS:
        if not any(part in candidate.name for part in only.split(",")):
            continue
        try:
            candidate.check(problem.shape, num_tokens, problem.x_TD.dtype)
            can_run[candidate.name] = candidate
        except LeftOutError as reason:
            notes.append(f"{candidate.name} left out: {reason}.")
    return can_run, notes


def checked_layers(problem: Problem, candidates: Mapping[str, Candidate]) -> tuple[dict[str, Layer], dict[str, float]]:
    """(the built layers, their relative errors against fp32). Raises ValueError when one computes something else."""
    expected = {
        "moe": outcome(plain_moe(problem.float()), problem.float()),
        "dense": outcome(dense_fused(problem.float()), problem.float()),
    }
    layers, errors, limit = {}, {}, ERROR_LIMITS[problem.x_TD.dtype]
    for name, candidate in candidates.items():
        layer = layers[name] = candidate.build(problem)
        errors[name] = require_same(name, outcome(layer, problem), expected[candidate.computes], limit)
        drop_gradients(layer)
    return layers, errors


def outcome(layer: Layer, problem: Problem) -> tuple[Tensor, ...]:
    """Output, and the gradients of the input and the weights."""
    x_TD = problem.x_TD.clone().requires_grad_()
    y_TD = layer.forward(x_TD)
    torch.autograd.backward(y_TD, problem.grad_TD)
    assert x_TD.grad is not None
    return y_TD.detach(), x_TD.grad, *layer.gradients()


def drop_gradients(layer: Layer, x_TD: Tensor | None = None) -> None:
    """Free the gradients of the weights, and of x."""
    layer.module.zero_grad(set_to_none=True)
    if x_TD is not None:
        x_TD.grad = None


# ---------------------------------------------------------------------------------------------- tables


def training_table(problem: Problem, layers: Mapping[str, Layer], errors: Mapping[str, float], effort: Effort) -> Table:
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

    variants = [Variant(name, partial(run, layer), partial(renew, layer)) for name, layer in layers.items()]
    seconds = time_side_by_side(variants, effort)
    gflop = 3 * problem.shape.flops(len(x_TD)) / 1e9
    columns = ("forward + backward", "ms", "GFLOP/s", "time / dense", "time / equipoise", "error")
    rows = tuple(
        (name, shown.times(1e3), gflop / shown.median, *ratios, errors[name])
        for name, shown, ratios in _compared(seconds, picked(problem))
    )
    return Table(_title(problem, len(x_TD)), columns, rows, _note(seconds, problem))


def inference_table(problem: Problem, layers: Mapping[str, Layer], num_tokens: int, effort: Effort) -> Table:
    """Forward in inference mode, of the first num_tokens tokens."""
    x_TD = problem.x_TD[:num_tokens]

    def run(layer: Layer) -> Tensor:
        with torch.inference_mode():
            return layer.forward(x_TD)

    kinds = {candidate.name: candidate.computes for candidate in VARIANTS}
    exact = problem.float()
    with torch.no_grad():
        expected = {"moe": plain_moe(exact).forward(x_TD.float()), "dense": dense_fused(exact).forward(x_TD.float())}
    errors = {}
    for name, layer in layers.items():
        layer.module.eval()
        errors[name] = require_same(name, [run(layer)], [expected[kinds[name]]], ERROR_LIMITS[x_TD.dtype])
    seconds = time_side_by_side([Variant(name, partial(run, layer)) for name, layer in layers.items()], effort)
    columns = ("inference", "ms", "time / dense", "time / equipoise", "error")
    rows = tuple(
        (name, shown.times(1e3), *ratios, errors[name]) for name, shown, ratios in _compared(seconds, picked(problem))
    )
    return Table(_title(problem, num_tokens), columns, rows, _note(seconds, problem))


def memory_table(problem: Problem, layers: Mapping[str, Layer]) -> Table:
    """Bytes that each variant keeps for its backward."""
    x_TD = problem.x_TD.clone().requires_grad_()
    kept = {
        name: saved_for_backward(partial(layer.forward, x_TD), layer.module.parameters()) / MIB
        for name, layer in layers.items()
    }
    shape, ours = problem.shape, kept[picked(problem)]
    formula = lean_formula(len(x_TD), shape.dim, shape.hidden_dim, shape.top_k, x_TD.dtype.itemsize) / MIB
    rows = tuple((name, mib, mib / ours) for name, mib in kept.items())
    note = (
        f"The input is counted, parameters are not. 2TD + 4TKF in bf16, twice that in fp32, is {formula:.1f} MiB; "
        "the router's logits, probabilities and indices come on top."
    )
    return Table(_title(problem, len(x_TD)), ("kept for backward", "MiB", "memory / equipoise"), rows, note)


def picked(problem: Problem) -> str:
    """The variant that backend="auto" is."""
    name, _ = backend_for("auto", problem.x_TD, problem.up_EHD, problem.down_EDF)
    return f"equipoise {name}"


def _compared(seconds: Seconds, ours: str) -> list[tuple[str, Spread, tuple[Cell, Cell]]]:
    dense = _fastest_dense(seconds)
    return [
        (name, spread(times), (ratio(seconds, name, dense), ratio(seconds, name, ours)))
        for name, times in seconds.items()
    ]


def _fastest_dense(seconds: Seconds) -> str:
    kinds = {candidate.name: candidate.computes for candidate in VARIANTS}
    return fastest(seconds, [name for name in seconds if kinds[name] == "dense"])


def _title(problem: Problem, num_tokens: int) -> str:
    shape = problem.shape
    sizes = f"T={num_tokens} D={shape.dim} F={shape.hidden_dim} E={shape.num_experts} K={shape.top_k}"
    return f"{shape.name}: {sizes}, {str(problem.x_TD.dtype).removeprefix('torch.')}"


def _note(seconds: Seconds, problem: Problem) -> str:
    return (
        f"dense: {_fastest_dense(seconds)!r}, the faster of the two of hidden size K F. "
        f'equipoise: {picked(problem)!r}, which backend="auto" picks here.'
    )


# ---------------------------------------------------------------------------------------------- the command


def measure(shape: Shape, options: argparse.Namespace, effort: Effort) -> tuple[list[Table], list[str]]:
    """(tables, notes) of one shape."""
    problem = make_problem(shape, options.tokens, DTYPES[options.dtype])
    candidates, notes = available(problem, options.tokens, options.only)
    announce(f"{shape.name}: comparing {len(candidates)} variants with fp32")
    layers, errors = checked_layers(problem, candidates)
    tables = []
    announce(f"{shape.name}: forward + backward")
    tables.append(training_table(problem, layers, errors, effort))
    announce(f"{shape.name}: inference and memory")
    tables.append(inference_table(problem, layers, options.tokens, effort))
    tables.append(memory_table(problem, layers))
    for num_tokens in DECODE_SIZES:
        announce(f"{shape.name}: decode sizes, T={num_tokens}")
        candidates, more_notes = available(problem, num_tokens, options.only)
        few = {name: layers.get(name) or candidate.build(problem) for name, candidate in candidates.items()}
        tables.append(inference_table(problem, few, num_tokens, effort.filling(DECODE_SECONDS)))
        notes += more_notes
    return tables, notes


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}; separated by commas")
    parser.add_argument("--tokens", type=int, default=4096, help="T of training, prefill and memory")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="variants with one of these in the name, e.g. lean,dense")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    add_output_arguments(parser)
    options = parser.parse_args()
    if unknown := set(options.shapes.split(",")) - set(SHAPES):
        parser.error(f"--shapes: expected some of {', '.join(SHAPES)}, got {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    effort = Effort(options.rounds)
    shapes = [SHAPES[name] for name in options.shapes.split(",")]
    if options.smoke:
        torch.set_num_threads(1)
        options.tokens, effort = 128, Effort(rounds=2, warmup=1)
        shapes = [shape for shape in SMOKE_SHAPES if shape.name in options.shapes.split(",")]
    tables: list[Table] = []
    notes: list[str] = []
    for shape in shapes:
        more_tables, more_notes = measure(shape, options, effort)
        tables += more_tables
        notes += more_notes
    settings = {"dtype": options.dtype, "rounds": effort.rounds, "warmup": effort.warmup}
    emit(Report(settings, tuple(tables), tuple(dict.fromkeys([*notes, DECODE_NOTE]))), options)


if __name__ == "__main__":
    main()
