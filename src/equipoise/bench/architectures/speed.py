"""How fast, and how much memory: training steps in alternation, decoding by batch size, long prompts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from equipoise.bench.harness import Effort, Seconds, Variant, time_side_by_side
from equipoise.bench.saved import MIB, saved_for_backward
from equipoise.models.decoder import Decoder, cross_entropy_sum
from equipoise.models.generate import generate


@dataclass(frozen=True)
class Latency:
    """Of one decode step, in seconds. rate: tokens per second of the whole batch."""

    p50: float
    p99: float
    rate: float


def training_steps(models: Mapping[str, Decoder], tokens_BS: Tensor, effort: Effort) -> Seconds:
    """Forward and backward of the same batch, all models in turns. tokens_BS: (B, S + 1)."""

    def step(model: Decoder) -> None:
        model.train()
        loss, _ = cross_entropy_sum(model(tokens_BS[:, :-1]), tokens_BS[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]  # torch's

    def clear(model: Decoder) -> None:
        model.zero_grad(set_to_none=True)

    variants = [Variant(name, partial(step, model), partial(clear, model)) for name, model in models.items()]
    return time_side_by_side(variants, effort)


def decoding(model: Decoder, batch: int, num_tokens: int, prompt: int = 8) -> Latency:
    """Greedy answers to random prompts, a batch of them in step; the prompt's own forward is left out."""
    random = torch.Generator().manual_seed(batch)
    prompts_BS = torch.randint(model.config.vocab_size, (batch, prompt), generator=random)
    generate(model, prompts_BS, 3, temperature=0)  # warm-up
    with _forward_ends(model) as ends:
        generate(model, prompts_BS, num_tokens + 1, temperature=0)
    steps = np.diff(ends)
    p50, p99 = np.percentile(steps, (50, 99))
    return Latency(float(p50), float(p99), batch / float(steps.mean()))


def long_prompts(models: Mapping[str, Decoder], length: int, effort: Effort) -> Seconds:
    """One forward over a prompt of so many tokens, all models in turns."""
    tokens_BS = torch.randint(next(iter(models.values())).config.vocab_size, (1, length))

    def forward(model: Decoder) -> None:
        model.eval()
        with torch.inference_mode():
            model(tokens_BS)

    return time_side_by_side([Variant(name, partial(forward, model)) for name, model in models.items()], effort)


def kept_mib(model: Decoder, tokens_BS: Tensor) -> float:
    """What a training forward keeps for its backward, parameters not at all."""
    model.train()
    return saved_for_backward(partial(model, tokens_BS), model.parameters()) / MIB


@contextmanager
def _forward_ends(model: Decoder) -> Iterator[Sequence[float]]:
    """The moments at which the model's forwards end."""
    ends: list[float] = []
    handle = model.register_forward_hook(lambda *_: ends.append(time.perf_counter()))
    try:
        yield ends
    finally:
        handle.remove()
