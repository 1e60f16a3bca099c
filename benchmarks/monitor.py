"""What watching costs: training steps with and without an attached Watch. python -m benchmarks.monitor

Two figures for the same thing. The ratio of whole steps includes every side effect, but drowns in the noise of the
steps; the share is the time inside the recording hooks and the flush, taken directly.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.harness import Effort, Spread, Variant, ratio, spread, time_side_by_side
from benchmarks.report import Cell, Report, Table, add_output_arguments, announce, emit
from benchmarks.variants import SHAPES, Shape
from equipoise import MoE, TopK
from equipoise.models.decoder import Decoder, cross_entropy_sum
from equipoise.monitor.recorder import observable_layers
from equipoise.monitor.watch import watch
from equipoise.train.config import TrainConfig
from equipoise.train.optim import build_optimizer
from equipoise.train.recipes import RECIPES


@dataclass(frozen=True, eq=False)
class Workload:
    """step: one training step of the model, on the same random input each time."""

    name: str
    model: nn.Module
    step: Callable[[], None]


def recipe_workload(config: TrainConfig) -> Workload:
    """Forward, backward, clipping and optimizer of a recipe's model on random tokens."""
    model = Decoder(config.model)
    optimizer = build_optimizer(model, config.optim)
    tokens_BS = torch.randint(config.model.vocab_size, (config.batch_size, config.data.seq_len + 1))
    inputs_BS, targets_BS = tokens_BS[:, :-1], tokens_BS[:, 1:]

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.bf16):
            loss = cross_entropy_sum(model(inputs_BS), targets_BS)[0] / targets_BS.numel()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Workload(f"{config.name} recipe, {inputs_BS.numel()} tokens", model, step)


def layer_workload(shape: Shape, num_tokens: int) -> Workload:
    """Forward and backward of one MoE layer in bf16."""
    layer = MoE(shape.dim, shape.hidden_dim, shape.num_experts, router=TopK(k=shape.top_k)).to(torch.bfloat16)
    model = nn.Sequential(layer)
    x_TD = torch.randn(num_tokens, shape.dim, dtype=torch.bfloat16, requires_grad=True)
    grad_TD = torch.randn_like(x_TD)

    def step() -> None:
        torch.autograd.backward(model(x_TD), grad_TD)
        model.zero_grad(set_to_none=True)
        x_TD.grad = None

    return Workload(f"{shape.name} layer, {num_tokens} tokens", model, step)


# ---------------------------------------------------------------------------------------------- the two figures


def side_by_side(work: Workload, every: int, effort: Effort) -> tuple[Spread, Spread]:
    """(seconds of an unwatched step, watched / unwatched). A round is one window of each; attaching is on the clock."""

    def unwatched() -> None:
        for _ in range(every):
            work.step()

    def watched() -> None:
        with watch(work.model, every=every) as eye:
            for number in range(1, every + 1):
                work.step()
                eye.step(number)

    seconds = time_side_by_side([Variant("unwatched", unwatched), Variant("watched", watched)], effort)
    return spread(seconds["unwatched"]).times(1 / every), ratio(seconds, "watched", "unwatched")


@dataclass(frozen=True)
class Window:
    """Seconds of one window: inside the recording hooks, in the flush, and in all."""

    recording: float
    flush: float
    total: float


def timed_window(work: Workload, every: int) -> Window:
    """Watch one window with a clock around the hooks: ours are registered after the recorder's, so run after them."""
    starts: list[float] = []
    spans: list[float] = []
    with watch(work.model, every=every) as eye:
        handles = []
        for layer in observable_layers(work.model).values():
            handles += [
                layer.tap.register_forward_pre_hook(lambda module, args: starts.append(time.perf_counter())),
                layer.tap.register_forward_hook(
                    lambda module, args, output: spans.append(time.perf_counter() - starts[-1])
                ),
            ]
        begin = time.perf_counter()
        for _ in range(every):
            work.step()
        before_flush = time.perf_counter()
        eye.flush(every)
        end = time.perf_counter()
        for handle in handles:
            handle.remove()
    return Window(sum(spans), end - before_flush, end - begin)


def row(work: Workload, every: int, effort: Effort) -> tuple[Cell, ...]:
    """One line of the table."""
    announce(f"{work.name}: steps side by side")
    step, watched = side_by_side(work, every, effort)
    announce(f"{work.name}: inside the hooks")
    windows = [timed_window(work, every) for _ in range(effort.rounds)]
    return (
        work.name,
        step.times(1e3),
        watched,
        spread([1e3 * window.recording / every for window in windows]),
        spread([1e3 * window.flush / every for window in windows]),
        spread([100 * (window.recording + window.flush) / window.total for window in windows]),
    )


COLUMNS = (
    "training step of",
    "unwatched [ms]",
    "watched / unwatched",
    "recording [ms per step]",
    "flush [ms per step]",
    "share of the step [%]",
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitor", description=__doc__)
    parser.add_argument("--every", type=int, default=10, help="steps per window")
    parser.add_argument("--rounds", type=int, default=12, help="windows of each kind")
    add_output_arguments(parser)
    options = parser.parse_args()
    torch.manual_seed(0)
    config, shape, num_tokens, effort = RECIPES["demo"](), SHAPES["coarse"], 4096, Effort(options.rounds, warmup=1)
    if options.smoke:
        torch.set_num_threads(1)
        config, shape, num_tokens = replace(RECIPES["tiny"](), batch_size=2), Shape("coarse", 64, 128, 4, 2), 128
        options.every, effort = 2, Effort(rounds=2, warmup=1)
    works = (recipe_workload(config), layer_workload(shape, num_tokens))
    rows = tuple(row(work, options.every, effort) for work in works)
    note = f"A window is {options.every} steps; one flush and one judgement by the detectors per window."
    settings = {"every": options.every, "rounds": effort.rounds}
    emit(Report(settings, (Table("The cost of watching", COLUMNS, rows, note),)), options)


if __name__ == "__main__":
    main()
