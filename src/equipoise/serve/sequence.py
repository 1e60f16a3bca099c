"""One request while the engine works on it: its tokens so far, its blocks, and how far they have been computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from equipoise.serve.blocks import ROOT, BlockPool
from equipoise.serve.request import FinishReason, Logprob, Request
from equipoise.serve.text import TextStream

State = Literal["waiting", "running", "finished"]


class Sequence:
    """tokens: prompt and answer. num_computed: tokens whose keys and values are in `blocks`. order: of arrival.

    slot: its own while it runs, for what can't be in blocks (`States`).
    """

    def __init__(self, request: Request, order: int) -> None:
        self.request, self.order = request, order
        self.tokens: list[int] = list(request.prompt)
        self.state: State = "waiting"
        self.num_computed = 0
        self.num_cached: int | None = None  # prompt tokens that were there already; None before the first admission
        self.blocks: list[int] = []
        self.slot: int | None = None
        self.prefix, self.num_published = ROOT, 0
        self.text = TextStream(request.stop)
        self.failures = 0  # forwards in a row that have failed
        self.skipped = 0  # steps in a row in which others went first
        self.last_experts = 0  # of the newest token that was computed, as bits
        self.experts: list[np.ndarray] = []  # int16 (L, tokens, K), in the order of the tokens
        self.prompt_logprobs: list[Logprob | None] = [None]

    @property
    def num_made(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_to_compute(self) -> int:
        """Tokens without keys and values; 1 while the answer is being made."""
        return len(self.tokens) - self.num_computed

    @property
    def decodes(self) -> bool:
        """Whether all but the newest token of the answer are computed."""
        return self.num_to_compute == 1 and self.num_made > 0

    def publish(self, pool: BlockPool) -> None:
        """Let others use the blocks that have become full."""
        size = pool.block_size
        while (self.num_published + 1) * size <= self.num_computed:
            start = self.num_published * size
            block = self.blocks[self.num_published]
            self.prefix = pool.publish(self.prefix, self.tokens[start : start + size], block)
            self.num_published += 1

    def retract(self, pool: BlockPool) -> None:
        """Give all blocks back and wait again; what is computed is computed anew, the tokens stay."""
        pool.release(self.blocks)
        self.blocks, self.num_computed = [], 0
        self.experts, self.prompt_logprobs = [], [None]
        self.state = "waiting"

    def finish(self, pool: BlockPool) -> None:
        """Give all blocks back."""
        pool.release(self.blocks)
        self.blocks = []
        self.state = "finished"

    def why_finished(self, token: int, decode: Callable[[int], bytes]) -> tuple[str, FinishReason | None]:
        """Take in the newest token: (the text that is certain now, why the answer ends with it)."""
        if token in self.request.stop_ids:
            return self.text.finish(), "stop"
        text = self.text.push(decode(token))
        if self.text.stopped is not None:
            return text, "stop"
        if self.num_made >= self.request.max_tokens:
            text += self.text.finish()
            return text, "stop" if self.text.stopped is not None else "length"
        return text, None
