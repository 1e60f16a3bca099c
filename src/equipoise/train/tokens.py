"""A corpus as tokens on disk: split by document, encoded once, memory-mapped, checked by sha256 when opened.

A cache that is missing, partial or damaged is made anew. Batches are cut from it in `data.py`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from equipoise.disk.atomic import atomic_write
from equipoise.models.tokenizers import AnyTokenizer
from equipoise.train.corpus import Corpus, Document
from equipoise.train.sources import DataError

_FORMAT = "equipoise tokens 1"
_SPLITS: tuple[Literal["train"], Literal["val"]] = ("train", "val")


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Documents one after the other, each ended by the tokenizer's `eot_id`, in shuffled order.

    tokens_N: uint16 or uint32, memory-mapped. Documents are M: ends_M int64, where each document ends in tokens_N, its
    eot included; domains_M int64, its domain. domains: names. num_bytes_D: int64, bytes of UTF-8 per domain, eot not
    counted. fingerprint: hex sha256 of all this.
    """

    tokens_N: np.ndarray
    ends_M: np.ndarray
    domains_M: np.ndarray
    domains: tuple[str, ...]
    num_bytes_D: np.ndarray
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """Tokens in all, eot included."""
        return len(self.tokens_N)

    @cached_property
    def num_tokens_D(self) -> np.ndarray:
        """int64, tokens per domain, eot included."""
        lengths_M = np.diff(self.ends_M, prepend=0)
        return np.bincount(self.domains_M, weights=lengths_M, minlength=len(self.domains)).astype(np.int64)

    @property
    def bytes_per_token_D(self) -> np.ndarray:
        """float64, bytes of text per token by domain, 0 where a domain has none.

        Bits per byte of a domain are its mean cross-entropy in nats, divided by ln 2 and by this.
        """
        ratio_D: np.ndarray = self.num_bytes_D / np.maximum(self.num_tokens_D, 1)
        return ratio_D

    def domains_of(self, positions: np.ndarray) -> np.ndarray:
        """int64 of the same shape: the domain of the token at each position in [0, num_tokens)."""
        return self.domains_M[np.searchsorted(self.ends_M, positions, side="right")]


@dataclass(frozen=True, eq=False)
class TokenData:
    """Both splits, the tokenizer that made them, and the folder they are kept in."""

    train: TokenStream
    val: TokenStream
    tokenizer: AnyTokenizer
    folder: Path


def prepare(
    corpus: Corpus, tokenizer: AnyTokenizer, cache_dir: Path, *, val_fraction: float = 0.05, seed: int = 0
) -> TokenData:
    """Encode a corpus once and keep the result in `cache_dir`; open it when it is there already.

    Whole documents go to train or validation. In each domain validation gets about `val_fraction` of the bytes, and
    at least one document if there are two; a domain with one document is in train only. Split and order depend on
    `seed` and the corpus alone. Raises DataError for a corpus that cannot be split, for a bad argument, and when the
    files cannot be written.
    """
    if not 0.0 < val_fraction < 1.0:
        raise DataError(f"val_fraction is {val_fraction}; expected a share between 0 and 1, e.g. 0.05.")
    if seed < 0:
        raise DataError(f"seed is {seed}; expected 0 or more.")
    key = {
        "format": _FORMAT,
        "corpus": corpus.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "val_fraction": val_fraction,
        "seed": seed,
    }
    folder = cache_dir / f"tokens-{_digest(key)[:16]}"
    data = _open(folder, key, tokenizer)
    if data is None:
        _write(folder, key, corpus, tokenizer, split_documents(corpus, val_fraction, seed))
        data = _open(folder, key, tokenizer)
    if data is None:
        raise DataError(f"the tokens just written to {folder} do not read back as written. Check that disk.")
    return data


def split_documents(corpus: Corpus, val_fraction: float, seed: int) -> dict[str, list[Document]]:
    """Documents of "train" and "val", each shuffled across domains. Raises DataError when val would be empty."""
    train: list[Document] = []
    val: list[Document] = []
    for domain in range(len(corpus.domains)):
        documents = [document for document in corpus.documents if document.domain == domain]
        sizes = np.array([len(document.text.encode()) for document in documents], dtype=np.int64)
        order = np.random.default_rng([seed, domain]).permutation(len(documents))
        chosen = _val_indices(sizes, order, val_fraction)
        for index, document in enumerate(documents):
            (val if index in chosen else train).append(document)
    if not val:
        raise DataError(
            f"corpus '{corpus.name}' has {len(corpus.documents)} document(s) in {len(corpus.domains)} domain(s); "
            "validation needs a domain with at least two. Separate the documents of a .txt file by <|endoftext|>."
        )
    shuffle = np.random.default_rng([seed, len(corpus.domains)])
    return {
        name: [split[i] for i in shuffle.permutation(len(split))] for name, split in (("train", train), ("val", val))
    }


def _val_indices(sizes: np.ndarray, order: np.ndarray, val_fraction: float) -> set[int]:
    """Documents, in the given order, that fit into val_fraction of the bytes; the smallest one if none does."""
    if len(sizes) < 2:
        return set()
    room = val_fraction * sizes.sum()
    chosen: set[int] = set()
    for index in order[:-1]:  # the last one stays in train, whatever the fraction
        if sizes[index] <= room:
            chosen.add(int(index))
            room -= sizes[index]
    return chosen or {int(sizes.argmin())}


def _write(
    folder: Path, key: dict[str, Any], corpus: Corpus, tokenizer: AnyTokenizer, splits: dict[str, list[Document]]
) -> None:
    meta: dict[str, Any] = {"key": key, "domains": corpus.domains, "splits": {}}
    with _progress(corpus.num_bytes) as advance:
        for name in _SPLITS:
            meta["splits"][name] = _write_split(folder, name, splits[name], tokenizer, len(corpus.domains), advance)
    with atomic_write(folder / "meta.json") as file:  # last: without it the folder counts as empty
        file.write(json.dumps(meta | {"sha256": _digest(meta)}, indent=1).encode())


def _write_split(
    folder: Path,
    name: str,
    documents: Sequence[Document],
    tokenizer: AnyTokenizer,
    num_domains: int,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    eot = np.array([tokenizer.eot_id], dtype=tokenizer.dtype).tobytes()
    num_bytes_D = [0] * num_domains
    lengths = []
    digest = hashlib.sha256()
    with atomic_write(folder / f"{name}.tokens") as file:
        for document in documents:
            ids = tokenizer.encode(document.text)
            data = ids.tobytes() + eot
            file.write(data)
            digest.update(data)
            lengths.append(len(ids) + 1)
            size = len(document.text.encode())
            num_bytes_D[document.domain] += size
            advance(size)
    table = io.BytesIO()
    rows = np.stack([np.cumsum(lengths), [document.domain for document in documents]]).astype(np.int64)
    np.save(table, rows, allow_pickle=False)
    with atomic_write(folder / f"{name}.documents.npy") as file:
        file.write(table.getvalue())
    sha256 = {"tokens": digest.hexdigest(), "documents.npy": hashlib.sha256(table.getvalue()).hexdigest()}
    return {"sha256": sha256, "num_bytes_D": num_bytes_D}


def _open(folder: Path, key: dict[str, Any], tokenizer: AnyTokenizer) -> TokenData | None:
    """The cache, or None when any part of it is missing or is not what was written."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        if meta.pop("sha256") != _digest(meta) or meta["key"] != key:
            return None
        train, val = (_open_split(folder, name, meta, tokenizer) for name in _SPLITS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # what damaged JSON can lead to
        return None
    return TokenData(train, val, tokenizer, folder)


def _open_split(folder: Path, name: str, meta: dict[str, Any], tokenizer: AnyTokenizer) -> TokenStream:
    split = meta["splits"][name]
    for part, expected in split["sha256"].items():
        with (folder / f"{name}.{part}").open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise DataError(f"{folder / name}.{part} is not what was written.")
    tokens_N = np.memmap(folder / f"{name}.tokens", dtype=tokenizer.dtype, mode="r")
    ends_M, domains_M = np.load(folder / f"{name}.documents.npy", allow_pickle=False)
    fingerprint = _digest([meta["domains"], split])
    num_bytes_D = np.array(split["num_bytes_D"], dtype=np.int64)
    return TokenStream(tokens_N, ends_M, domains_M, tuple(meta["domains"]), num_bytes_D, fingerprint)


def _digest(record: Any) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


@contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("encoding"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("encoding", total=total_bytes)
        yield lambda size: progress.advance(task, size)
