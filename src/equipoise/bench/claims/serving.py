"""Claims about speed: what experts cost beside a dense block, and what a small batch costs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from equipoise.bench.claims.arms import BASE
from equipoise.bench.claims.balance import PRODUCTION
from equipoise.bench.claims.claim import Bench, Claim, Reading
from equipoise.bench.claims.statistics import Range, above
from equipoise.bench.harness import Effort, Variant, time_side_by_side
from equipoise.models.config import DecoderConfig
from equipoise.models.decoder import Decoder, cross_entropy_sum
from equipoise.models.generate import generate

THEME = "speed"
PROMPT, NEW = 4, 8
ROUNDS, SECONDS = 9, 0.2  # long enough for the first call after a round begins, which is slow, not to count


@dataclass(frozen=True)
class Batches:
    """Decoding with a small and a large batch. dense: compare with a dense model's loss of throughput, too."""

    small: int
    large: int


def _model(dense: bool) -> Decoder:
    torch.manual_seed(0)
    assert BASE.model.moe is not None
    moe = None if dense else replace(BASE.model.moe, hidden_dim=256, balance=())
    return Decoder(_wide(replace(BASE.model, moe=moe))).eval()


def _wide(config: DecoderConfig) -> DecoderConfig:
    """Large enough for products to take the time, not calls."""
    return replace(config, dim=256, hidden_dim=512, num_layers=2)


def _lost(batches: Batches, kinds: tuple[bool, ...]) -> list[tuple[float, ...]]:
    """Per kind (True is dense) and round: how much less throughput the small batch has than the large one; a share."""
    sizes = {"small": batches.small, "large": batches.large}
    variants = [
        Variant(
            f"{name} {dense}",
            partial(generate, _model(dense), torch.ones(size, PROMPT, dtype=torch.int64), NEW, temperature=0),
        )
        for dense in kinds
        for name, size in sizes.items()
    ]
    seconds = time_side_by_side(variants, Effort(ROUNDS, warmup=1, min_seconds=SECONDS))
    per_token = batches.small / batches.large
    return [
        tuple(
            1 - per_token * large / small
            for small, large in zip(seconds[f"small {dense}"], seconds[f"large {dense}"], strict=True)
        )
        for dense in kinds
    ]


def lost_throughput(bench: Bench, batches: Batches) -> list[Reading]:
    """Of the MoE."""
    (moe,) = _lost(batches, (False,))
    return [Reading("throughput lost", "", moe, above(0.3), "bootstrap")]


def lost_beyond_dense(bench: Bench, batches: Batches) -> list[Reading]:
    """Of the MoE, less what the dense model loses in the same round."""
    moe, dense = _lost(batches, (False, True))
    values = tuple(a - b for a, b in zip(moe, dense, strict=True))
    return [Reading("throughput lost, MoE minus dense", "", values, above(0.05), "bootstrap")]


@dataclass(frozen=True)
class Pair:
    """Of which the first is compared with the second; True is dense."""

    first_dense: bool
    second_dense: bool


def faster_training(bench: Bench, pair: Pair) -> list[Reading]:
    """Forward and backward, first against second, per round: how many times as fast."""
    tokens_BS = torch.randint(BASE.model.vocab_size, (BASE.batch_size, BASE.data.seq_len))

    def step(model: Decoder) -> None:
        torch.autograd.backward(cross_entropy_sum(model(tokens_BS), tokens_BS)[0])

    models = [_model(dense).train() for dense in (pair.first_dense, pair.second_dense)]
    variants = [Variant(str(index), partial(step, model), model.zero_grad) for index, model in enumerate(models)]
    seconds = time_side_by_side(variants, Effort(ROUNDS, warmup=1))
    values = tuple(second / first for first, second in zip(seconds["0"], seconds["1"], strict=True))
    return [Reading("speed over the MoE's", "", values, Range(1.5, 3.0), "bootstrap")]


CLAIMS = (
    Claim(
        name="dense-is-twice-as-fast",
        theme=THEME,
        hypothesis="A dense model of the same active size is about twice as fast",
        where=f"{PRODUCTION}: a 350M MoE against dense",
        theirs="2 times",
        method="forward and backward of 1024 tokens on this CPU, two experts of 8 against one block of their size; "
        "1.5 to 3 times",
        control_is="dense in both arms",
        measure=faster_training,
        setup=Pair(first_dense=True, second_dense=False),
        control=Pair(first_dense=True, second_dense=True),
        seconds=8.0,
    ),
    Claim(
        name="batch-4-loses-40-percent",
        theme=THEME,
        hypothesis="A batch of 4 has 40 % less throughput than one of 32, or worse",
        where=f"{PRODUCTION}: 40 % lower throughput with batch 4 than with 32",
        theirs="40 %",
        method="decoding with 8 experts, top-2, on this CPU; ratios within a round, 30 % lost or more",
        control_is="32 in both",
        measure=lost_throughput,
        setup=Batches(4, 32),
        control=Batches(32, 32),
        seconds=6.0,
    ),
    Claim(
        name="small-batches-hurt-moe-more",
        theme=THEME,
        hypothesis="A small batch costs an MoE more throughput than a dense model",
        where=f"{PRODUCTION}: below 8, experts are underused",
        theirs="below a batch of 8",
        method="what batch 4 loses against 32, less what a dense model of the same arithmetic loses: over 5 points",
        control_is="32 in both",
        measure=lost_beyond_dense,
        setup=Batches(4, 32),
        control=Batches(32, 32),
        seconds=10.0,
    ),
)
