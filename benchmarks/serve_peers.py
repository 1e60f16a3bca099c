"""Serving the same weights: equipoise, transformers and llama.cpp side by side. python -m benchmarks.serve_peers

Engines take turns within each round (A B C A B C), with the same weights, type and number of threads, and greedy
answers of fixed length. What they answer is compared before anything is timed. Servers and their client share the
machine's cores. The time to the first token is that of a whole request for one token.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.serve_engines import (
    Ask,
    Run,
    Subject,
    engine,
    http_server,
    llama_cpp,
    make_subject,
    one_batch,
    one_by_one,
    transformers_serve,
)
from equipoise.bench.harness import Effort, Seconds, Spread, Variant, ratio, spread, time_side_by_side
from equipoise.bench.problem import LeftOutError
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.routing import TopK

OURS = "equipoise engine"
PEERS: dict[str, Callable[[Subject], AbstractContextManager[Run]]] = {
    OURS: engine,
    "equipoise serve, HTTP": http_server,
    "transformers generate, one batch": one_batch,
    "transformers generate, one by one": one_by_one,
    "transformers serve, HTTP": transformers_serve,
    "transformers serve --continuous-batching, HTTP": lambda subject: transformers_serve(
        subject, "--continuous-batching"
    ),
    "llama.cpp, HTTP": llama_cpp,
}
BY_BATCH = (OURS, "transformers generate, one batch", "llama.cpp, HTTP")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAME_FIRST = 0.9  # of the answers in fp32 must begin alike: sums in another order may tip a few near ties


def decoder(
    vocab_size: int, dim: int, num_layers: int, num_experts: int, hidden_dim: int, top_k: int = 2
) -> DecoderConfig:
    """Heads of 64, two query heads per key/value head. Weights so large that answers don't repeat themselves."""
    heads = max(2, dim // 64)
    return DecoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads // 2,
        hidden_dim=hidden_dim,
        max_seq_len=256,
        moe=MoEConfig(num_experts=num_experts, hidden_dim=hidden_dim, router=TopK(k=top_k)),
        init_std=0.08,
    )


SIZES = {
    "demo: dim 192, 4 layers, 16 experts": decoder(2048, 192, 4, 16, 256),
    "large: dim 512, 8 layers, 16 experts": decoder(8192, 512, 8, 16, 512),
    "larger: dim 1024, 8 layers, 32 experts": decoder(8192, 1024, 8, 32, 512, top_k=4),
}
SMOKE_SIZES = {"smoke": decoder(512, 64, 2, 4, 64)}


@dataclass(frozen=True)
class Workload:
    """mixed: requests at the same time. one: alone. batches: how many of `alike` at a time.

    alike: different prompts of one length; equal ones would all go to the same few experts. lasting: by name, requests
    of which `at_once` are there at any time: the next comes when one has its answer.
    """

    mixed: tuple[Ask, ...]
    one: Ask
    batches: tuple[int, ...]
    alike: tuple[Ask, ...]
    lasting: Mapping[str, tuple[Ask, ...]]
    at_once: int = 16


def workload(vocab_size: int, smoke: bool) -> Workload:
    """The same each time."""
    rng = random.Random(0)

    def ask(prompt: int, answer: int) -> Ask:
        return Ask(tuple(rng.randrange(256, vocab_size - 1) for _ in range(prompt)), answer)

    def draw(mean: float) -> int:
        return int(rng.expovariate(1 / mean))

    if smoke:
        few = tuple(ask(4 + i, 2 + i) for i in range(3))
        return Workload(few, ask(8, 4), (1, 2), (ask(4, 4), ask(4, 4)), {"few": few}, at_once=2)
    mixed = tuple(ask(rng.randint(8, 128), rng.randint(16, 96)) for _ in range(16))
    one, alike = ask(64, 64), tuple(ask(16, 32) for _ in range(64))
    even = tuple(ask(rng.randint(8, 64), rng.randint(16, 96)) for _ in range(64))
    # As lengths of chats are: many short ones, few long ones (vLLM's paper, arXiv 2309.06180, figure 11).
    steep = tuple(
        ask(min(8 + int(rng.expovariate(1 / 28)), 64), min(1 + int(rng.expovariate(1 / 56)), 192)) for _ in even
    )
    return Workload(mixed, one, (1, 2, 4, 8, 16, 32, 64), alike, {"even lengths": even, "lengths of chats": steep})


# ------------------------------------------------------------------------------------------------- measuring


def open_peers(subject: Subject, wanted: Sequence[str], stack: ExitStack) -> tuple[dict[str, Run], list[str]]:
    """(those that run, why the others don't)."""
    runs, notes = {}, []
    for name in wanted:
        announce(f"{subject.name}, {subject.type_name}: starting {name}")
        try:
            runs[name] = stack.enter_context(PEERS[name](subject))
        except LeftOutError as reason:
            notes.append(f"{subject.name}, {subject.type_name}: left out: {reason}")
    return runs, notes


def agreement(runs: Mapping[str, Run], asks: Sequence[Ask], must_agree: bool) -> dict[str, float]:
    """Percent of our answers' letters until the first that differs. Raises ValueError where answers begin otherwise."""
    ours = runs[OURS](asks)
    percent = {}
    for name, run in runs.items():
        theirs = run(asks)
        common = [shared_letters(*pair) for pair in zip(ours, theirs, strict=True)]
        alike = sum(number > 0 for number in common) / len(asks)
        if must_agree and alike < SAME_FIRST:
            raise ValueError(
                f"{name}: expected {SAME_FIRST:.0%} of the answers to begin like ours, got {alike:.0%}: "
                f"{theirs[0][:40]!r}, ours {ours[0][:40]!r}; mend the mapping of the weights"
            )
        percent[name] = 100 * sum(common) / sum(map(len, ours))
    return percent


def shared_letters(one: str, other: str) -> int:
    """Before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def timed(runs: Mapping[str, Run], asks: Mapping[str, Sequence[Ask]], effort: Effort) -> dict[str, Seconds]:
    """By the name of the asks: each peer's seconds. All take turns within a round."""
    variants = [
        Variant(f"{name}|{what}", partial(run, each)) for what, each in asks.items() for name, run in runs.items()
    ]
    seconds = time_side_by_side(variants, effort)
    return {what: {name: seconds[f"{name}|{what}"] for name in runs} for what in asks}


def throughput(subject: Subject, runs: Mapping[str, Run], work: Workload, effort: Effort) -> list[Table]:
    """All mixed requests at once."""
    percent = agreement(runs, work.mixed, must_agree=subject.dtype == torch.float32)
    seconds = timed(runs, {"mixed": work.mixed}, effort)["mixed"]  # comparing has warmed everything up
    tokens = sum(ask.max_tokens for ask in work.mixed)
    rows = tuple(
        (
            name,
            spread(seconds[name]),
            rate(seconds[name], tokens),
            ratio(seconds, name, OURS),
            percent[name],
        )
        for name in runs
    )
    prompts = sum(len(ask.prompt) for ask in work.mixed)
    note = (
        f"{len(work.mixed)} requests at once, {prompts} prompt tokens, {tokens} answer tokens. Same text: letters of "
        "our answers up to the first that differs; random weights have many near ties."
    )
    columns = ("engine", "time [s]", "answer tokens/s", "time / ours", "same text [%]")
    return [Table(f"Throughput, {subject.name}, {subject.type_name}", columns, rows, note)]


def lasting(subject: Subject, runs: Mapping[str, Run], work: Workload, effort: Effort) -> list[Table]:
    """As many requests as there are clients, all the time: who has an answer asks anew."""
    rows: list[tuple[Cell, ...]] = []
    for what, asks in work.lasting.items():
        announce(f"{subject.name}, {subject.type_name}: {what}")
        variants = [Variant(name, partial(run, asks, work.at_once)) for name, run in runs.items()]
        seconds = time_side_by_side(variants, effort)
        tokens = sum(ask.max_tokens for ask in asks)
        rows += [(what, name, rate(seconds[name], tokens), ratio(seconds, name, OURS)) for name in runs]
    sums = ", ".join(
        f"{what}: {sum(len(ask.prompt) for ask in asks)} prompt tokens, {sum(ask.max_tokens for ask in asks)} answer "
        f"tokens, {max(ask.max_tokens for ask in asks)} at most"
        for what, asks in work.lasting.items()
    )
    note = (
        f"{work.at_once} requests there at any time, {len(next(iter(work.lasting.values())))} in all; {sums}. In one "
        f"batch: {work.at_once} after {work.at_once}, in the order in which they come."
    )
    columns = ("lengths", "engine", "answer tokens/s", "time / ours")
    return [Table(f"Lasting load, {subject.name}, {subject.type_name}", columns, tuple(rows), note)]


def single_stream(subject: Subject, runs: Mapping[str, Run], work: Workload, effort: Effort) -> list[Table]:
    """One request, nobody else."""
    both = timed(runs, {"first": [Ask(work.one.prompt, 1)], "whole": [work.one]}, effort)
    step = decode_seconds(both["first"], both["whole"], work.one.max_tokens)
    rows = tuple(
        (name, spread(both["first"][name]).times(1e3), rate(step[name], 1), ratio(step, name, OURS)) for name in runs
    )
    note = f"A prompt of {len(work.one.prompt)} tokens, {work.one.max_tokens} answered."
    columns = ("engine", "to the first token [ms]", "then tokens/s", "time per token / ours")
    return [Table(f"One request alone, {subject.name}, {subject.type_name}", columns, rows, note)]


def by_batch(subject: Subject, runs: Mapping[str, Run], work: Workload, effort: Effort) -> list[Table]:
    """A step's time, and tokens per second, by the number of answers that go on together."""
    rows: list[tuple[Cell, ...]] = []
    steps: dict[int, Seconds] = {}
    runs = {name: run for name, run in runs.items() if name in BY_BATCH}
    for size in work.batches:
        announce(f"{subject.name}, {subject.type_name}: batches of {size}")
        asks = work.alike[:size]
        both = timed(runs, {"first": [Ask(ask.prompt, 1) for ask in asks], "whole": asks}, effort)
        steps[size] = decode_seconds(both["first"], both["whole"], asks[0].max_tokens)
        for name in runs:
            rows.append((size, name, spread(steps[size][name]).times(1e3), rate(steps[size][name], size)))
    title = f"{subject.name}, {subject.type_name}"
    columns = ("batch", "engine", "step [ms]", "tokens/s")
    tables = [Table(f"By batch size, {title}", columns, tuple(rows), "Decoding alone, without the prompts.")]
    if {4, 32} <= steps.keys():
        shares = tuple((name, batch_share(steps, name)) for name in runs)
        note = "Tokens per second with 4 answers at a time, as a share of those with 32."
        tables.append(Table(f"Batch 4 against 32, {title}", ("engine", "4 / 32"), shares, note))
    return tables


def batch_share(steps: Mapping[int, Seconds], name: str) -> Spread:
    """Tokens/s at 4 over tokens/s at 32, round by round."""
    pairs = zip(steps[4][name], steps[32][name], strict=True)
    return spread([(4 / four) / (32 / many) for four, many in pairs])


def decode_seconds(first: Seconds, whole: Seconds, num_tokens: int) -> Seconds:
    """Per token after the first, round by round; a rest below a microsecond is noise."""
    return {
        name: tuple(
            max(1e-6, all_ - one) / (num_tokens - 1) for one, all_ in zip(first[name], whole[name], strict=True)
        )
        for name in first
    }


def rate(seconds: Sequence[float], count: float) -> Spread:
    """Of so many in each time."""
    return spread([count / each for each in seconds])


TABLES: dict[str, Callable[[Subject, Mapping[str, Run], Workload, Effort], list[Table]]] = {
    "mixed": throughput,
    "lasting": lasting,
    "one": single_stream,
    "batches": by_batch,
}


def measure(
    subject: Subject, wanted: Sequence[str], tables: Sequence[str], smoke: bool, effort: Effort
) -> tuple[list[Table], list[str]]:
    """The tables of one model in one type, and why some engines are not in them."""
    work, made = workload(subject.config.vocab_size, smoke), []
    with ExitStack() as stack:
        runs, notes = open_peers(subject, wanted, stack)
        for name in tables:
            announce(f"{subject.name}, {subject.type_name}: {name}")
            made += TABLES[name](subject, runs, work, effort)
    return made, notes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="each engine's turns")
    parser.add_argument("--only", nargs="*", default=list(PEERS), metavar="PEER", help="besides ours")
    parser.add_argument("--models", nargs="*", default=["demo", "large"], help="which of demo, large and larger")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of all engines")
    parser.add_argument("--types", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--tables", nargs="*", default=list(TABLES), choices=list(TABLES), help="what to measure")
    add_output_arguments(parser)
    options = parser.parse_args()
    if unknown := [name for name in options.only if name not in PEERS]:
        parser.error(f"--only: expected some of {', '.join(PEERS)}, got {unknown[0]}")
    sizes = {name: config for name, config in SIZES.items() if name.partition(":")[0] in options.models}
    dtypes, effort = {name: DTYPES[name] for name in options.types}, Effort(options.rounds, warmup=1)
    max_running = 64
    if options.smoke:
        torch.set_num_threads(1)
        sizes, dtypes, effort, max_running = SMOKE_SIZES, {"fp32": torch.float32}, Effort(1, warmup=1), 4
    wanted = [name for name in PEERS if name == OURS or name in options.only]
    tables: list[Table] = []
    notes: list[str] = []
    for name, config in sizes.items():
        for dtype in dtypes.values():
            with tempfile.TemporaryDirectory() as folder:
                subject = make_subject(name, config, dtype, Path(folder), max_running, options.device)
                made, left_out = measure(subject, wanted, options.tables, options.smoke, effort)
                tables += made
                notes += left_out
    settings: dict[str, Any] = {"rounds": effort.rounds, "peers": _versions()}
    emit(Report(settings, tuple(tables), tuple(notes)), options)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("transformers", "xllamacpp"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
