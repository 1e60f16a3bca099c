"""One forward of the model over what the scheduler chose, and the tokens that come of it. No queues.

It is the same `Decoder.forward` as in training: a row of tokens of many sequences, with a cache that keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from equipoise.models.decoder import Decoder
from equipoise.serve.paged_cache import PagedKV, Ragged, Span
from equipoise.serve.request import Logprob
from equipoise.serve.sampling import Row, all_finite, choose, logprobs_of
from equipoise.serve.scheduler import Piece
from equipoise.serve.states import States
from equipoise.serve.trace import ExpertTrace, as_bits, experts_of, num_distinct


class Computed(NamedTuple):
    """Of one piece. token: the next one; None before the end of the prompt, or where the logits are not finite.

    logprob: of the token, where asked for. prompt_logprobs: of the tokens that follow the piece's ones in the prompt.
    experts: int16 (L, tokens, K). last_experts: those of its last token, as bits.
    """

    piece: Piece
    token: int | None
    finite: bool
    logprob: Logprob | None
    prompt_logprobs: tuple[Logprob, ...]
    experts: np.ndarray
    last_experts: int


@dataclass(frozen=True, eq=False)
class StepResult:
    """Of one forward. distinct_experts: per MoE layer, how many experts the step's tokens went to."""

    pieces: tuple[Computed, ...]
    distinct_experts: tuple[int, ...]


class Runner:
    """A model, its cache, and what is seen of its experts. num_ids: tokens with a higher id are never chosen.

    states: of its Mamba layers, if it has some.
    """

    def __init__(self, model: Decoder, kv: PagedKV, num_ids: int, states: States | None = None) -> None:
        self.model, self.kv, self._num_ids, self._states = model, kv, num_ids, states
        self._num_experts = model.config.moe.num_choices if model.config.moe else 0
        self._trace = ExpertTrace(model.moe_layers)

    @torch.inference_mode()
    def run(self, pieces: Several[Piece]) -> StepResult:
        """Compute the pieces and choose the next tokens. The same pieces can be run again when this raises."""
        device = self.kv.device
        tokens = [token for piece in pieces for token in piece.sequence.tokens[piece.start : piece.end]]
        spans = [Span(each.sequence.blocks, each.start, each.num_tokens, each.sequence.slot) for each in pieces]
        cache = Ragged(self.kv, spans, self._states)
        wanted, places = _logits_wanted(pieces)
        with self._trace.watching() as decisions:
            logits_NV = self.model(
                torch.tensor([tokens], device=device),
                cache=cache,
                logits_at=torch.tensor(wanted, device=device),
            )
        logits_NV = logits_NV[:, : self._num_ids]
        experts_LTK = experts_of(decisions, len(tokens))
        last_PV = _rows(logits_NV, [place.stop - 1 for place in places]).float()
        finite = all_finite(last_PV)
        chosen = _choose(pieces, last_PV, finite)
        ends = list(accumulate(piece.num_tokens for piece in pieces))
        bits = as_bits(experts_LTK[:, [end - 1 for end in ends]], self._num_experts)
        computed = []
        for n, piece in enumerate(pieces):
            token, logprob = chosen[n]
            prompt = _prompt_logprobs(piece, logits_NV[places[n]]) if piece.sequence.request.prompt_logprobs else ()
            experts = experts_LTK[:, ends[n] - piece.num_tokens : ends[n]]
            computed.append(Computed(piece, token, finite[n], logprob, prompt, experts, bits[n]))
        cache.commit()
        return StepResult(tuple(computed), num_distinct(experts_LTK, self._num_experts))

    def detach(self) -> None:
        """Leave the model as it was."""
        self._trace.detach()


def _logits_wanted(pieces: Several[Piece]) -> tuple[list[int], list[slice]]:
    """(tokens of the row whose logits are needed, where among them each piece's are): the last one's, or all.

    Also in the middle of a prompt: what is not a number is seen there before others can share it.
    """
    wanted: list[int] = []
    places = []
    row = 0
    for piece in pieces:
        rows = range(row, row + piece.num_tokens)
        row += piece.num_tokens
        needed = rows if piece.sequence.request.prompt_logprobs else rows[-1:]
        places.append(slice(len(wanted), len(wanted) + len(needed)))
        wanted += needed
    return wanted, places


def _choose(pieces: Several[Piece], last_PV: Tensor, finite: Several[bool]) -> list[tuple[int | None, Logprob | None]]:
    """Of each piece: (token, its log-probability), where one can be chosen."""
    ends = [n for n, piece in enumerate(pieces) if finite[n] and piece.is_last]
    chosen: list[tuple[int | None, Logprob | None]] = [(None, None)] * len(pieces)
    if not ends:
        return chosen
    logits_NV = _rows(last_PV, ends)
    requests = [pieces[n].sequence.request for n in ends]
    rows = [
        Row(request.sampling, pieces[n].sequence.tokens, len(request.prompt))
        for n, request in zip(ends, requests, strict=True)
    ]
    tokens = choose(logits_NV, rows)
    asked = [at for at, request in enumerate(requests) if request.num_logprobs is not None]
    numbers = [requests[at].num_logprobs or 0 for at in asked]
    logprobs = logprobs_of(_rows(logits_NV, asked), [tokens[at] for at in asked], numbers) if asked else []
    by_place = dict(zip(asked, logprobs, strict=True))
    for at, n in enumerate(ends):
        chosen[n] = tokens[at], by_place.get(at)
    return chosen


def _prompt_logprobs(piece: Piece, logits_NV: Tensor) -> tuple[Logprob, ...]:
    """Of the prompt's tokens that follow the piece's; those of the answer have theirs already."""
    request = piece.sequence.request
    following = request.prompt[piece.start + 1 : piece.end + 1]
    top = [request.num_logprobs or 0] * len(following)
    return tuple(logprobs_of(logits_NV[: len(following)], following, top)) if following else ()


def _rows(values_NV: Tensor, rows: Several[int]) -> Tensor:
    """Some of the rows, in ascending order; no copy where that is all of them."""
    return values_NV if len(rows) == len(values_NV) else values_NV[list(rows)]
