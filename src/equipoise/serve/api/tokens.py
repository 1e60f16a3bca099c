"""How tokens look in a response: their names, their bytes, and where they stand in a text."""

from __future__ import annotations

import codecs
import re

from equipoise.models.tokenizer import EOT
from equipoise.models.tokenizers import AnyTokenizer
from equipoise.serve.api.errors import invalid
from equipoise.serve.api.template import BEGIN, END, Control
from equipoise.serve.request import Logprob

MAX_BLANKS = 100_000  # in a row; at a million tiktoken's regular expression overflows its stack

_LEAST = -9999.0  # what clients read for "as good as impossible"; JSON has no infinity


def encode(tokenizer: AnyTokenizer, field: str, text: str) -> list[int]:
    """Its tokens. Raises ApiError for a text that would bring the tokenizer down."""
    if len(text) > MAX_BLANKS:
        longest = max((len(run) for run in re.findall(r"\s+", text)), default=0)
        if longest > MAX_BLANKS:
            raise invalid(field, f"expected at most {MAX_BLANKS} white-space characters in a row, got {longest}")
    ids: list[int] = tokenizer.encode(text).tolist()
    return ids


def encode_prompt(tokenizer: AnyTokenizer, text: str) -> list[int]:
    """Tokens of a text to go on with, begun as the model expects it. Raises as `encode`."""
    return [*tokenizer.opening, *encode(tokenizer, "prompt", text)]


def id_of(tokenizer: AnyTokenizer, control: Control) -> int:
    """Of a control token; the end of a document where the tokenizer has no beginning of its own."""
    if control == END:
        return tokenizer.eot_id
    if control == BEGIN:
        return tokenizer.bos_id
    return tokenizer.controls[control.text]


def name_of(tokenizer: AnyTokenizer, id: int) -> str:
    """Its text; "bytes:\\xe2\\x80" for one that is no whole text, so that different tokens have different names."""
    if id == tokenizer.eot_id:
        return EOT
    raw = tokenizer.bytes_of(id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def bytes_of(tokenizer: AnyTokenizer, id: int) -> list[int] | None:
    """Its bytes; None for the end of a document, which has none."""
    return None if id == tokenizer.eot_id else list(tokenizer.bytes_of(id))


def finite(logprob: float) -> float:
    """The same number, if JSON has it."""
    return max(logprob, _LEAST)


def alternatives(logprob: Logprob) -> list[tuple[int, float]]:
    """The likeliest tokens, and the chosen one if it is not among them."""
    chosen = [] if any(id == logprob.id for id, _ in logprob.top) else [(logprob.id, logprob.logprob)]
    return [*logprob.top, *chosen]


class Offsets:
    """Counts the characters of a text, token by token."""

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def next(self, id: int) -> int:
        """How many whole characters come before this token."""
        at = self._at
        self._at += len(self._decoder.decode(self._tokenizer.bytes_of(id)))
        return at
