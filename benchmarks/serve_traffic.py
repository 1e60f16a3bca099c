"""Many clients at once, each asking again as soon as it has its answer, and whether every answer was its own.

A known share of the requests is of a pool whose answers the slow twin has computed beforehand: while the model is in
health they must be the same to the letter. All answers must have the lengths, the seed and, where asked for, the
prompt of their own request.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
import torch

from benchmarks.serving_client import Body, Told, ask, new_client
from equipoise.models.run_files import Loaded
from equipoise.serve.reference import answer
from equipoise.serve.request import Request, Sampling

TICK_S = 0.02
FIRST_SEED = 1_000_000  # of requests that are not in the pool


@dataclass(frozen=True)
class Known:
    """A request of the pool, and its answer."""

    body: Body
    text: str


@dataclass(frozen=True)
class Mix:
    """What clients ask for. num_known: requests in the pool. known, echoed, leaving: shares of all requests."""

    num_clients: int
    prompts: tuple[int, int] = (4, 64)
    answers: tuple[int, int] = (4, 48)
    num_known: int = 32
    known: float = 0.25
    echoed: float = 0.25
    leaving: float = 0.05


class Prompts:
    """Pieces of the run's held-out text: what the model is made for, so that routing is as it should be."""

    def __init__(self, loaded: Loaded) -> None:
        if loaded.held_out_BS is None:
            raise ValueError(f"{loaded.folder}: expected a run with held-out text, found none; train it again")
        self._tokens: list[int] = loaded.held_out_BS.flatten().tolist()
        self.decode = loaded.tokenizer.decode
        self.room = loaded.model.config.max_seq_len

    def body(self, rng: random.Random, mix: Mix, model: str, seed: int) -> dict[str, object]:
        """A request that asks for a fixed number of tokens."""
        length = rng.randint(*mix.prompts)
        at = rng.randrange(len(self._tokens) - length)
        return {
            "model": model,
            "prompt": self._tokens[at : at + length],
            "max_tokens": min(rng.randint(*mix.answers), self.room - length),
            "seed": seed,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }


def make_pool(loaded: Loaded, prompts: Prompts, mix: Mix, model: str) -> list[Known]:
    """With the slow twin's answers."""
    rng = random.Random(1)
    pool = []
    for seed in range(mix.num_known):
        body = prompts.body(rng, mix, model, seed)
        request = Request(
            "known",
            tuple(body["prompt"]),
            int(str(body["max_tokens"])),
            Sampling(seed=seed),  # type: ignore[call-overload]
        )
        pool.append(Known(body, answer(loaded.model, loaded.tokenizer, request).text))
    torch.set_num_threads(1)  # from here on this process is a client
    return pool


@dataclass(eq=False)
class Traffic:
    """num_sent counts what was sent; `told` has what has ended. lags: seconds by which this process was late to wake
    up, every 20 ms: how much the client itself is a bottleneck."""

    api: str
    model: str
    mix: Mix
    prompts: Prompts
    pool: Sequence[Known]
    told: list[Told] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    num_sent: int = 0
    leaving: float | None = None  # a share, in place of the mix's
    stopping: bool = False

    async def run(self) -> None:
        """All clients, until `stopping`; then each gets the answer that it waits for."""
        async with new_client() as client:
            ticking = asyncio.create_task(self._tick())
            await asyncio.gather(*(self._client(client, number) for number in range(self.mix.num_clients)))
            ticking.cancel()

    async def _client(self, client: aiohttp.ClientSession, number: int) -> None:
        rng = random.Random(number)
        await asyncio.sleep(rng.random())
        round_ = 0
        while not self.stopping:
            round_ += 1
            body = self._next(rng, FIRST_SEED * (number + 1) + round_)
            share = self.mix.leaving if self.leaving is None else self.leaving
            leave_after = rng.randint(1, 4) if rng.random() < share else None
            self.num_sent += 1
            told = await ask(client, self.api, body, leave_after)
            self.told.append(told)
            if told.error:
                await asyncio.sleep(0.2)  # as a client would that is told to come back later

    def _next(self, rng: random.Random, seed: int) -> Body:
        if rng.random() < self.mix.known:
            return rng.choice(self.pool).body
        body = self.prompts.body(rng, self.mix, self.model, seed)
        return {**body, "echo": True} if rng.random() < self.mix.echoed else body

    async def _tick(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(TICK_S)
            self.lags.append(time.perf_counter() - before - TICK_S)


# ------------------------------------------------------------------------------------------------- checking


@dataclass(frozen=True)
class Span:
    """From when to when the model was not as it was loaded. Seconds of time.perf_counter."""

    begin: float
    end: float

    def meets(self, told: Told) -> bool:
        """Whether a request was open meanwhile."""
        return told.began <= self.end and told.ended >= self.begin


@dataclass(frozen=True)
class Checked:
    """wrong: says of each wrong answer what is wrong. num_twin: compared with the slow twin. num_other: of the pool,
    answered while the model was not as it was loaded, and otherwise than by the slow twin."""

    wrong: tuple[str, ...]
    num_own: int
    num_twin: int
    num_other: int


def check(told: Sequence[Told], pool: Sequence[Known], prompts: Prompts, changed: Sequence[Span]) -> Checked:
    """Every finished answer."""
    texts = {id(known.body): known.text for known in pool}
    finished = [each for each in told if each.finished]
    wrong = [text for each in finished if (text := wrong_with(each, prompts))]
    ids = [each.id for each in finished]
    wrong += [f"{len(ids) - len(set(ids))} answers have the id of another"] if len(ids) > len(set(ids)) else []
    num_twin = num_other = 0
    for each in finished:
        expected = texts.get(id(each.body))
        if expected is None:
            continue
        if any(span.meets(each) for span in changed):
            num_other += each.text != expected
            continue
        num_twin += 1
        if each.text != expected:
            wrong.append(f"seed {each.body['seed']}: {each.text[:60]!r}, the slow twin says {expected[:60]!r}")
    return Checked(tuple(wrong), len(finished), num_twin, num_other)


def wrong_with(told: Told, prompts: Prompts) -> str:
    """What shows that this is another request's answer, or not whole; empty when nothing does."""
    body, name = told.body, f"seed {told.body['seed']}"
    if told.seed != body["seed"]:
        return f"{name}: has the seed {told.seed}"
    counts = told.usage.get("prompt_tokens"), told.usage.get("completion_tokens")
    if counts != (len(body["prompt"]), body["max_tokens"]):
        return f"{name}: has {counts} tokens, expected {len(body['prompt'])} and {body['max_tokens']}"
    if body.get("echo") and not told.text.startswith(prompts.decode(body["prompt"]).rstrip("\ufffd")):
        return f"{name}: begins with {told.text[:40]!r}, its prompt is {prompts.decode(body['prompt'])[:40]!r}"
    return ""
