"""How time and memory grow with tokens, experts and size, each with its fitted exponent.

Of one layer: time and what is kept for backward against tokens, time against experts at the same active arithmetic.
Of files: a checkpoint's save and load against the disk's own speed, and a model's start-up. Of the package: its import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from equipoise.bench import startup
from equipoise.bench.fit import power_law
from equipoise.bench.harness import Effort, Seconds, Variant, in_sections, ratio, spread, time_side_by_side
from equipoise.bench.problem import Shape
from equipoise.bench.report import Table
from equipoise.bench.saved import MIB, lean_formula, saved_for_backward
from equipoise.layer import MoE
from equipoise.routing import TopK


@dataclass(frozen=True)
class Sizes:
    """What is varied. shape: of the layer, whose experts are varied in `num_experts`. megabytes: of models on disk."""

    shape: Shape
    tokens: int
    num_tokens: tuple[int, ...]
    num_experts: tuple[int, ...]
    megabytes: tuple[int, ...]


FULL = Sizes(
    shape=Shape("scaling", dim=512, hidden_dim=256, num_experts=64, top_k=8),
    tokens=4096,
    num_tokens=(256, 512, 1024, 2048, 4096, 8192, 16384),
    num_experts=(8, 16, 32, 64, 128, 256, 512),
    megabytes=(1, 4, 16, 64, 256),
)
QUICK = Sizes(
    shape=Shape("scaling", dim=32, hidden_dim=16, num_experts=8, top_k=2),
    tokens=128,
    num_tokens=(64, 128, 256),
    num_experts=(4, 8, 16),
    megabytes=(1, 2, 4),
)


def build(shape: Shape, dtype: torch.dtype) -> MoE:
    """A layer in training, with random weights."""
    layer = MoE(shape.dim, shape.hidden_dim, shape.num_experts, router=TopK(k=shape.top_k))
    return layer.to(dtype).train()


def training_variant(name: str, layer: MoE, num_tokens: int, dtype: torch.dtype) -> Variant:
    """Forward and backward of new random tokens."""
    x_TD = torch.randn(num_tokens, layer.experts.dim).to(dtype).requires_grad_()
    grad_TD = torch.randn_like(x_TD)

    def run() -> None:
        torch.autograd.backward(layer(x_TD), grad_TD)

    @torch.no_grad()
    def reset() -> None:
        layer.zero_grad(set_to_none=True)
        x_TD.normal_()
        x_TD.grad = None

    return Variant(name, run, reset)


def tokens_tables(sizes: Sizes, dtype: torch.dtype, effort: Effort) -> Iterator[Table]:
    """Time and kept memory against T."""
    shape, layer = sizes.shape, build(sizes.shape, dtype)
    seconds = time_side_by_side(
        [training_variant(str(number), layer, number, dtype) for number in sizes.num_tokens], effort
    )
    few = str(sizes.num_tokens[0])
    rows = []
    for number in sizes.num_tokens:
        x_TD = torch.randn(number, shape.dim).to(dtype).requires_grad_()
        kept = saved_for_backward(partial(layer, x_TD), layer.parameters())
        formula = lean_formula(number, shape.dim, shape.hidden_dim, shape.top_k, dtype.itemsize)
        per_token = ratio(seconds, str(number), few).times(sizes.num_tokens[0] / number)
        took = spread(seconds[str(number)])
        rows.append((f"T={number}", took.times(1e3), took.times(1e6 / number), per_token, kept / MIB, kept / formula))
    columns = ("tokens", "ms", "us per token", f"per token / T={few}", "kept [MiB]", "kept / formula")
    large = [number for number in sizes.num_tokens if number >= sizes.num_tokens[-1] // 16]
    memory = power_law(sizes.num_tokens, [row[4] for row in rows]).shown()
    note = (
        f"Time grows as T^{exponent(sizes.num_tokens, seconds)}; from T={large[0]} on as T^{exponent(large, seconds)}; "
        f"kept memory as T^{memory}. In brackets the 95 % interval. Aim: linear, 1. Few tokens read all weights, too. "
        "formula: 2TD + 4TKF in bf16, twice that in fp32."
    )
    yield Table(
        f"tokens: D={shape.dim} F={shape.hidden_dim} E={shape.num_experts} K={shape.top_k}", columns, tuple(rows), note
    )


def experts_tables(sizes: Sizes, dtype: torch.dtype, effort: Effort) -> Iterator[Table]:
    """Time against E, at fixed K and so at fixed active arithmetic: the experts' size does not change."""
    shape = sizes.shape
    layers = {number: build(replace(shape, num_experts=number), dtype) for number in sizes.num_experts}
    training = time_side_by_side(
        [training_variant(str(number), layer, sizes.tokens, dtype) for number, layer in layers.items()], effort
    )
    x_TD = torch.randn(sizes.tokens, shape.dim).to(dtype)

    def infer(layer: MoE) -> Tensor:
        with torch.inference_mode():
            y_TD: Tensor = layer(x_TD)
            return y_TD

    for layer in layers.values():
        nn.Module.eval(layer)
    inference = time_side_by_side(
        [Variant(str(number), partial(infer, layer)) for number, layer in layers.items()], effort
    )
    few = str(sizes.num_experts[0])
    rows = tuple(
        (
            f"E={number}",
            spread(training[str(number)]).times(1e3),
            ratio(training, str(number), few),
            spread(inference[str(number)]).times(1e3),
            ratio(inference, str(number), few),
        )
        for number in sizes.num_experts
    )
    columns = ("experts", "forward + backward [ms]", f"/ E={few}", "inference [ms]", f"inference / E={few}")
    note = (
        f"{sizes.tokens} tokens. Time grows as E^{exponent(sizes.num_experts, training)} in training and as "
        f"E^{exponent(sizes.num_experts, inference)} in inference. Aim: flat within 1.2. Gradients of all weights are "
        "written, and they grow with E; so do the few rows that an expert gets shrink."
    )
    yield Table(f"experts: D={shape.dim} F={shape.hidden_dim} K={shape.top_k}", columns, rows, note)


def disk_tables(sizes: Sizes, dtype: torch.dtype, effort: Effort) -> Iterator[Table]:
    """Checkpoints and start-up against size."""
    yield from startup.disk_tables(sizes.megabytes, effort)


def import_tables(sizes: Sizes, dtype: torch.dtype, effort: Effort) -> Iterator[Table]:
    """What importing the package costs."""
    yield startup.import_table(effort)


SECTIONS: dict[str, Callable[[Sizes, torch.dtype, Effort], Iterator[Table]]] = {
    "tokens": tokens_tables,
    "experts": experts_tables,
    "disk": disk_tables,
    "import": import_tables,
}


def measure(sizes: Sizes, dtype: torch.dtype, effort: Effort, only: tuple[str, ...] = ()) -> Iterator[Table | str]:
    """The tables of each section. Raises ValueError for a section that is not there."""
    yield from in_sections({name: partial(each, sizes, dtype) for name, each in SECTIONS.items()}, effort, only)


def exponent(numbers: Sequence[int], seconds: Seconds) -> str:
    """Of the medians."""
    return power_law(numbers, [spread(seconds[str(number)]).median for number in numbers]).shown()
