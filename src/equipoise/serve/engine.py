"""The engine: add requests, step, take pieces of answers. A step is schedule, run, account.

One thread owns it. Requests, tokens and texts; no HTTP, no clocks but the one for deadlines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from equipoise.models.decoder import Decoder
from equipoise.models.tokenizers import AnyTokenizer
from equipoise.serve.blocks import BlockPool
from equipoise.serve.paged_cache import PagedKV
from equipoise.serve.request import FinishReason, Output, Request, RequestError
from equipoise.serve.runner import Computed, Runner, StepResult
from equipoise.serve.scheduler import Limits, Piece, Scheduler
from equipoise.serve.sequence import Sequence
from equipoise.serve.states import States
from equipoise.serve.trace import joined

MAX_FAILURES = 3  # forwards in a row, after which a request is given up


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
    """What one forward did, in numbers. distinct_experts: per MoE layer, how many experts its tokens went to."""

    seconds: float
    num_prompt_tokens: int
    num_answer_tokens: int
    num_preempted: int
    distinct_experts: tuple[int, ...]


@dataclass(frozen=True)
class Occupancy:
    """How full an engine is now. num_running, num_waiting: requests. free_blocks: of the cache's num_blocks."""

    num_running: int
    num_waiting: int
    free_blocks: int
    num_blocks: int


class Engine:
    """Continuous batching over one model.

    num_blocks, block_size: of the cache. prefix_reuse: whether prompts share what their beginnings have in common;
    models with Mamba layers never do, as a state is of all tokens before it. on_step: is told about each forward that
    did not fail, and must not raise. fatal: errors after which nothing can be computed any more; `step` raises them.
    Raises ValueError for sizes out of range.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: AnyTokenizer,
        *,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        num_blocks: int = 1024,
        block_size: int = 16,
        prefix_reuse: bool = True,
        on_step: Callable[[StepReport], None] = lambda report: None,
        fatal: tuple[type[Exception], ...] = (),
    ) -> None:
        self.model, self.tokenizer, self.limits = model.eval(), tokenizer, limits
        weight = model.embed_tokens.weight
        has_states = bool(model.config.mamba_layer_ids)
        self.pool = BlockPool(num_blocks, block_size, reuse=prefix_reuse and not has_states)
        self.scheduler = Scheduler(self.pool, limits)
        kv = PagedKV(model.config, num_blocks, block_size, weight.dtype, weight.device)
        states = States(model.config, limits.max_running, weight.dtype, weight.device) if has_states else None
        self._runner = Runner(model, kv, num_ids(model, tokenizer), states)
        self._sequences: dict[str, Sequence] = {}
        self._order = 0
        self._on_step, self._fatal = on_step, fatal

    @property
    def max_tokens(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return min(self.model.config.max_seq_len, self.pool.num_blocks * self.pool.block_size)

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._sequences)

    def occupancy(self) -> Occupancy:
        """How full it is, also between steps. From any thread; then its numbers may be a moment apart."""
        scheduler, pool = self.scheduler, self.pool
        return Occupancy(len(scheduler.running), scheduler.num_waiting, pool.num_free, pool.num_blocks)

    def add(self, request: Request) -> None:
        """Take a request. Raises RequestError for one that can never be served, OverloadedError when too many wait."""
        check(request, self.max_tokens, num_ids(self.model, self.tokenizer))
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
        except self._fatal:
            raise
        except Exception as error:  # one bad forward must not take down all that wait
            return outputs + self._one_by_one(pieces, error)
        return outputs + self._take(result, pieces, began)

    def forget_cache(self) -> None:
        """The weights or their routing have changed: compute all keys and values anew. Nothing is lost but time."""
        self.pool.forget_all()
        self.scheduler.retract(list(self.scheduler.running))

    def close(self) -> None:
        """Leave the model as it was."""
        self._runner.detach()

    # ------------------------------------------------------------------------------------------------- account

    def _take(self, result: StepResult, pieces: tuple[Piece, ...], began: float) -> list[Output]:
        """What came of a forward, to all that wait for it. began: seconds of time.perf_counter."""
        outputs = [output for computed in result.pieces for output in self._account(computed)]
        self._on_step(self._report(time.perf_counter() - began, pieces, result))
        return outputs

    def _account(self, computed: Computed) -> list[Output]:
        """What the piece means for its sequence: it goes on, has a new token, or ends."""
        piece, sequence = computed.piece, computed.piece.sequence
        if not computed.finite:
            self.pool.forget(sequence.blocks)
            return [self._finish(sequence, "failed", error="the model's output is not a number")]
        self.scheduler.computed(piece)
        sequence.failures = 0
        request = sequence.request
        if request.routed_experts:
            sequence.experts.append(computed.experts)
        if request.prompt_logprobs:
            sequence.prompt_logprobs += computed.prompt_logprobs
        sequence.last_experts = computed.last_experts
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
        if "text" not in last:
            last["text"] = sequence.text.finish()
        return Output(
            request.id,
            finish=reason,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if request.prompt_logprobs else None,
            experts=joined(sequence.experts) if request.routed_experts else None,
            num_cached=sequence.num_cached or 0,
            **last,  # type: ignore[arg-type]  # fields of Output
        )

    def _past_deadline(self) -> list[Output]:
        now = time.monotonic()
        late = [each for each in self._sequences.values() if _is_past(each.request.deadline, now)]
        return [self._finish(sequence, "deadline") for sequence in late]

    def _one_by_one(self, pieces: tuple[Piece, ...], error: Exception) -> list[Output]:
        """After a forward that failed: each piece alone, so that one that makes it fail takes nobody with it."""
        if len(pieces) == 1:
            return self._failed(pieces[0].sequence, error)
        outputs = []
        for piece in pieces:
            began = time.perf_counter()
            try:
                result = self._runner.run([piece])
            except self._fatal:
                raise
            except Exception as alone:  # it is tried again in the next step
                outputs += self._failed(piece.sequence, alone)
            else:
                outputs += self._take(result, (piece,), began)
        return outputs

    def _failed(self, sequence: Sequence, error: Exception) -> list[Output]:
        """Tried again in the next step, unless it goes on failing."""
        sequence.failures += 1
        if sequence.failures < MAX_FAILURES:
            return []
        return [self._finish(sequence, "failed", error=f"{type(error).__name__}: {error}")]

    def _report(self, seconds: float, pieces: tuple[Piece, ...], result: StepResult) -> StepReport:
        new = sum(computed.token is not None for computed in result.pieces)
        prompts = sum(piece.num_tokens for piece in pieces if piece.start < len(piece.sequence.request.prompt))
        return StepReport(
            seconds=seconds,
            num_prompt_tokens=prompts,
            num_answer_tokens=new,
            num_preempted=self.scheduler.num_preempted,
            distinct_experts=result.distinct_experts,
        )


def num_ids(model: Decoder, tokenizer: AnyTokenizer) -> int:
    """Tokens that can be asked for and given: a model's vocabulary may be filled up beyond its tokenizer's."""
    return min(model.config.vocab_size, tokenizer.vocab_size)


def check(request: Request, max_tokens: int, num_ids: int) -> None:
    """Raise RequestError for a request that this model can never serve."""
    total = len(request.prompt) + request.max_tokens
    if total > max_tokens:
        raise RequestError(
            "max_tokens",
            f"the prompt's {len(request.prompt)} tokens and {request.max_tokens} new ones make {total}, expected at "
            f"most {max_tokens}; shorten the prompt or ask for fewer",
        )
    for param, ids in (("prompt", request.prompt), ("logit_bias", request.sampling.logit_bias)):
        wrong = [id for id in ids if not 0 <= id < num_ids]
        if wrong:
            raise RequestError(param, f"expected token ids in [0, {num_ids}), got {wrong[0]}; use this model's tokens")


def _is_past(deadline: float | None, now: float) -> bool:
    return deadline is not None and deadline <= now


def blocks_that_fit(model: Decoder, block_size: int, gigabytes: float, max_running: int = 1) -> int:
    """How many blocks so much memory holds; at least enough for one whole sequence is needed.

    max_running: sequences at a time; the states of each, in models that have some, are taken off first. Without
    attention there is nothing in the blocks, and so many are enough for all of them.
    Raises ValueError, with what is needed, for less.
    """
    dtype: torch.dtype = model.embed_tokens.weight.dtype
    each = PagedKV.bytes_per_block(model.config, block_size, dtype)
    states = max_running * States.bytes_per_slot(model.config, dtype)
    needed, left = -(-model.config.max_seq_len // block_size), gigabytes * 2**30 - states
    number = int(left // each) if each else max_running * needed
    if number < needed or left < 0:
        beside = f", and states of {max_running} sequences {states / 2**30:.3g} GB" if states else ""
        raise ValueError(
            f"cache_gb: one sequence of {model.config.max_seq_len} tokens takes {needed * each / 2**30:.3g} GB{beside}"
            f", got {gigabytes:g}; give the cache more"
        )
    return number
