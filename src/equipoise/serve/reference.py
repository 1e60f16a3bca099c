"""The slow twin of the engine: one request after the other, the whole sequence anew for each token, no cache.

Same tokens, texts and log-probabilities, in obvious code. Tests compare the engine with it.
"""

from __future__ import annotations

import numpy as np
import torch

from equipoise.models.decoder import Decoder
from equipoise.models.tokenizers import AnyTokenizer
from equipoise.serve.engine import check, num_ids
from equipoise.serve.request import FinishReason, Logprob, Output, Request, RequestError
from equipoise.serve.sampling import Row, choose, logprobs_of
from equipoise.serve.text import TextStream
from equipoise.serve.trace import ExpertTrace, experts_of_any
from equipoise.types import Decision


@torch.inference_mode()
def answer(model: Decoder, tokenizer: AnyTokenizer, request: Request) -> Output:
    """The whole answer as one piece."""
    model.eval()
    trace = ExpertTrace(model.moe_layers)
    try:
        return _answer(model, tokenizer, request, trace)
    finally:
        trace.detach()


def _answer(model: Decoder, tokenizer: AnyTokenizer, request: Request, trace: ExpertTrace) -> Output:
    tokens, made = list(request.prompt), list[int]()
    stream, text = TextStream(request.stop), ""
    logprobs: list[Logprob] = []
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    finish: FinishReason | None = None
    while finish is None:
        with trace.watching() as decisions:
            logits_SV = model(torch.tensor([tokens]))[0, :, : num_ids(model, tokenizer)]
        if request.prompt_logprobs and prompt_logprobs is None:
            after = list(request.prompt[1:])
            number = [request.num_logprobs or 0] * len(after)
            prompt_logprobs = (None, *logprobs_of(logits_SV[: len(after)], after, number))
        if request.max_tokens == 0:
            finish = "length"
            break
        [token] = choose(logits_SV[-1:], [Row(request.sampling, tokens, len(request.prompt))])
        if request.num_logprobs is not None:
            logprobs += logprobs_of(logits_SV[-1:], [token], [request.num_logprobs])
        tokens.append(token)
        made.append(token)
        if token in request.stop_ids:
            text += stream.finish()
            finish = "stop"
        else:
            text += stream.push(tokenizer.bytes_of(token))
            if stream.stopped is None and len(made) == request.max_tokens:
                text += stream.finish()
                finish = "length"
            if stream.stopped is not None:
                finish = "stop"
    stop = stream.stopped or (made[-1] if made and made[-1] in request.stop_ids else None)
    return Output(
        request.id,
        token_ids=tuple(made),
        text=text,
        logprobs=tuple(logprobs),
        finish=finish,
        stop=stop,
        prompt_logprobs=prompt_logprobs,
        experts=_experts(decisions, len(tokens) - bool(made)) if request.routed_experts else None,
    )


def _experts(decisions: list[Decision], num_tokens: int) -> np.ndarray:
    return experts_of_any(decisions) if decisions else np.empty((0, num_tokens, 0), dtype=np.int16)


class SlowEngine:
    """`engine.Backend` without batches: a step is one whole answer."""

    def __init__(self, model: Decoder, tokenizer: AnyTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._waiting: dict[str, Request] = {}

    @property
    def max_tokens(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.model.config.max_seq_len

    @property
    def has_work(self) -> bool:
        """Whether anything waits."""
        return bool(self._waiting)

    def add(self, request: Request) -> None:
        """Take a request."""
        check(request, self.max_tokens, num_ids(self.model, self.tokenizer))
        if request.id in self._waiting:
            raise RequestError("id", f"expected a new one, {request.id!r} is being served")
        self._waiting[request.id] = request

    def cancel(self, id: str, reason: FinishReason = "cancelled") -> list[Output]:
        """Forget a request."""
        return [] if self._waiting.pop(id, None) is None else [Output(id, finish=reason)]

    def step(self) -> list[Output]:
        """The first one's answer."""
        if not self._waiting:
            return []
        request = self._waiting.pop(next(iter(self._waiting)))
        return [answer(self.model, self.tokenizer, request)]

    def forget_cache(self) -> None:
        """There is none."""
