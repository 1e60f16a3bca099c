"""A byte-pair tokenizer: text to ids and back, and its file. `tiktoken` applies the merges.

It doesn't learn them, and has no special tokens but the one that ends a document.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import tiktoken

from equipoise.disk.atomic import atomic_write

EOT = "<|endoftext|>"
FILE_NAME = "byte_pairs.json"
_FORMAT = "equipoise byte pairs 1"
# How GPT-2 cuts text before merging: contractions, words, numbers, signs, white space (Radford et al. 2019, released
# encoder). Byte-level `tokenizers` cut the same way, so one pattern serves both.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class TokenizerError(ValueError):
    """A tokenizer's file is missing or damaged, or an id is out of range. The message says what to do."""


@final
class Tokenizer:
    """Bytes to ids and back. Ids of byte pairs come first, in the order of their merges; the last id is `eot_id`.

    name: for people. ranks: the id of each byte string; ids 0 to len(ranks) - 1, a lower id is merged first.
    """

    def __init__(self, name: str, ranks: Mapping[bytes, int]) -> None:
        if sorted(ranks.values()) != list(range(len(ranks))) or not {bytes([b]) for b in range(256)} <= ranks.keys():
            raise TokenizerError(
                f"tokenizer '{name}': the ids must be 0..{len(ranks) - 1}, each once, and cover all bytes."
            )
        self.name = name
        self._ranks = dict(ranks)
        self._encoding = tiktoken.Encoding(
            name, pat_str=_PATTERN, mergeable_ranks=self._ranks, special_tokens={EOT: len(ranks)}
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, `eot_id` included. Not padded."""
        return len(self._ranks) + 1

    @property
    def eot_id(self) -> int:
        """The id that ends each document. No text encodes to it."""
        return len(self._ranks)

    @property
    def bos_id(self) -> int:
        """The id that begins a document: the same."""
        return self.eot_id

    @property
    def opening(self) -> tuple[int, ...]:
        """What a model of this tokenizer expects before a text: nothing."""
        return ()

    @property
    def controls(self) -> dict[str, int]:
        """Ids of tokens that no text encodes to, by what they are called."""
        return {EOT: self.eot_id}

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16 where all ids fit, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def tokens(self) -> list[bytes]:
        """The byte strings in the order of their ids; the end of a document is not among them."""
        return sorted(self._ranks, key=self._ranks.__getitem__)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over the ids of all byte strings, and the pattern. The name is not in it."""
        return hashlib.sha256(json.dumps([_FORMAT, _PATTERN, self._tokens()]).encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,) of `dtype`. `<|endoftext|>` in the text is encoded as the letters it is made of."""
        return np.array(self._encoding.encode_ordinary(text), dtype=self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Bytes that are no UTF-8 become U+FFFD. Raises TokenizerError for an id out of range."""
        numbers = [int(i) for i in ids]
        self._check(numbers)
        return self._encoding.decode(numbers)

    def bytes_of(self, id: int) -> bytes:
        """What one id stands for; often not whole letters. The end of a document is no text.

        Raises TokenizerError for an id out of range.
        """
        if id == self.eot_id:
            return b""
        self._check([id])
        return self._encoding.decode_single_token_bytes(id)

    def save(self, folder: Path) -> Path:
        """Write `byte_pairs.json` into `folder`, atomically. Returns its path."""
        record = {"format": _FORMAT, "name": self.name, "fingerprint": self.fingerprint, "tokens": self._tokens()}
        path = folder / FILE_NAME
        with atomic_write(path) as file:
            file.write(json.dumps(record).encode())
        return path

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read what `save` has written. Raises TokenizerError when it is missing, damaged or of another format."""
        path = folder / FILE_NAME
        if not path.is_file():
            raise TokenizerError(f"no tokenizer at {path}. Pass the folder that Tokenizer.save was given.")
        try:
            record = json.loads(path.read_bytes())
            tokens = [base64.b64decode(token, validate=True) for token in record["tokens"]]
            loaded = cls(record["name"], {token: rank for rank, token in enumerate(tokens)})
            intact = record["format"] == _FORMAT and record["fingerprint"] == loaded.fingerprint
        except (ValueError, KeyError, TypeError) as error:
            raise TokenizerError(f"{path} is damaged ({error!r}). Restore it from the run that wrote it.") from error
        if not intact:
            raise TokenizerError(f"{path} does not match its own fingerprint or format '{_FORMAT}'. Restore it.")
        return loaded

    def _check(self, ids: Iterable[int]) -> None:
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise TokenizerError(f"token id {wrong[0]} is not in [0, {self.vocab_size}) of tokenizer '{self.name}'.")

    def _tokens(self) -> list[str]:
        return [base64.b64encode(token).decode() for token in self.tokens]
