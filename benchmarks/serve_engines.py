"""The engines that are compared, behind one call: requests in, texts out, when all are done.

Each gets the same weights in the same type and as many threads. What is not installed, or does not run, raises
LeftOutError with the reason.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.serve_llama_cpp import ADDRESS, write_gguf
from benchmarks.serving import byte_tokenizer, listening, random_model, served, write_run
from benchmarks.serving_client import Together
from equipoise.bench.peers.mixtral import LOGITS_LIMIT, generate, logits_error, mixtral_of
from equipoise.bench.problem import LeftOutError
from equipoise.models.config import DecoderConfig
from equipoise.models.decoder import Decoder
from equipoise.models.tokenizer import Tokenizer
from equipoise.serve.engine import Engine
from equipoise.serve.request import Request, Sampling

BLOCK = 16


@dataclass(frozen=True)
class Ask:
    """A prompt to continue greedily by exactly so many tokens."""

    prompt: tuple[int, ...]
    max_tokens: int


class Run(Protocol):
    """Answers by one engine."""

    def __call__(self, asks: Sequence[Ask], at_once: int | None = None) -> list[str]:
        """at_once: how many requests are there at the same time, all where it is None."""
        ...


@dataclass(frozen=True, eq=False)
class Subject:
    """One model in one type, and a folder for files of it."""

    name: str
    config: DecoderConfig
    dtype: torch.dtype
    model: Decoder
    tokenizer: Tokenizer
    folder: Path
    max_running: int

    @property
    def type_name(self) -> str:
        """As people write it."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    @property
    def device(self) -> str:
        """Where the weights are: cpu or cuda."""
        return self.model.embed_tokens.weight.device.type


def make_subject(
    name: str, config: DecoderConfig, dtype: torch.dtype, folder: Path, max_running: int, device: str = "cpu"
) -> Subject:
    """With a run folder at folder/run."""
    model = random_model(config, dtype)
    write_run(folder / "run", model)
    return Subject(name, config, dtype, model.to(device), byte_tokenizer(config.vocab_size), folder, max_running)


# ------------------------------------------------------------------------------------------------- equipoise


@contextmanager
def engine(subject: Subject) -> Iterator[Run]:
    """Engine.step in this process. No prompt's keys are used again: a second round would find them all."""
    num_blocks = subject.max_running * -(-subject.config.max_seq_len // BLOCK)
    made = Engine(subject.model, subject.tokenizer, num_blocks=num_blocks, block_size=BLOCK, prefix_reuse=False)

    def run(asks: Sequence[Ask], at_once: int | None = None) -> list[str]:
        texts = dict.fromkeys(map(str, range(len(asks))), "")
        coming = (
            Request(id, ask.prompt, ask.max_tokens, Sampling(temperature=0.0))
            for id, ask in zip(texts, asks, strict=True)
        )
        for request in islice(coming, at_once):
            made.add(request)
        while made.has_work:
            for output in made.step():
                texts[output.id] += output.text
                if output.finish is not None and (request := next(coming, None)) is not None:
                    made.add(request)
        return list(texts.values())

    try:
        yield run
    finally:
        made.close()


@contextmanager
def http_server(subject: Subject) -> Iterator[Run]:
    """`equipoise serve` as anybody starts it, with monitor, breaker and metrics, through HTTP."""
    dtype = "bf16" if subject.dtype == torch.bfloat16 else "fp32"
    options = ("--no-prefix-reuse", "--dtype", dtype, "--device", subject.device, "--name", "bench")
    folder = subject.folder
    with (
        served(folder / "run", folder / "records", *options, log=folder / "serve.log") as server,
        over_http(server.api, ignore_eos=True) as run,
    ):
        yield run


@contextmanager
def over_http(api: str, **more: Any) -> Iterator[Run]:
    """Prompts as token ids, to any server of OpenAI's API; all requests at the same time."""
    together = Together(api)

    def run(asks: Sequence[Ask], at_once: int | None = None) -> list[str]:
        bodies = [
            {"model": "bench", "prompt": ask.prompt, "max_tokens": ask.max_tokens, "temperature": 0.0, **more}
            for ask in asks
        ]
        return [told.text for told in together.ask(bodies, at_once)]

    with closing(together):
        yield run


# ------------------------------------------------------------------------------------------------- transformers


@contextmanager
def one_batch(subject: Subject) -> Iterator[Run]:
    """transformers' generate, all requests in one batch, or in batches of those that are there at the same time."""
    mixtral = checked_mixtral(subject)

    def run(asks: Sequence[Ask], at_once: int | None = None) -> list[str]:
        texts = []
        for first in range(0, len(asks), at_once or len(asks)):
            batch = asks[first : first + (at_once or len(asks))]
            made = generate(mixtral, [ask.prompt for ask in batch], max(ask.max_tokens for ask in batch))
            texts += [subject.tokenizer.decode(ids[: ask.max_tokens]) for ids, ask in zip(made, batch, strict=True)]
        return texts

    yield run


@contextmanager
def one_by_one(subject: Subject) -> Iterator[Run]:
    """The same, one request after the other."""
    mixtral = checked_mixtral(subject)

    def run(asks: Sequence[Ask], at_once: int | None = None) -> list[str]:
        return [subject.tokenizer.decode(generate(mixtral, [ask.prompt], ask.max_tokens)[0]) for ask in asks]

    yield run


def checked_mixtral(subject: Subject) -> Any:
    """The same weights as a Mixtral, after its logits were compared: in fp32, where both compute the same."""
    if find_spec("transformers") is None:
        raise LeftOutError("transformers: is not installed; pip install 'equipoise[bench]'")
    exact = random_model(subject.config, torch.float32).to(subject.device)
    error = logits_error(exact, mixtral_of(exact))
    if not error <= LOGITS_LIMIT:
        raise ValueError(f"mixtral: expected logits within {LOGITS_LIMIT:g} of ours, got {error:.3g}; mend the mapping")
    return mixtral_of(subject.model)


def batching_transformers_serve(subject: Subject) -> AbstractContextManager[Run]:
    """The same with its continuous batching. In 5.23 it takes 14 GiB on a CPU; its --cb options didn't change that."""
    return transformers_serve(subject, "--continuous-batching")


@contextmanager
def transformers_serve(subject: Subject, *options: str) -> Iterator[Run]:
    """`transformers serve`, through HTTP. It reads prompts as text: each id is a word, "t17", for it alone."""
    for needed in ("transformers", "typer", "fastapi", "openai"):
        if find_spec(needed) is None:
            raise LeftOutError(f"transformers serve: {needed} is not installed; pip install 'transformers[serving]'")
    folder = subject.folder / "mixtral"
    if not folder.exists():
        checked_mixtral(subject).save_pretrained(folder)
        _save_words(folder, subject.config.vocab_size)
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--port", "0"]
    command += ["--device", subject.device, *options]

    def address(text: str) -> str | None:
        found = re.search(r"running on (http://\S+)", text)
        return found and f"{found[1]}/v1".replace("localhost", "127.0.0.1")

    def run(asks: Sequence[Ask], at_once: int | None = None) -> list[str]:
        bodies = [
            {
                "model": str(folder),
                "prompt": " ".join(f"t{id}" for id in ask.prompt),
                "max_tokens": ask.max_tokens,
                "temperature": 0.0,
            }
            for ask in asks
        ]
        texts = [told.text for told in together.ask(bodies, at_once)]
        return [subject.tokenizer.decode(int(number) for number in re.findall(r"t(\d+)", text)) for text in texts]

    log = subject.folder / f"transformers{''.join(options[:1])}.log"
    with listening(command, address, log) as (_, api), closing(Together(api)) as together:
        try:
            run([Ask((1, 2, 3), 2)])
        except RuntimeError as error:
            last = [line for line in log.read_text().splitlines() if line.strip()][-1]
            raise LeftOutError(f"transformers serve {' '.join(options)}: {error}; its last words: {last}") from error
        yield run


def _save_words(folder: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Words(models.WordLevel({f"t{id}": id for id in range(vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0").save_pretrained(folder)


# ------------------------------------------------------------------------------------------------- llama.cpp


@contextmanager
def llama_cpp(subject: Subject) -> Iterator[Run]:
    """llama.cpp's server in a process of its own, through HTTP."""
    for needed in ("xllamacpp", "gguf"):
        if find_spec(needed) is None:
            raise LeftOutError(f"llama.cpp: {needed} is not installed; pip install xllamacpp gguf")
    file = subject.folder / f"model-{subject.type_name}.gguf"
    write_gguf(file, subject.model, subject.tokenizer)
    command = [sys.executable, "-m", "benchmarks.serve_llama_cpp", str(file)]
    command += ["--threads", str(torch.get_num_threads()), "--parallel", str(subject.max_running)]
    command += ["--tokens", str(subject.config.max_seq_len)]

    def address(text: str) -> str | None:
        found = re.search(rf"{ADDRESS}(\S+)", text)
        return found and found[1]

    with (
        listening(command, address, subject.folder / "llama.log") as (_, api),
        over_http(api, ignore_eos=True) as run,
    ):
        yield run
