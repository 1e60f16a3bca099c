"""A tokenizer as published with a checkpoint, `tokenizer.json`, behind the same verbs as our own byte pairs.

The `tokenizers` library reads and applies it. Tokens that control a model (`<|im_start|>`) are never made from a text:
whoever wants one puts its id.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from tokenizers import Tokenizer as Published

from equipoise.models.tokenizer import TokenizerError

HUB_FILE = "tokenizer.json"
# What belongs to it; the chat template and the ids that end an answer among them.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_MOST = 64 * 2**20  # bytes of the file


@final
class HubTokenizer:
    """Text to ids and back. eot_id ends a document, bos_id begins one: the checkpoint's tokens for sequences."""

    def __init__(self, path: Path, published: Published, eot_id: int, bos_id: int | None = None) -> None:
        self.name, self.eot_id, self._path, self._published = path.parent.name, eot_id, path, published
        self.bos_id = eot_id if bos_id is None else bos_id
        self._published.encode_special_tokens = True  # as letters
        added = published.get_added_tokens_decoder()
        self._special = {id for id, token in added.items() if token.special}
        self._added = {id: token.content for id, token in added.items()}
        self._byte_level = "ByteLevel" in json.dumps(_part(path, "decoder"))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self._published.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """What a model of this tokenizer expects before a text: <s> for Llama and Mixtral, nothing for others."""
        ids = self._published.encode("a", add_special_tokens=True).ids
        return tuple(itertools.takewhile(self._special.__contains__, ids))

    @property
    def controls(self) -> dict[str, int]:
        """Ids of tokens that no text encodes to, by what they are called."""
        return {self._added[id]: id for id in self._special}

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16 where all ids fit, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of the file."""
        return hashlib.sha256(self._path.read_bytes()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,) of `dtype`, without anything that a model begins or ends a text with."""
        return np.array(self._published.encode(text, add_special_tokens=False).ids, dtype=self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Bytes that are no UTF-8 become U+FFFD. Raises TokenizerError for an id out of range."""
        return b"".join(self.bytes_of(int(id)) for id in ids).decode("utf-8", "replace")

    def bytes_of(self, id: int) -> bytes:
        """What one id stands for; often not whole letters. What controls a model is no text.

        Raises TokenizerError for an id out of range.
        """
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(f"token id {id} is not in [0, {self.vocab_size}) of tokenizer '{self.name}'.")
        if id in self._special:
            return b""
        if id in self._added:
            return self._added[id].encode()
        token = self._published.id_to_token(id)
        if token is None:  # ids may have gaps
            return b""
        if self._byte_level:
            return bytes(_BYTES[letter] for letter in token)
        if (byte := _BYTE.fullmatch(token)) is not None:
            return bytes([int(byte[1], 16)])
        return token.replace("\u2581", " ").encode()

    def save(self, folder: Path) -> Path:
        """Copy its files into `folder`. Returns the path of the main one."""
        for name in (HUB_FILE, *COMPANIONS):
            if (source := self._path.with_name(name)).is_file() and source.parent != folder:
                shutil.copyfile(source, folder / name)
        return folder / HUB_FILE

    @classmethod
    def load(cls, folder: Path) -> HubTokenizer:
        """Read `tokenizer.json` in a folder. Raises TokenizerError when it is missing, damaged, or has no end token."""
        path = folder / HUB_FILE
        if not path.is_file() or path.stat().st_size > _MOST:
            raise TokenizerError(f"{path}: expected a file of at most {_MOST} bytes; copy the checkpoint's own there.")
        try:
            published = Published.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path} is damaged ({error}). Restore it from the checkpoint.") from error
        begin = _named(folder, published, "bos")
        end = _named(folder, published, "eos")
        if end is None:
            end = next((id for each in _ENDS if (id := published.token_to_id(each)) is not None), None)
        if end is None:
            raise TokenizerError(
                f"{folder}: expected an end-of-sequence token in generation_config.json (eos_token_id) or "
                "tokenizer_config.json (eos_token), found none that the tokenizer has; add one"
            )
        return cls(path, published, end, begin)


def _named(folder: Path, published: Published, kind: str) -> int | None:
    """The id for "eos" or "bos": by generation_config.json, or of the token that tokenizer_config.json names."""
    ids = _field(folder / "generation_config.json", f"{kind}_token_id")
    if isinstance(ids, list) and ids:
        ids = ids[0]
    token = _field(folder / "tokenizer_config.json", f"{kind}_token")
    if isinstance(token, dict):
        token = token.get("content")
    found = ids if isinstance(ids, int) else published.token_to_id(token) if isinstance(token, str) else None
    return None if found is None or published.id_to_token(found) is None else found


_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")


def _field(path: Path, name: str) -> Any:
    try:
        record = json.loads(path.read_bytes())
        return record.get(name) if isinstance(record, dict) else None
    except (OSError, ValueError):
        return None


def _part(path: Path, name: str) -> Any:
    return json.loads(path.read_bytes()).get(name)


def byte_of_letter() -> dict[str, int]:
    """The byte of each letter in the names of byte-level tokens (openai/gpt-2:src/encoder.py, bytes_to_unicode).

    Bytes that can be printed stand for themselves, the others for letters from 256 on, in their order.
    """
    plain = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = byte_of_letter()
