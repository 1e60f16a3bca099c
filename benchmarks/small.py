"""What small experts cost, and what they save: memory, perplexity, speed.  python -m benchmarks.small [RUN]

One trained model, its experts in float32, bfloat16, int8, int4, and in a file with a half or a quarter of them in
memory. Perplexity is of the run's held-out text; speeds are taken side by side, in alternation, in one process. What is
read from the file was read before: the system has it in memory, so that a disk's speed is not part of it.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from equipoise.bench.harness import Effort, Seconds, Variant, ratio, spread, time_side_by_side
from equipoise.bench.report import Report, Table, add_output_arguments, announce, emit
from equipoise.models.generate import generate
from equipoise.ops.packed import Full, Int4, Int8, WeightFormat
from equipoise.serve.equipment import held_out_loss
from equipoise.small import CacheCounts, Small, SmallConfig, expert_bytes, load_small
from equipoise.train.config import TrainConfig
from equipoise.train.recipes import recipe
from equipoise.train.report import Silent
from equipoise.train.run import train

FORMATS = ("int8", "int4-128", "int4-64", "int4-32")
BASE = "float32"


@dataclass(frozen=True)
class Way:
    """One way to keep the experts. share: of them in memory, 1 for all, resident. dtype: of all weights."""

    name: str
    experts: str = "full"
    share: float = 1.0
    prefetch: bool = True
    dtype: torch.dtype = torch.float32


WAYS = (
    Way(BASE),
    Way("bfloat16, the whole model", dtype=torch.bfloat16),
    *(Way(name, name) for name in FORMATS),
    Way("float32, half in memory", share=0.5),
    Way("float32, half, not read ahead", share=0.5, prefetch=False),
    Way("float32, a quarter in memory", share=0.25),
    Way("float32, a quarter, not read ahead", share=0.25, prefetch=False),
    Way("int8, a quarter in memory", "int8", 0.25),
    Way("int4-32, a quarter in memory", "int4-32", 0.25),
)


@dataclass(frozen=True)
class Work:
    """prompt: tokens that an answer begins with. answer: tokens of it. effort: how long to measure."""

    prompt: int
    answer: int
    effort: Effort


@dataclass(frozen=True, eq=False)
class Kept:
    """A model, loaded in one way. memory: bytes of experts in memory, at most. text: what it answers, greedily."""

    way: Way
    small: Small
    memory: int
    loss: float
    text: list[int]


def load_all(run: Path, work: Work) -> tuple[list[Kept], list[str]]:
    """Every way that these sizes allow, and what was left out."""
    everything = {}
    kept, notes = [], []
    for way in WAYS:
        announce(way.name)
        try:
            if way.experts not in everything:
                everything[way.experts] = expert_bytes(
                    load_small(run, SmallConfig(way.experts), dtype=way.dtype).loaded.model
                )
        except ValueError as error:
            notes.append(f"{way.name} was left out: {error}")
            continue
        memory = None if way.share == 1.0 else int(way.share * everything[way.experts])
        small = load_small(run, SmallConfig(way.experts, memory, prefetch=way.prefetch), dtype=way.dtype)
        held_out_BS = small.loaded.held_out_BS
        if held_out_BS is None:
            raise ValueError(f"{run}: expected held-out text in the run, found none; train it anew")
        loss = held_out_loss(small.loaded.model, held_out_BS)
        prompt = held_out_BS[:1, : work.prompt]
        text = generate(small.loaded.model, prompt, work.answer, temperature=0).flatten().tolist()
        kept.append(Kept(way, small, memory or expert_bytes(small.loaded.model), loss, text))
    return kept, notes


def measure(kept: Sequence[Kept], work: Work) -> tuple[Seconds, Seconds, dict[str, CacheCounts]]:
    """(seconds of an answer, seconds of reading text, cache counts of the answers) by way."""
    held_out_BS = kept[0].small.loaded.held_out_BS
    assert held_out_BS is not None
    prompts, texts = held_out_BS[:, : work.prompt], held_out_BS[:4, :-1]
    turn = {each.way.name: 0 for each in kept}

    def answer(each: Kept) -> object:
        """Another prompt each time: nobody asks the same for ever."""
        turn[each.way.name] += 1
        row = turn[each.way.name] % len(prompts)
        sampling = {"temperature": 0.8, "top_p": 0.95, "seed": row}  # greedy text repeats itself, which caches like
        return generate(each.small.loaded.model, prompts[row : row + 1], work.answer, **sampling)

    @torch.inference_mode()
    def read(each: Kept) -> object:
        return each.small.loaded.model(texts)

    before = {each.way.name: each.small.offload.counts() for each in kept if each.small.offload}
    announce("answers")
    answers = time_side_by_side([Variant(each.way.name, lambda each=each: answer(each)) for each in kept], work.effort)
    after = {each.way.name: each.small.offload.counts() for each in kept if each.small.offload}
    announce("reading text")
    reading = time_side_by_side([Variant(each.way.name, lambda each=each: read(each)) for each in kept], work.effort)
    return answers, reading, {name: difference(after[name], before[name]) for name in after}


def difference(after: CacheCounts, before: CacheCounts) -> CacheCounts:
    """What happened in between."""
    return CacheCounts(**{name: number - vars(before)[name] for name, number in vars(after).items()})


def tables(run: Path, work: Work) -> tuple[tuple[Table, ...], list[str]]:
    """(what each way costs and saves, what the caches did; notes)."""
    kept, notes = load_all(run, work)
    answers, reading, counts = measure(kept, work)
    base = kept[0]
    rows = [
        (
            each.way.name,
            each.memory / 2**20,
            base.memory / each.memory,
            math.exp(each.loss),
            100 * (math.exp(each.loss - base.loss) - 1),
            spread([work.answer / seconds for seconds in answers[each.way.name]]),
            ratio(answers, BASE, each.way.name),
            ratio(reading, BASE, each.way.name),
            "yes" if each.text == base.text else "no",
        )
        for each in kept
    ]
    columns = ("experts", "in memory [MB]", "smaller by", "perplexity", "higher by [%]", "tokens/s, one answer")
    columns = (*columns, "speed, one answer", "speed, reading text", "same greedy text")
    note = f"Speeds are relative to {BASE} in the same round: 2 is twice as fast. An answer has {work.answer} tokens."
    asked = {name: each.hits + each.misses + each.late for name, each in counts.items()}
    per_token = {name: each.bytes_read / (asked[name] or 1) for name, each in counts.items()}
    caches = [
        (
            name,
            100 * each.hit_rate,
            100 * each.prefetch_precision if each.used + each.wasted else None,
            100 * each.prefetched / ((each.prefetched + each.misses) or 1),
            per_token[name] / 2**10,
        )
        for name, each in counts.items()
    ]
    names = ("experts", "hits [%]", "read ahead and used [%]", "of reads, ahead [%]", "read per expert asked for [KB]")
    for each in kept:
        if each.small.offload is not None:
            each.small.offload.close()
    return (
        Table("Small experts", columns, tuple(rows), note),
        Table("What the caches did", names, tuple(caches)),
    ), notes


def products(effort: Effort, rows: Sequence[int] = (1, 8, 32, 256)) -> Table:
    """Microseconds of one product with a weight of 512 by 256, on one thread."""
    weight_OI = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    formats: list[WeightFormat] = [Full(), Full(torch.bfloat16), Int8(), Int4(128), Int4(32)]
    formats += [Int8(torch.float32), Int4(32, torch.float32)]
    parts = {f"{format.name} in {str(format.dtype)[6:]}": (format, format.pack(weight_OI)) for format in formats}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        columns = []
        for number in rows:
            announce(f"products, {number} rows")
            x_nI = torch.randn(number, 256)
            variants = [
                Variant(name, partial(format.product, x_nI.to(format.dtype), packed))
                for name, (format, packed) in parts.items()
            ]
            seconds = time_side_by_side(variants, effort.filling(0.002))
            columns.append({name: spread(seconds[name]).times(1e6) for name in parts})
    finally:
        torch.set_num_threads(threads)
    table = tuple((name, *(column[name] for column in columns)) for name in parts)
    return Table("One product [us]", ("weight", *(f"{number} rows" for number in rows)), table)


def configuration(smoke: bool) -> TrainConfig:
    """The demo's model, a little wider: 256 is a multiple of all groups. Or the tiny one."""
    if smoke:
        return replace(recipe("tiny"), steps=20, eval_every=0, checkpoint_every=20, watch_every=0)
    demo = recipe("demo")
    model = replace(demo.model, dim=256, num_heads=8)
    return replace(demo, model=model, steps=300, eval_every=0, checkpoint_every=300, recover=False)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small", description=__doc__)
    parser.add_argument("run", nargs="?", help="a run folder; without one, a model is trained, for some minutes")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=9)
    add_output_arguments(parser)
    options = parser.parse_args()
    effort = Effort(rounds=1, warmup=1) if options.smoke else Effort(options.rounds)
    work = Work(options.prompt, 8 if options.smoke else options.answer, effort)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(options.run or Path(folder) / "run")
        if options.run is None:
            announce("training")
            train(configuration(options.smoke), run, Silent())
        measured, notes = tables(run, work)
        settings = {"run": options.run or "trained for this", "prompt": work.prompt, "answer": work.answer}
        emit(Report(settings, (*measured, products(effort)), tuple(notes)), options)


if __name__ == "__main__":
    main()
