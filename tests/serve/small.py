"""Tiny models in float64, where tokens must be equal, requests of every kind, and whole answers of an engine."""

import random
from collections.abc import Callable, Iterable

import numpy as np
import torch

from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.models.device import pick_device
from equipoise.models.tokenizer import Tokenizer
from equipoise.routing import TopK
from equipoise.serve.engine import Engine
from equipoise.serve.request import Output, Request, Sampling
from equipoise.serve.scheduler import Limits

TOKENIZER = Tokenizer("bytes", {bytes([byte]): byte for byte in range(256)})
EOT = TOKENIZER.eot_id
MAX_TOKENS = 96
DEVICE = pick_device("auto")  # of the engine, where slow twins stay on the CPU
TOP_2 = TopK(k=2)


def tiny_model(seed: int = 0, *, router=TOP_2, shared_experts: int = 0, **changes) -> Decoder:
    torch.manual_seed(seed)
    moe = MoEConfig(num_experts=8, hidden_dim=16, router=router, shared_experts=shared_experts)
    values = {"vocab_size": 257, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 32}
    values |= {"max_seq_len": MAX_TOKENS, "moe": moe, "init_std": 0.3}  # large: a wrong position or mask shows
    return Decoder(DecoderConfig(**(values | changes))).double().eval()


def tiny_engine(model: Decoder, *, num_blocks: int = 64, block_size: int = 8, tokenizer=TOKENIZER, **options) -> Engine:
    options.setdefault("limits", Limits(max_running=8, tokens_per_step=20))
    return Engine(model, tokenizer, num_blocks=num_blocks, block_size=block_size, **options)


def greedy(id: str, prompt: Iterable[int], max_tokens: int = 8, **fields) -> Request:
    return Request(id, tuple(prompt), max_tokens, Sampling(temperature=0.0), **fields)


def mixed_requests(number: int, seed: int = 0) -> list[Request]:
    """Every option, alone and with others; a third of the prompts begin with the same 30 tokens."""
    rng = random.Random(seed)
    shared = tuple(rng.randrange(256) for _ in range(30))
    requests = []
    for n in range(number):
        prompt = (shared if n % 3 == 0 else ()) + tuple(rng.randrange(256) for _ in range(rng.randrange(1, 25)))
        sampling = Sampling(
            temperature=(0.0, 1.0, 0.7)[n % 3],
            top_k=(None, 20)[n % 2],
            top_p=(1.0, 0.8)[n % 2],
            min_p=(0.0, 0.05)[n % 4 // 3],
            presence_penalty=(0.0, 0.5)[n % 2],
            frequency_penalty=(0.0, 0.3)[n % 5 // 4],
            repetition_penalty=(1.0, 1.2)[n % 7 // 5],
            logit_bias={65: 3.0} if n % 5 == 0 else {},
            seed=n,
        )
        requests.append(
            Request(
                str(n),
                prompt,
                rng.randrange(1, 30),
                sampling,
                stop=("A", "\x07\x08")[: n % 3],
                stop_ids=frozenset({EOT, *range(n % 4)}),
                num_logprobs=(3, None, 0, None)[n % 4],
                prompt_logprobs=n % 6 == 0,
                routed_experts=n % 5 == 0,
                client=("a", "b")[n % 2],
            )
        )
    return requests


def answers(
    engine: Engine, requests: Iterable[Request] = (), *, between: Callable[[int], None] = lambda step: None
) -> dict[str, Output]:
    """Each request's pieces, put together. between: is called before each step with its number."""
    for request in requests:
        engine.add(request)
    pieces: dict[str, list[Output]] = {}
    for step in range(5000):
        if not engine.has_work:
            return {id: whole(each) for id, each in pieces.items()}
        between(step)
        for output in engine.step():
            pieces.setdefault(output.id, []).append(output)
    raise AssertionError("the engine does not come to an end")


def whole(pieces: list[Output]) -> Output:
    """One piece of all. Exactly the last one says why the answer ended."""
    assert [piece.finish is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    last = pieces[-1]
    return Output(
        last.id,
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        text="".join(piece.text for piece in pieces),
        logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
        finish=last.finish,
        stop=last.stop,
        prompt_logprobs=last.prompt_logprobs,
        experts=last.experts,
        num_cached=last.num_cached,
        error=last.error,
    )


def assert_same(actual: Output, expected: Output, atol: float = 1e-5) -> None:
    """All but num_cached: what is saved is not part of the answer. atol: of log-probabilities."""
    assert actual.token_ids == expected.token_ids
    assert (actual.text, actual.finish, actual.stop) == (expected.text, expected.finish, expected.stop)
    for mine, theirs in ((actual.logprobs, expected.logprobs), (actual.prompt_logprobs, expected.prompt_logprobs)):
        assert (mine is None) == (theirs is None)
        for one, other in zip(mine or (), theirs or (), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert (one.id, [id for id, _ in one.top]) == (other.id, [id for id, _ in other.top])
                values = [one.logprob, *(value for _, value in one.top)]
                np.testing.assert_allclose(values, [other.logprob, *(value for _, value in other.top)], atol=atol)
    assert (actual.experts is None) == (expected.experts is None)
    if actual.experts is not None:
        assert actual.experts.dtype == np.int16
        np.testing.assert_array_equal(actual.experts, expected.experts)


def assert_nothing_leaks(engine: Engine) -> None:
    """All blocks are free, and nobody is remembered."""
    assert not engine.has_work
    assert engine.pool.num_free == engine.pool.num_blocks
    assert engine.pool.num_used == 0
    assert engine.scheduler.num_waiting == 0
    assert engine.scheduler.running == []
    assert engine.scheduler.num_free_slots == engine.limits.max_running
