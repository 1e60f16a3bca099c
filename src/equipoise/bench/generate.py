"""Whole-model decoding, tokens per second: our decoder beside transformers' Mixtral with the same weights.

Greedy, from the same prompts. In fp32 the models say the same, which is checked; in bf16 a tie may fall either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from equipoise.bench.decode import best
from equipoise.bench.harness import Effort, Variant, ratio, spread, time_side_by_side
from equipoise.bench.peers import mixtral
from equipoise.bench.report import Table
from equipoise.models.decoder import Decoder
from equipoise.models.generate import generate
from equipoise.train.config import TrainConfig

OURS = "equipoise"
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
PROMPT = 8


def measure(
    config: TrainConfig, sequences: Sequence[int], new: int, dtype: torch.dtype, effort: Effort
) -> Iterator[Table | str]:
    """A table for each number of sequences at once."""
    torch.manual_seed(0)
    model = Decoder(config.model).to(dtype).eval()
    try:
        theirs = mixtral.mixtral_of(model)
    except ImportError:
        theirs = None
        yield "transformers, whole model, left out: it is not installed; pip install 'equipoise[bench]'."
    for number in sequences:
        prompts_BS = torch.randint(config.model.vocab_size, (number, PROMPT))
        effort.progress.begin(f"{config.name}'s model: {number} x {new} tokens")
        yield table(config, model, theirs, prompts_BS, new, effort)


def table(config: TrainConfig, model: Decoder, theirs: Any, prompts_BS: Tensor, new: int, effort: Effort) -> Table:
    """Of one batch of prompts."""
    runs = {OURS: partial(generate, model, prompts_BS, new, temperature=0)}
    if theirs is not None:
        for name in IMPLEMENTATIONS:
            runs[f"transformers {name}"] = partial(_theirs, theirs, name, prompts_BS, new)
    said = {name: run().tolist() for name, run in runs.items()}
    if model.embed_tokens.weight.dtype == torch.float32 and any(each != said[OURS] for each in said.values()):
        raise ValueError("whole model: expected the same greedy tokens of all, got others; mend mixtral_of")
    seconds = time_side_by_side([Variant(name, run) for name, run in runs.items()], effort)
    number, peer = len(prompts_BS), best(seconds, "transformers")
    rows = tuple(
        (
            name,
            spread([1e3 * one / new for one in times]),
            spread([number * new / one for one in times]),
            ratio(seconds, peer, name) if peer else None,
        )
        for name, times in seconds.items()
    )
    columns = ("whole model", "ms per step", "tokens/s", "speed / transformers")
    title = f"the model of {config.name}, {number} sequences, {str(model.embed_tokens.weight.dtype)[6:]}"
    return Table(title, columns, rows, f"{new} tokens after {PROMPT}, greedy. speed / transformers: against {peer}.")


def _theirs(model: Any, implementation: str, prompts_BS: Tensor, new: int) -> Tensor:
    """With the prompt, as ours."""
    model.set_experts_implementation(implementation)
    made: Tensor = model.generate(
        prompts_BS, attention_mask=torch.ones_like(prompts_BS), max_new_tokens=new, min_new_tokens=new
    )
    return made
