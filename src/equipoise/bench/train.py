"""A whole training step, tokens per second: our loop beside transformers' Mixtral in its Trainer, of the same sizes.

Both get the same batches of the same text in the same type, clip the gradient and step with AdamW. The models compute
the same function of the same weights, which is checked first. Chunks of steps alternate.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from equipoise.bench.harness import Effort, Seconds, fastest, ratio, spread
from equipoise.bench.peers import trainer
from equipoise.bench.peers.mixtral import LOGITS_LIMIT, logits_error, mixtral_of
from equipoise.bench.problem import LeftOutError
from equipoise.bench.report import Table
from equipoise.layer import reduce_and_update
from equipoise.models.decoder import Decoder
from equipoise.train.config import TrainConfig
from equipoise.train.data import Batch, Loader, TokenData
from equipoise.train.loop import Trainer
from equipoise.train.optim import build_optimizer
from equipoise.train.report import Silent
from equipoise.train.run import open_data
from equipoise.train.spread import Alone
from equipoise.train.step import gradients

Steps = Callable[[int], float]  # so many steps -> seconds of one
LOOP, STEP = "equipoise, the whole loop", "equipoise, the step alone"


@dataclass(frozen=True)
class Sized:
    """The model of a recipe and what one token meets of it. num_active: parameters that a token uses."""

    num_parameters: int
    num_active: int


def measure(config: TrainConfig, steps: int, effort: Effort, only: tuple[str, ...] = ()) -> Iterator[Table | str]:
    """A table of training steps, and notes."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        effort.progress.begin("text")
        opened, data = open_data(replace(config, recover=False, eval_every=0, checkpoint_every=0, steps=10**6))
        model = Decoder(opened.model)
        sides: dict[str, Steps] = {STEP: own_steps(model, opened, data)}
        whole = Trainer(opened, data, folder / "run", Silent())
        stack.callback(whole.close, "finished")
        sides[LOOP] = loop_steps(whole)
        try:
            sides |= their_steps(model, opened, data, folder)
        except LeftOutError as reason:
            yield f"transformers left out: {reason}."
        sides = {name: each for name, each in sides.items() if not only or any(part in name for part in only)}
        effort.progress.begin(f"{config.name}: {steps} steps of each of {len(sides)} sides, in turn")
        seconds = alternate(sides, steps, effort)
        yield table(opened, sized(model), seconds)


def own_steps(model: Decoder, config: TrainConfig, data: TokenData) -> Steps:
    """The loop's step without a run around it: no monitor, no store."""
    optimizer, alone = build_optimizer(model, config.optim), Alone(list(model.parameters()))
    loader = Loader(data.train, config.batch_size, config.data.seq_len, config.seed)
    number = 0

    def run(steps: int) -> float:
        nonlocal number
        start = time.perf_counter()
        for _ in range(steps):
            number += 1
            batch: Batch = loader.next_batch()
            gradients(model, [batch], number, config.bf16, None)
            alone.clip(config.optim.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            reduce_and_update(model.moe_layers.values(), alone.reduce, step=number)
        return (time.perf_counter() - start) / steps

    return run


def loop_steps(whole: Trainer) -> Steps:
    """`equipoise train`, step by step: monitor, store and all."""

    def run(steps: int) -> float:
        start = time.perf_counter()
        whole.run(until=whole.step_number + steps)
        return (time.perf_counter() - start) / steps

    return run


def their_steps(model: Decoder, config: TrainConfig, data: TokenData, folder: Path) -> Mapping[str, Steps]:
    """Mixtral in the Trainer, with its balancing loss as ours has one, and without.

    Raises LeftOutError without transformers and accelerate, ValueError when it does not compute what ours does.
    """
    trainer.check()
    loader = Loader(data.train, config.batch_size, config.data.seq_len, config.seed)
    sides: dict[str, Steps] = {}
    for name, (implementation, balanced) in trainer.SIDES.items():
        theirs: Any = mixtral_of(model)
        error = logits_error(model.eval(), theirs)
        model.train()
        if not error <= LOGITS_LIMIT:
            raise ValueError(
                f"{name}: expected the same logits within {LOGITS_LIMIT:g}, got {error:.2g}; mend mixtral_of"
            )
        sides[name] = trainer.steps_of(theirs, implementation, balanced, config, loader, folder)
    return sides


def alternate(sides: Mapping[str, Steps], steps: int, effort: Effort) -> Seconds:
    """Seconds per step, chunk by chunk in turn, after the warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    try:
        for number in range(effort.warmup + effort.rounds):
            taken = {name: run(1 if number < effort.warmup else steps) for name, run in sides.items()}
            if number >= effort.warmup:
                for name, one in taken.items():
                    seconds[name].append(one)
                effort.progress.advance(number - effort.warmup + 1, effort.rounds)
    except KeyboardInterrupt:
        if not all(seconds.values()) or not effort.progress.stop():
            raise
    return {name: tuple(times) for name, times in seconds.items()}


def sized(model: Decoder) -> Sized:
    """Parameters in all, and those that one token uses: of the experts K of E."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in model.moe_layers.values():
        experts, router = layer.experts, layer.router
        own = sum(parameter.numel() for parameter in experts.parameters())
        top_k = int(getattr(router, "k", 0) or getattr(router.config, "k", 1))
        idle += own - own * top_k // layer.num_experts
    return Sized(total, total - idle)


def table(config: TrainConfig, size: Sized, seconds: Seconds) -> Table:
    """Milliseconds, tokens per second, ratios."""
    tokens = config.batch_size * config.data.seq_len
    theirs = [name for name in seconds if name.startswith("transformers")]
    balanced = [name for name in theirs if "no balancing" not in name]
    base = fastest(seconds, balanced or theirs) if theirs else None
    rows = tuple(
        (
            name,
            spread(times).times(1e3),
            spread([tokens / one for one in times]),
            ratio(seconds, base, name) if base else None,
            ratio(seconds, LOOP, name) if LOOP in seconds else None,
        )
        for name, times in seconds.items()
    )
    columns = ("training step", "ms", "tokens/s", "speed / transformers", "speed / equipoise")
    title = f"{config.name}: {tokens} tokens, {'bf16 autocast' if config.bf16 else 'fp32'}"
    note = (
        f"{size.num_parameters / 1e6:.1f} million parameters, of which a token uses {size.num_active / 1e6:.1f}, the "
        f"same function in both. Forward, backward, clipping, AdamW. speed / transformers: against {base}; "
        f"speed / equipoise: against {LOOP!r}, which is watched and keeps its records."
    )
    return Table(title, columns, rows, note)
