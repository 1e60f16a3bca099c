"""Does it pay to decode answers together that use the same experts?  python -m benchmarks.serve_grouping RUN

Answers to real text of all domains go on side by side, a limited number in each step: in turn, or those first whose
last tokens went to the same experts. Counts the experts that a step touches, tokens per second and the longest wait.
--widen 16 makes experts that many times as wide with zeros: the same answers and experts, and as much more to read.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from equipoise.bench.harness import spread
from equipoise.bench.report import Report, Table, add_output_arguments, announce, emit
from equipoise.models.decoder import Decoder
from equipoise.models.run_files import Loaded, load
from equipoise.serve.engine import Engine, StepReport
from equipoise.serve.request import Request, Sampling
from equipoise.serve.scheduler import Limits
from equipoise.train.corpus import corpus
from equipoise.train.recipes import recipe
from equipoise.train.report import Silent
from equipoise.train.run import train

BLOCK = 16


@dataclass(frozen=True)
class Workload:
    """prompts: of all domains in turn, all of one length. max_tokens: of each answer. max_skips: see `Limits`."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    max_skips: int


@dataclass(frozen=True, eq=False)
class Played:
    """One pass over the workload. seconds, num_tokens: of the steps without prompts. distinct_SL: experts per full step
    and layer. longest_wait: steps between two tokens of one answer, at most. answers: the tokens made, by request."""

    seconds: float
    num_tokens: int
    distinct_SL: np.ndarray
    longest_wait: int
    answers: Mapping[str, list[int]]

    @property
    def tokens_per_second(self) -> float:
        """Of all answers together."""
        return self.num_tokens / self.seconds


def play(loaded: Loaded, work: Workload, decode_batch: int, group: bool) -> Played:
    """Answer all prompts, from one first step in which all of them are read."""
    number, length = len(work.prompts), len(work.prompts[0])
    limits = Limits(
        max_running=number,
        tokens_per_step=number * length + 1,
        max_waiting=number,
        decode_batch=decode_batch,
        group_by_experts=group,
        max_skips=work.max_skips,
    )
    reports: list[StepReport] = []
    blocks = number * -(-(length + work.max_tokens) // BLOCK)
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        limits=limits,
        num_blocks=blocks + 1,
        block_size=BLOCK,
        prefix_reuse=False,
        on_step=reports.append,
    )
    for n, prompt in enumerate(work.prompts):
        engine.add(Request(str(n), prompt, work.max_tokens, Sampling(temperature=0.0)))
    answers: dict[str, list[int]] = {str(n): [] for n in range(number)}
    last: dict[str, int] = {}
    longest = 0
    while engine.has_work:
        for output in engine.step():
            answers[output.id] += output.token_ids
            longest = max(longest, len(reports) - 1 - last.get(output.id, len(reports) - 1))
            last[output.id] = len(reports)
    engine.close()
    decoding = [report for report in reports if not report.num_prompt_tokens]
    full = [report.distinct_experts for report in decoding if report.num_answer_tokens == decode_batch]
    return Played(
        seconds=sum(report.seconds for report in decoding),
        num_tokens=sum(report.num_answer_tokens for report in decoding),
        distinct_SL=np.array(full),
        longest_wait=longest,
        answers=answers,
    )


def side_by_side(loaded: Loaded, work: Workload, decode_batch: int, rounds: int) -> list[tuple[Played, Played]]:
    """(in turn, grouped) of each round, A B A B, after one round to warm up."""
    both = [tuple(play(loaded, work, decode_batch, group) for group in (False, True)) for _ in range(rounds + 1)]
    return [(turn, grouped) for turn, grouped in both[1:]]


def tables(loaded: Loaded, work: Workload, sizes: Sequence[int], rounds: int) -> tuple[Table, Table]:
    """One row per decode_batch, and one per decode_batch and layer."""
    by_size = {}
    for size in sizes:
        announce(f"decode_batch {size}")
        by_size[size] = side_by_side(loaded, work, size, rounds)
    number = len(work.prompts)
    rows = []
    layers = []
    for size, played in by_size.items():
        turn, grouped = played[0]  # experts, waits and answers are the same in each round
        mean_turn, mean_grouped = float(turn.distinct_SL.mean()), float(grouped.distinct_SL.mean())
        same = np.mean([turn.answers[id] == grouped.answers[id] for id in turn.answers])
        rows.append(
            (
                str(size),
                mean_turn,
                mean_grouped,
                100 * (1 - mean_grouped / mean_turn),
                spread([each.tokens_per_second for each, _ in played]),
                spread([b.tokens_per_second / a.tokens_per_second for a, b in played]),
                turn.longest_wait,
                grouped.longest_wait,
                100 * float(same),
            )
        )
        for name, a, b in zip(
            loaded.model.moe_layers, turn.distinct_SL.mean(0), grouped.distinct_SL.mean(0), strict=True
        ):
            layers.append((f"{size}, {name}", float(a), float(b)))
    columns = ("decode_batch", "experts, in turn", "grouped", "fewer [%]", "tokens/s, in turn", "grouped / in turn")
    waits = ("longest wait, in turn", "longest wait, grouped", "same answers [%]")
    note = (
        f"{number} answers of {work.max_tokens} tokens go on side by side, decode_batch of them in a step; grouped, "
        f"who was left out for {work.max_skips} steps goes first. Experts: distinct ones per MoE layer and full step. "
        "Waits: steps between two tokens of one answer. Answers differ where logits are equal within rounding."
    )
    return (
        Table("Decoding those who share experts", (*columns, *waits), tuple(rows), note),
        Table("Distinct experts by layer", ("decode_batch, layer", "in turn", "grouped"), tuple(layers)),
    )


def prompts_of(loaded: Loaded, spec: str, number: int, length: int) -> tuple[tuple[int, ...], ...]:
    """From random places of random documents, one domain after the other. Raises ValueError for too little text."""
    text, rng = corpus(spec), random.Random(0)
    by_domain: list[list[str]] = [[] for _ in text.domains]
    for document in text.documents:
        by_domain[document.domain].append(document.text)
    prompts = []
    for n in range(number):
        documents = by_domain[n % len(by_domain)]
        for _ in range(100):
            chosen = rng.choice(documents)
            start = rng.randrange(max(1, len(chosen) - 8 * length))
            ids = loaded.tokenizer.encode(chosen[start : start + 8 * length])[:length].tolist()
            if len(ids) == length:
                break
        else:
            raise ValueError(f"corpus: expected documents of {length} tokens in {text.domains[n % len(by_domain)]}")
        prompts.append(tuple(ids))
    return tuple(prompts)


def widened(loaded: Loaded, times: int) -> Loaded:
    """The same model with experts `times` as wide: what is added is zero, and adds nothing but bytes."""
    config = loaded.model.config
    assert config.moe is not None
    hidden, wide = config.moe.hidden_dim, times * config.moe.hidden_dim
    model = Decoder(replace(config, moe=replace(config.moe, hidden_dim=wide))).to(
        loaded.model.embed_tokens.weight.dtype
    )
    state = loaded.model.state_dict()
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            parts = [F.pad(part, (0, 0, 0, wide - hidden)) for part in tensor.chunk(2, dim=1)]
            state[name] = torch.cat(parts, dim=1)
        elif name.endswith("experts.down_proj"):
            state[name] = F.pad(tensor, (0, wide - hidden))
    model.load_state_dict(state)
    return replace(loaded, model=model.eval())


def small_run(folder: Path) -> tuple[Path, str]:
    """(a run folder, its corpus): a few steps on two domains of the embedded corpus, for --smoke."""
    embedded = corpus("embedded", ("python", "scripture"))
    texts = folder / "texts"
    texts.mkdir()
    for number, name in enumerate(embedded.domains):
        own = (document.text for document in embedded.documents if document.domain == number)
        text = "".join(chain.from_iterable(own))[:40_000]
        rows = [{"text": text[at : at + 2000], "domain": name} for at in range(0, len(text), 2000)]
        (texts / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tiny = recipe("tiny")
    data = replace(tiny.data, corpus=str(texts), vocab_size=400, cache_dir=folder / "cache")
    config = replace(tiny, data=data, steps=10, eval_every=10, eval_batches=1, checkpoint_every=10)
    return train(config, folder / "run", Silent()).out, str(texts)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_grouping", description=__doc__)
    parser.add_argument("run", nargs="?", help="a run folder, such as `equipoise train demo` writes")
    parser.add_argument("--widen", type=int, default=1, metavar="N", help="experts N times as wide, filled with zeros")
    parser.add_argument("--data", default="embedded", help="what prompts are taken from, see `equipoise train`")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16], metavar="N", help="decode_batch")
    parser.add_argument("--answers", type=int, default=32, help="side by side; more than the largest decode_batch")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=40, help="of each answer")
    parser.add_argument("--skips", type=int, default=16, help="Limits.max_skips")
    parser.add_argument("--rounds", type=int, default=3)
    add_output_arguments(parser)
    options = parser.parse_args()
    if options.smoke:
        torch.set_num_threads(1)
        options.sizes, options.answers, options.prompt, options.tokens, options.rounds = [2, 4], 8, 8, 8, 2
    elif options.run is None:
        parser.error("run: expected a run folder, such as `equipoise train demo` writes; or --smoke")
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            run, spec = small_run(Path(folder))
        else:
            run, spec = Path(options.run), options.data
        loaded = widened(load(run), options.widen)
        work = Workload(prompts_of(loaded, spec, options.answers, options.prompt), options.tokens, options.skips)
        settings = {"run": run.name, "corpus": "two domains" if options.smoke else spec, "answers": options.answers}
        settings |= {
            "prompt": options.prompt,
            "tokens": options.tokens,
            "max_skips": options.skips,
            "widen": options.widen,
        }
        settings |= {"experts": loaded.model.config.moe.num_experts if loaded.model.config.moe else 0}
        emit(
            Report(settings | {"rounds": options.rounds}, tables(loaded, work, options.sizes, options.rounds)), options
        )


if __name__ == "__main__":
    main()
