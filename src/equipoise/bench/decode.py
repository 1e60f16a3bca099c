"""A few tokens through one layer, as in decoding: against the memory's read bandwidth, int8 and int4, and peers.

Each call takes other tokens, which choose other experts: the layer's weights are far larger than the cache, and a call
that found its experts there would say nothing. Every variant's outputs are first compared with plain fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from equipoise.bench.ceilings import BUFFER, GB, read_bandwidth
from equipoise.bench.device import GRAPHED
from equipoise.bench.harness import Effort, Seconds, Spread, Variant, fastest, ratio, spread, time_side_by_side
from equipoise.bench.ours import equipoise_moe, picked
from equipoise.bench.peers import torchao
from equipoise.bench.problem import Candidate, Layer, LeftOutError, Problem, Shape, described, make_problem
from equipoise.bench.report import Cell, Table
from equipoise.bench.variants import available, inference_errors, variants
from equipoise.small import expert_bytes, quantize_experts

POOL = 256  # tokens to choose from
OURS = "equipoise auto"
QUANTISED = {"equipoise int8": 8, "equipoise int4": 4}


def measure(
    shape: Shape,
    sizes: Sequence[int],
    dtype: torch.dtype,
    effort: Effort,
    only: tuple[str, ...] = (),
    device: str = "cpu",
) -> Iterator[Table | str]:
    """A table for each number of tokens, and notes about what was left out.

    effort: with least seconds per round and variant: one call is too short for a clock.
    """
    problem = make_problem(shape, max(POOL, *sizes), dtype, device=device)
    bandwidth = read_bandwidth(BUFFER if device == "cpu" else 4 * BUFFER, device=device, clock=effort.clock)
    every = decode_variants()
    built: dict[str, Layer] = {}
    for num_tokens in sizes:
        candidates, notes = available(every, problem, num_tokens, only)
        yield from notes
        effort.progress.begin(f"{shape.name}, T={num_tokens}: comparing {len(candidates)} variants with fp32")
        for name in candidates:
            if name not in built:
                built[name] = candidates[name].build(problem)
        layers = {name: built[name] for name in candidates}
        errors = inference_errors(problem, candidates, layers, num_tokens)
        effort.progress.begin(f"{shape.name}, T={num_tokens}: decoding")
        yield table(problem, layers, num_tokens, errors, bandwidth, effort)


def decode_variants() -> tuple[Candidate, ...]:
    """What `variants` has, the layer as it is by default, and experts of fewer bits."""
    auto = Candidate(OURS, "moe", partial(equipoise_moe, backend="auto"), trains=False)
    quantised = (
        Candidate(name, f"int{bits}", partial(quantised_moe, bits=bits), needs_packing, False, "cpu")
        for name, bits in QUANTISED.items()
    )
    return (auto, *variants(), GRAPHED, *quantised, *torchao.VARIANTS)


def quantised_moe(problem: Problem, bits: int) -> Layer:
    """The layer with its experts in int8 or int4, a scale and a zero per 64 weights."""
    layer = equipoise_moe(problem, backend="auto")
    quantize_experts(nn.Sequential(layer.module), bits=bits)
    return layer


def needs_packing(shape: Shape, num_tokens: int, dtype: torch.dtype) -> None:
    """Raise LeftOutError for sizes that the formats can't take."""
    if shape.dim % 64 or shape.hidden_dim % 64:
        raise LeftOutError(f"int8 and int4 are packed in groups of 64, and D={shape.dim} F={shape.hidden_dim}")


def windows(num_tokens: int, pool: int) -> list[slice]:
    """Tokens of one call after the other, each of the pool in turn."""
    return [slice(start, start + num_tokens) for start in range(0, pool - num_tokens + 1, num_tokens)]


def touched_experts(problem: Problem, num_tokens: int) -> float:
    """How many experts the tokens of a call use, on average over the calls."""
    scores_TE = problem.x_TD.float() @ problem.router_ED.float().t()
    ids_TK = scores_TE.topk(problem.shape.top_k, dim=-1).indices
    used = [len(set(ids_TK[window].flatten().tolist())) for window in windows(num_tokens, len(problem.x_TD))]
    return sum(used) / len(used)


def bytes_per_expert(name: str, layer: Layer, problem: Problem) -> float:
    """Of its weights, as this variant keeps them."""
    if name in QUANTISED:
        return expert_bytes(layer.module) / problem.shape.num_experts
    bits = 8 if "int8" in name else 8 * problem.x_TD.element_size()
    return 3 * problem.shape.dim * problem.shape.hidden_dim * bits / 8


def table(
    problem: Problem,
    layers: Mapping[str, Layer],
    num_tokens: int,
    errors: Mapping[str, float],
    bandwidth: Spread,
    effort: Effort,
) -> Table:
    """Microseconds, bytes per second, and ratios."""
    places = windows(num_tokens, len(problem.x_TD))
    turns = {name: count() for name in layers}

    def run(name: str) -> Tensor:
        place = places[next(turns[name]) % len(places)]
        with torch.inference_mode():
            return layers[name].forward(problem.x_TD[place])

    seconds = time_side_by_side([Variant(name, partial(run, name)) for name in layers], effort)
    touched = touched_experts(problem, num_tokens)
    theirs = best(seconds, "transformers")
    rows: list[tuple[Cell, ...]] = []
    for name, times in seconds.items():
        dense = name.startswith("dense")
        experts = problem.shape.top_k if dense else touched
        rate = spread([experts * bytes_per_expert(name, layers[name], problem) / one for one in times])
        rows.append(
            (
                name,
                spread(times).times(1e6),
                spread([num_tokens / one for one in times]),
                rate.times(1 / GB),
                rate.times(1 / bandwidth.median),
                ratio(seconds, OURS, name) if OURS in seconds else None,
                ratio(seconds, theirs, name) if theirs else None,
                errors[name],
            )
        )
    rows.append(("memory, read", None, None, bandwidth.times(1 / GB), 1.0, None, None, None))
    columns = (
        "decode",
        "us",
        "tokens/s",
        "GB/s",
        "of the memory's",
        "speed / equipoise",
        "speed / transformers",
        "error",
    )
    auto, peer = picked(problem, num_tokens, training=False), theirs or "none of them, which were left out"
    note = (
        f"{touched:.1f} experts of {problem.shape.num_experts} are read per call, by the dense block K experts' worth. "
        f"speed / equipoise: against {OURS}, which is {auto} here; 2 is twice as fast. "
        f"speed / transformers: against {peer}, its fastest here."
    )
    return Table(described(problem, num_tokens), columns, tuple(rows), note)


def best(seconds: Seconds, start: str) -> str | None:
    """The fastest whose name begins so; None where there is none."""
    names = [name for name in seconds if name.startswith(start)]
    return fastest(seconds, names) if names else None
