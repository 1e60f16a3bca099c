"""The engine: add requests, step, take pieces of answers. A step is schedule, run, account.

One thread owns it. Requests, tokens and texts; no HTTP, no clocks but the one for deadlines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from equipoise.models.decoder import Decoder
from equipoise.models.tokenizer import Tokenizer
from equipoise.serve.blocks import BlockPool
from equipoise.serve.paged_cache import PagedKV
from equipoise.serve.request import FinishReason, Output, Request, RequestError
from equipoise.serve.runner import Computed, Runner, StepResult
from equipoise.serve.scheduler import Limits, Piece, Scheduler
from equipoise.serve.sequence import Sequence

MAX_RETRIES = 2  # of a request whose forward failed


class OverloadedError(RuntimeError):
    """Too many requests wait already."""


class Backend(Protocol):
    """What a loop needs of an engine. `Engine` batches; `reference.SlowEngine` is its obvious twin."""

    def add(self, request: Request) -> None: ...  # noqa: D102 - described by Engine

    def cancel(self, id: str, reason: FinishReason = "cancelled") -> list[Output]: ...  # noqa: D102

    def step(self) -> list[Output]: ...  # noqa: D102

    def forget_cache(self) -> None: ...  # noqa: D102

    @property
    def has_work(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class StepReport:
    """What one step did, in numbers. experts: per MoE layer, how many experts its tokens went to."""

    seconds: float
    num_prompt_tokens: int
    num_answer_tokens: int
    num_running: int
    num_waiting: int
    free_blocks: int
    num_blocks: int
    num_preempted: int
    distinct_experts: tuple[int, ...]


class Engine:
    """Continuous batching over one model.

    num_blocks, block_size: of the cache. on_step: is told about each step. Raises ValueError for limits out of range.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        num_blocks: int = 1024,
        block_size: int = 16,
        prefix_reuse: bool = True,
        on_step: Callable[[StepReport], None] = lambda report: None,
    ) -> None:
        self.model, self.tokenizer, self.limits = model.eval(), tokenizer, limits
        weight = model.embed_tokens.weight
        self.pool = BlockPool(num_blocks, block_size, reuse=prefix_reuse)
        self.scheduler = Scheduler(self.pool, limits)
        self._runner = Runner(model, PagedKV(model.config, num_blocks, block_size, weight.dtype, weight.device))
        self._sequences: dict[str, Sequence] = {}
        self._order = 0
        self._on_step = on_step

    @property
    def max_tokens(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return min(self.model.config.max_seq_len, self.pool.num_blocks * self.pool.block_size)

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._sequences)

    def add(self, request: Request) -> None:
        """Take a request. Raises RequestError for one that can never be served, OverloadedError when too many wait."""
        check(request, self.max_tokens, self.model.config.vocab_size)
        if request.id in self._sequences:
            raise RequestError("id", f"expected a new one, {request.id!r} is being served")
        if self.scheduler.num_waiting >= self.limits.max_waiting:
            raise OverloadedError(f"{self.scheduler.num_waiting} requests wait already")
        self._order += 1
        sequence = Sequence(request, self._order)
        self._sequences[request.id] = sequence
        self.scheduler.add(sequence)

    def cancel(self, id: str, reason: FinishReason = "cancelled") -> list[Output]:
        """Stop working on a request; its last piece, or nothing for one that is not there."""
        sequence = self._sequences.get(id)
        return [] if sequence is None else [self._finish(sequence, reason)]

    def step(self) -> list[Output]:
        """Compute one batch. The pieces of answers that came of it."""
        began = time.perf_counter()
        outputs = self._past_deadline()
        pieces = self.scheduler.schedule()
        if not pieces:
            return outputs
        try:
            result = self._runner.run(pieces)
        except Exception as error:  # one bad forward must not take down all that wait
            return outputs + self._failed(pieces, error)
        for computed in result.pieces:
            outputs += self._account(computed)
        self._on_step(self._report(time.perf_counter() - began, pieces, result))
        return outputs

    def forget_cache(self) -> None:
        """The weights or their routing have changed: compute all keys and values anew. Nothing is lost but time."""
        self.pool.forget_all()
        self.scheduler.retract(list(self.scheduler.running))

    def close(self) -> None:
        """Leave the model as it was."""
        self._runner.detach()

    # ------------------------------------------------------------------------------------------------- account

    def _account(self, computed: Computed) -> list[Output]:
        """What the piece means for its sequence: it goes on, has a new token, or ends."""
        piece, sequence = computed.piece, computed.piece.sequence
        if not computed.finite:
            self._runner.kv.clear(sequence.blocks)
            return [self._finish(sequence, "failed", error="the model's output is not a number")]
        self.scheduler.computed(piece)
        request = sequence.request
        if request.routed_experts:
            sequence.experts.append(computed.experts)
        if request.prompt_logprobs:
            sequence.prompt_logprobs += computed.prompt_logprobs
        sequence.last_experts = _touched(computed.experts)
        if computed.token is None:
            return []
        if request.max_tokens == 0:
            return [self._finish(sequence, "length")]
        sequence.tokens.append(computed.token)
        text, finish = sequence.why_finished(computed.token, self.tokenizer.bytes_of)
        token_ids = (computed.token,)
        logprobs = () if computed.logprob is None else (computed.logprob,)
        if finish is None:
            return [Output(request.id, token_ids, text, logprobs)]
        stop = sequence.text.stopped or (computed.token if computed.token in request.stop_ids else None)
        return [self._finish(sequence, finish, token_ids=token_ids, text=text, logprobs=logprobs, stop=stop)]

    def _finish(self, sequence: Sequence, reason: FinishReason, **last: object) -> Output:
        """The last piece of an answer."""
        request = sequence.request
        del self._sequences[request.id]
        self.scheduler.remove(sequence)
        if "text" not in last and reason in ("deadline", "cancelled"):
            last["text"] = sequence.text.finish()
        return Output(
            request.id,
            finish=reason,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if request.prompt_logprobs else None,
            experts=_joined(sequence.experts) if request.routed_experts else None,
            num_cached=sequence.num_cached,
            **last,  # type: ignore[arg-type]  # fields of Output
        )

    def _past_deadline(self) -> list[Output]:
        now = time.monotonic()
        late = [each for each in self._sequences.values() if (each.request.deadline or now) < now]
        return [self._finish(sequence, "deadline") for sequence in late]

    def _failed(self, pieces: tuple[Piece, ...], error: Exception) -> list[Output]:
        """Those of the batch are computed again, and given up when it goes on failing."""
        outputs = []
        for sequence in [piece.sequence for piece in pieces]:
            sequence.retries += 1
            if sequence.retries > MAX_RETRIES:
                outputs.append(self._finish(sequence, "failed", error=f"{type(error).__name__}: {error}"))
        self.scheduler.retract([piece.sequence for piece in pieces if piece.sequence.state == "running"])
        return outputs

    def _report(self, seconds: float, pieces: tuple[Piece, ...], result: StepResult) -> StepReport:
        new = sum(computed.token is not None for computed in result.pieces)
        prompts = sum(piece.num_tokens for piece in pieces if piece.start < len(piece.sequence.request.prompt))
        return StepReport(
            seconds=seconds,
            num_prompt_tokens=prompts,
            num_answer_tokens=new,
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting,
            free_blocks=self.pool.num_free,
            num_blocks=self.pool.num_blocks,
            num_preempted=self.scheduler.num_preempted,
            distinct_experts=result.distinct_experts,
        )


def check(request: Request, max_tokens: int, vocab_size: int) -> None:
    """Raise RequestError for a request that this model can never serve."""
    total = len(request.prompt) + request.max_tokens
    if total > max_tokens:
        raise RequestError(
            "max_tokens",
            f"the prompt's {len(request.prompt)} tokens and {request.max_tokens} new ones make {total}, expected at "
            f"most {max_tokens}; shorten the prompt or ask for fewer",
        )
    wrong = [id for id in (*request.prompt, *request.sampling.logit_bias) if not 0 <= id < vocab_size]
    if wrong:
        raise RequestError(
            "prompt", f"expected token ids in [0, {vocab_size}), got {wrong[0]}; use this model's tokens"
        )


def _touched(experts_LTK: np.ndarray) -> frozenset[int]:
    """Experts of the last token, as layer * 65536 + expert."""
    if not experts_LTK.size:
        return frozenset()
    last_LK = experts_LTK[:, -1].astype(np.int64)
    numbered_LK = last_LK + 65536 * np.arange(len(last_LK))[:, None]
    return frozenset(numbered_LK[last_LK >= 0].tolist())


def _joined(experts: list[np.ndarray]) -> np.ndarray:
    """int16 (L, T, K) of all pieces."""
    width = max((each.shape[2] for each in experts), default=0)
    padded = [np.pad(each, ((0, 0), (0, 0), (0, width - each.shape[2])), constant_values=-1) for each in experts]
    return np.concatenate(padded, axis=1) if padded else np.empty((0, 0, 0), dtype=np.int16)


def blocks_that_fit(model: Decoder, block_size: int, gigabytes: float) -> int:
    """How many blocks so much memory holds; at least enough for one whole sequence is needed.

    Raises ValueError, with what is needed, for less.
    """
    dtype: torch.dtype = model.embed_tokens.weight.dtype
    each = PagedKV.bytes_per_block(model.config, block_size, dtype)
    number, needed = int(gigabytes * 2**30 // each), -(-model.config.max_seq_len // block_size)
    if number < needed:
        raise ValueError(
            f"cache_gb: one sequence of {model.config.max_seq_len} tokens takes {needed * each / 2**30:.3g} GB, got "
            f"{gigabytes:g}; give the cache more"
        )
    return number
