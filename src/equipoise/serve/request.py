"""What goes into the engine and what comes out: requests, how they are sampled, and pieces of their answers.

Plain frozen data. Texts and tokens only; HTTP is elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

MAX_LOGPROBS = 20
MAX_STOPS = 16
FinishReason = Literal["stop", "length", "deadline", "cancelled", "failed"]


class RequestError(ValueError):
    """A request that cannot be served as it is. param: the name of what is wrong with it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    temperature: 0 takes the likeliest. top_k, top_p, min_p: keep the k likeliest, the fewest whose probability reaches
    p, those with at least min_p times the likeliest's; in this order, after the temperature. presence_penalty,
    frequency_penalty: subtracted from the logits of tokens in the answer, once or per occurrence. repetition_penalty:
    divides positive and multiplies negative logits of tokens in prompt or answer (arXiv 1909.05858, section 4.1).
    logit_bias: added to logits, by token id. seed: of the draws, the same tokens for the same seed.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0.0, 100.0)
        if self.top_k is not None and self.top_k < 1:
            raise RequestError("top_k", f"expected at least 1, or none for all tokens, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError("top_p", f"expected a probability in (0, 1], got {self.top_p}")
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not 0.0 < self.repetition_penalty <= 10.0:
            raise RequestError("repetition_penalty", f"expected a factor in (0, 10], got {self.repetition_penalty}")
        for value in self.logit_bias.values():
            _in_range("logit_bias", value, -100.0, 100.0)

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or biases come before the choice."""
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0 or self.logit_bias
        )

    @property
    def filters(self) -> bool:
        """Whether unlikely tokens are left out."""
        return self.top_k is not None or self.top_p < 1.0 or self.min_p > 0.0


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    id: unique among the requests in the engine. prompt: token ids, at least one. max_tokens: of the answer.
    stop: the answer ends before any of these texts. stop_ids: it ends with any of these tokens; the end of a document
    is one unless it is left out by whoever asks. num_logprobs: alternatives to give per token; 0 the chosen one's
    alone; None for no log-probabilities. prompt_logprobs: those of the prompt's tokens too. routed_experts: say which
    experts each token went to. client: whose turn it is among those who wait. deadline: seconds of time.monotonic.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    prompt_logprobs: bool = False
    routed_experts: bool = False
    client: str = ""
    deadline: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("prompt", "expected at least one token, got none; begin with the end-of-document token")
        if self.max_tokens < 0 or (self.max_tokens == 0 and not self.prompt_logprobs):
            raise RequestError("max_tokens", f"expected at least 1, got {self.max_tokens}")
        if len(self.stop) > MAX_STOPS or not all(self.stop):
            raise RequestError("stop", f"expected at most {MAX_STOPS} texts, none of them empty, got {len(self.stop)}")
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= MAX_LOGPROBS:
            raise RequestError("logprobs", f"expected 0 to {MAX_LOGPROBS}, got {self.num_logprobs}")


@dataclass(frozen=True)
class Logprob:
    """ln p of one token under the model (temperature 1, no penalties), and of the likeliest ones, likeliest first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Output(NamedTuple):
    """A piece of an answer. The last piece has `finish`. A tuple, as one is made for each token.

    token_ids, logprobs: the new tokens. text: what is certain of the answer's text since the last piece. stop: the text
    or the id that ended it. prompt_logprobs: in the last piece, where asked for; None for the first token, which
    nothing precedes. experts: int16 (layers, tokens, K) in the last piece, where asked for: of each token that was
    routed, prompt first; -1 fills up where a token had fewer. num_cached: prompt tokens whose keys were already there.
    error: why it failed.
    """

    id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Logprob, ...] = ()
    finish: FinishReason | None = None
    stop: str | int | None = None
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    experts: np.ndarray | None = None
    num_cached: int = 0
    error: str = ""


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise RequestError(name, f"expected a number from {low:g} to {high:g}, got {value}")
