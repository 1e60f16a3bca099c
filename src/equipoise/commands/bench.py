"""`equipoise bench`: measurements on this machine, side by side with what others use, and experiments of many runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from equipoise.commands.architectures import architectures
from equipoise.commands.bench_run import NOTHING, Output, run_bench
from equipoise.commands.claims import claims
from equipoise.commands.links import links
from equipoise.commands.sweep import sweep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from equipoise.bench.harness import Effort
    from equipoise.bench.report import Table
    from equipoise.train.config import TrainConfig

Only = tuple[str, ...]
DtypeName = Literal["bf16", "fp32"]
Device = Literal["cpu", "cuda"]
To = Annotated[Output, tyro.conf.OmitArgPrefixes]


@dataclass(frozen=True)
class Where:
    """What a layer is measured in, and on.

    Args:
        dtype: Of weights and tokens.
        device: cpu, or cuda, where ceilings and peak memory are measured too, and decoding as a CUDA graph.
    """

    dtype: DtypeName = "bf16"
    device: Device = "cpu"


HERE = Where()
On = Annotated[Where, tyro.conf.OmitArgPrefixes]


def layer(
    *,
    shape: tuple[str, ...] = ("coarse", "fine"),
    tokens: tuple[int, ...] = (4096,),
    on: On = HERE,
    rounds: int = 5,
    only: Only = (),
    quick: bool = False,
    to: To = NOTHING,
) -> int:
    """The MoE layer, forward and backward, beside a dense block and what others use.

    Compared: each backend of equipoise, a dense SwiGLU block of the same active arithmetic (the ceiling), the MoE of
    transformers with each of its experts implementations, of torchtitan, of st-moe-pytorch, and the loop of an article.
    Each computes the same from the same weights, which is checked against fp32 first. What is not installed is left
    out with the reason. Rounds alternate (A B C A B C ...); a ratio is taken within a round, and its median shown with
    the 10th and 90th percentile: intervals that overlap are no difference. Also inference, and what is kept for
    backward. About three minutes; Ctrl-C shows what was measured so far.

    How to read it: "time / dense" of 1.10 takes a tenth longer than the dense block; "time / equipoise" of 1.50 is half
    again as slow as what backend="auto" picks.

    For example: equipoise bench layer --shape fine --out layer.json

    Args:
        shape: coarse, fine, olmoe, qwen3, mixtral or decode, or D,F,E,K as in 512,256,64,8; several in turn.
        tokens: In the batch, T; several in turn.
        on: Numbers and device.
        rounds: More give narrower intervals.
        only: Variants with one of these in the name, as in --only lean dense.
        quick: Tiny sizes, to see that it runs. Its times say nothing.
        to: Where the results go.
    """
    from equipoise.bench.device import ceilings_of_the_gpu, clock_for
    from equipoise.bench.layer import measure
    from equipoise.bench.problem import parse_shape, tiny
    from equipoise.models.dtypes import DTYPES

    shapes = [parse_shape(text) for text in shape]
    if quick:
        shapes, tokens = [tiny(each) for each in shapes], (256,)
    _at_least_one(tokens)

    def parts(effort: Effort) -> Iterator[Table | str]:
        if on.device == "cuda":
            yield ceilings_of_the_gpu()
        for each, number in product(shapes, tokens):
            yield from measure(each, number, DTYPES[on.dtype], effort, only, on.device)

    effort = replace(_effort(rounds, quick), clock=clock_for(on.device, busy=True))
    return run_bench(parts, effort, asdict(on), to)


def decode(
    *,
    shape: tuple[str, ...] = ("decode",),
    tokens: tuple[int, ...] = (1, 4, 16, 64),
    on: On = HERE,
    rounds: int = 9,
    model: bool = True,
    only: Only = (),
    quick: bool = False,
    to: To = NOTHING,
) -> int:
    """A few tokens through one layer, as in decoding, against the memory's bandwidth; then a whole model.

    With few tokens a layer reads weights and computes next to nothing, so the ceiling is how fast memory is read. That
    is measured first, with the same threads. Each call takes other tokens, which choose other experts: so the weights
    come out of memory and not out of a cache. Compared: each backend of equipoise, its experts in int8 and int4,
    transformers' implementations, torchao's int8, and a dense block. About three minutes.

    How to read it: "of the memory's" is bytes of the experts that were touched, over the time, as a share of the read
    bandwidth: 1.00 can't be beaten, unless the weights fit the cache. "speed / ..." of 2 is twice as fast.
    llama.cpp is compared by `python -m benchmarks.serving`, as a server.

    For example: equipoise bench decode --picture decode.png

    Args:
        shape: coarse, fine, olmoe or decode, or D,F,E,K. Several are measured in turn.
        tokens: At once, T. A table for each.
        on: Numbers and device.
        rounds: More give narrower intervals.
        model: Also the whole model of the recipe demo, beside transformers' Mixtral of the same weights; on a CPU.
        only: Variants with one of these in the name.
        quick: Tiny sizes, to see that it runs.
        to: Where the results go.
    """
    from equipoise.bench import decode as layers
    from equipoise.bench import generate
    from equipoise.bench.device import clock_for
    from equipoise.bench.problem import parse_shape, tiny
    from equipoise.models.dtypes import DTYPES

    shapes, kind = [parse_shape(text) for text in shape], DTYPES[on.dtype]
    _at_least_one(tokens)
    if quick:
        shapes, tokens = [tiny(each) for each in shapes], tokens[:2]
    effort = replace(_effort(rounds, quick), min_seconds=0.0 if quick else 0.05, clock=clock_for(on.device))

    def parts(effort: Effort) -> Iterator[Table | str]:
        for each in shapes:
            yield from layers.measure(each, tokens, kind, effort, only, on.device)
        if model and not only and on.device == "cpu":
            few = (1, 2) if quick else (1, 16)
            yield from generate.measure(_demo(quick), few, 4 if quick else 24, kind, replace(effort, min_seconds=0.0))

    return run_bench(parts, effort, asdict(on), to)


def train(
    *,
    dtype: DtypeName = "fp32",
    steps: int = 3,
    rounds: int = 7,
    only: Only = (),
    quick: bool = False,
    to: To = NOTHING,
) -> int:
    """A whole training step of the model of `equipoise train demo`, beside transformers' Mixtral in its Trainer.

    Both models hold the same weights and compute the same logits, which is checked first. Both get the same batches of
    the same text, clip the gradient and step with AdamW; both have a balancing loss, and a row says what theirs is
    without. "The whole loop" is `equipoise train` with its monitor and its records; "the step alone" is without.
    Chunks of steps alternate. About two minutes.

    How to read it: "speed / transformers" of 2 is twice as many tokens per second as the fastest row of transformers
    with a balancing loss.

    For example: equipoise bench train --markdown train.md

    Args:
        dtype: fp32, as the recipe has it; bf16 is autocast.
        steps: In a chunk.
        rounds: Chunks of each side.
        only: Sides with one of these in the name.
        quick: The recipe tiny and two chunks, to see that it runs.
        to: Where the results go.
    """
    from equipoise.bench.train import measure

    config = replace(_demo(quick), bf16=dtype == "bf16")
    settings = {"recipe": config.name, "dtype": dtype, "steps": steps, "rounds": rounds}
    return run_bench(
        lambda effort: measure(config, steps, effort, only), _effort(rounds, quick, warmup=1), settings, to
    )


def monitor(*, every: int = 10, rounds: int = 4, only: Only = (), quick: bool = False, to: To = NOTHING) -> int:
    """What watching costs: a step with and without an attached watch, and a flush of a large model.

    Two figures for each step. "watched / unwatched" is of whole steps and has every side effect in it, but drowns in
    the noise of the steps; "share of the step" is the time inside the recording hooks and the flush, taken directly.
    About three minutes.

    How to read it: a share of 0.5 % means that 200 watched steps take as long as 201 unwatched ones.

    For example: equipoise bench monitor --every 10

    Args:
        every: Steps per window, with one flush and one judgement each.
        rounds: Windows of each kind.
        only: Steps with one of these in the name: recipe, layer, decoding, transformers.
        quick: Tiny sizes, to see that it runs.
        to: Where the results go.
    """
    from equipoise.bench.monitor import Size, Sizes, measure
    from equipoise.bench.problem import SHAPES, Shape, tiny

    shape, theirs = SHAPES["coarse"], Shape("small", 256, 512, 8, 2)
    sizes = Sizes(_demo(quick), shape, 4096, theirs, 4, (8, 128), 32, Size(61, 256), (4096, 64), 64)
    if quick:
        theirs, every = Shape("small", 32, 32, 4, 2), 2
        sizes = Sizes(_demo(quick), tiny(shape), 128, theirs, 2, (2, 8), 2, Size(2, 8, 2), (512, 16), 3)
    settings = {"every": every, "rounds": rounds}
    return run_bench(lambda effort: measure(sizes, every, effort, only), _effort(rounds, quick, warmup=1), settings, to)


def routing(
    *, dtype: DtypeName = "bf16", rounds: int = 9, only: Only = (), quick: bool = False, to: To = NOTHING
) -> int:
    """What deciding costs: routing and dispatch beside the whole layer, and router against router.

    Five sections: share (of the layer), experts (against E), tokens (against T), overflow (what a capacity costs) and
    routers (each beside TopK). Forward and backward together. About three minutes.

    How to read it: "share of the layer" of 5 % means that the products take the rest; columns with a slash are ratios
    within a round, and above 1 is slower.

    For example: equipoise bench routing --only routers

    Args:
        dtype: Of weights and tokens.
        rounds: More give narrower intervals.
        only: Sections.
        quick: Tiny sizes, to see that it runs.
        to: Where the results go.
    """
    from equipoise.bench.routing import FULL, SMOKE, measure
    from equipoise.models.dtypes import DTYPES

    settings = {"dtype": dtype, "rounds": rounds}
    sizes = SMOKE if quick else FULL
    return run_bench(lambda effort: measure(sizes, DTYPES[dtype], effort, only), _effort(rounds, quick), settings, to)


def scaling(
    *, dtype: DtypeName = "bf16", rounds: int = 5, only: Only = (), quick: bool = False, to: To = NOTHING
) -> int:
    """How time and memory grow: with tokens, with experts, with the size of a checkpoint; and what an import costs.

    Four sections: tokens (time and what is kept for backward, aim: linear), experts (time at the same active
    arithmetic, aim: flat), disk (save and load beside the disk's own speed, start-up) and import (seconds of a new
    process, and what it loads). About three minutes. --picture draws the curves.

    How to read it: "grows as T^1.02 [0.98, 1.06]" is the fitted exponent with its 95 % interval; 1 is linear, 0 flat.

    For example: equipoise bench scaling --only tokens experts --picture scaling.png

    Args:
        dtype: Of weights and tokens.
        rounds: More give narrower intervals.
        only: Sections.
        quick: Tiny sizes, to see that it runs.
        to: Where the results go.
    """
    from equipoise.bench.scaling import FULL, QUICK, measure
    from equipoise.models.dtypes import DTYPES

    settings = {"dtype": dtype, "rounds": rounds}
    sizes = QUICK if quick else FULL
    return run_bench(lambda effort: measure(sizes, DTYPES[dtype], effort, only), _effort(rounds, quick), settings, to)


def _at_least_one(tokens: tuple[int, ...]) -> None:
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens: expected numbers of at least 1, got {list(tokens)}")


def _effort(rounds: int, quick: bool, warmup: int = 2) -> Effort:
    """How long to measure."""
    from equipoise.bench.harness import Effort

    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    return Effort(rounds=2, warmup=1) if quick else Effort(rounds, warmup)


def _demo(quick: bool) -> TrainConfig:
    """The recipe whose model is measured."""
    from equipoise.train.recipes import recipe

    return replace(recipe("tiny"), batch_size=2) if quick else recipe("demo")


def bench(
    run: Annotated[
        Annotated[int, tyro.conf.subcommand(name="layer", constructor=layer)]
        | Annotated[int, tyro.conf.subcommand(name="train", constructor=train)]
        | Annotated[int, tyro.conf.subcommand(name="decode", constructor=decode)]
        | Annotated[int, tyro.conf.subcommand(name="monitor", constructor=monitor)]
        | Annotated[int, tyro.conf.subcommand(name="routing", constructor=routing)]
        | Annotated[int, tyro.conf.subcommand(name="scaling", constructor=scaling)]
        | Annotated[int, tyro.conf.subcommand(name="sweep", constructor=sweep)]
        | Annotated[int, tyro.conf.subcommand(name="architectures", constructor=architectures)]
        | Annotated[int, tyro.conf.subcommand(name="claims", constructor=claims)]
        | Annotated[int, tyro.conf.subcommand(name="links", constructor=links)],
        tyro.conf.arg(name=""),
    ],
) -> int:
    """Measurements on this machine, side by side with what others use, and experiments of many runs.

    For example: equipoise bench layer --quick
    """
    return run  # what the subcommand returned
