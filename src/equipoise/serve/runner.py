"""One forward of the model over what the scheduler chose, and the tokens that come of it. No queues.

It is the same `Decoder.forward` as in training: a row of tokens of many sequences, with a cache that keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equipoise.models.decoder import Decoder
from equipoise.serve.paged_cache import PagedKV, Ragged, Span
from equipoise.serve.request import Logprob
from equipoise.serve.sampling import Row, choose, logprobs_of
from equipoise.serve.scheduler import Piece
from equipoise.serve.trace import ExpertTrace, stack


@dataclass(frozen=True, eq=False)
class Computed:
    """Of one piece. token: the next one; None before the end of the prompt, or where the logits are not finite.

    logprob: of the token, where asked for. prompt_logprobs: of the tokens that follow the piece's ones in the prompt.
    experts: int16 (L, tokens, K).
    """

    piece: Piece
    token: int | None
    finite: bool
    logprob: Logprob | None
    prompt_logprobs: tuple[Logprob, ...]
    experts: np.ndarray


@dataclass(frozen=True, eq=False)
class StepResult:
    """Of one forward. distinct_experts: per MoE layer, how many experts the step's tokens went to."""

    pieces: tuple[Computed, ...]
    distinct_experts: tuple[int, ...]


class Runner:
    """A model, its cache, and what is seen of its experts."""

    def __init__(self, model: Decoder, kv: PagedKV) -> None:
        self.model, self.kv = model, kv
        self._trace = ExpertTrace(model.moe_layers)

    @torch.inference_mode()
    def run(self, pieces: Several[Piece]) -> StepResult:
        """Compute the pieces and choose the next tokens."""
        device = self.kv.keys_LSHD.device
        self._trace.clear()
        tokens = [token for piece in pieces for token in piece.sequence.tokens[piece.start : piece.end]]
        spans = [Span(piece.sequence.blocks, piece.start, piece.num_tokens) for piece in pieces]
        wanted, places = _logits_wanted(pieces)
        logits_NV = self.model(
            torch.tensor([tokens], device=device),
            cache=Ragged(self.kv, spans),
            logits_at=torch.tensor(wanted, dtype=torch.int64, device=device),
        )
        seen = self._trace.take()
        experts_LTK = stack(seen) if seen else np.empty((0, len(tokens), 0), dtype=np.int16)
        chosen = _choose(pieces, logits_NV, places)
        computed = []
        row = 0
        for piece, place in zip(pieces, places, strict=True):
            experts = experts_LTK[:, row : row + piece.num_tokens]
            row += piece.num_tokens
            token, finite, logprob = chosen.get(id(piece.sequence), (None, True, None))
            prompt = _prompt_logprobs(piece, logits_NV[place]) if piece.sequence.request.prompt_logprobs else ()
            computed.append(Computed(piece, token, finite, logprob, prompt, experts))
        return StepResult(tuple(computed), tuple(len(np.unique(each[each >= 0])) for each in seen))

    def detach(self) -> None:
        """Leave the model as it was."""
        self._trace.detach()


def _logits_wanted(pieces: Several[Piece]) -> tuple[list[int], list[slice]]:
    """(tokens of the row whose logits are needed, where among them each piece's are): the last one's, or all."""
    wanted: list[int] = []
    places = []
    row = 0
    for piece in pieces:
        rows = range(row, row + piece.num_tokens)
        row += piece.num_tokens
        needed = rows if piece.sequence.request.prompt_logprobs else rows[-1:] if piece.is_last else rows[:0]
        places.append(slice(len(wanted), len(wanted) + len(needed)))
        wanted += needed
    return wanted, places


def _choose(
    pieces: Several[Piece], logits_NV: Tensor, places: Several[slice]
) -> dict[int, tuple[int | None, bool, Logprob | None]]:
    """By id of the sequence: (token, whether the logits are finite, log-probabilities)."""
    ends = [(piece.sequence, place.stop - 1) for piece, place in zip(pieces, places, strict=True) if piece.is_last]
    if not ends:
        return {}
    last_NV = logits_NV[[at for _, at in ends]]
    finite = last_NV.isfinite().all(-1).tolist()
    sound = [n for n, is_finite in enumerate(finite) if is_finite]
    sequences = [ends[n][0] for n in sound]
    rows = [Row(each.request.sampling, each.request.prompt, each.answer) for each in sequences]
    tokens = dict(zip(sound, choose(last_NV[sound], rows), strict=True)) if sound else {}
    asked = [n for n in sound if ends[n][0].request.num_logprobs is not None]
    numbers = [ends[n][0].request.num_logprobs or 0 for n in asked]
    logprobs = dict(zip(asked, logprobs_of(last_NV[asked], [tokens[n] for n in asked], numbers), strict=True))
    return {
        id(sequence): (tokens.get(n), finite[n], logprobs.get(n) if asked else None)
        for n, (sequence, _) in enumerate(ends)
    }


def _prompt_logprobs(piece: Piece, logits_NV: Tensor) -> tuple[Logprob, ...]:
    """Of the prompt's tokens that follow the piece's; those of the answer have theirs already."""
    request = piece.sequence.request
    following = request.prompt[piece.start + 1 : piece.end + 1]
    top = [request.num_logprobs or 0] * len(following)
    return tuple(logprobs_of(logits_NV[: len(following)], following, top)) if following else ()
