"""Files of recorded routing, read without pickle: which ending holds what, and where in it the ids or counts are.

vLLM and SGLang answers (JSON), SGLang's expert distribution (.pt), arrays (.npy, .npz), tables (.parquet). It checks
types and shapes; whether the numbers make sense is the business of recorded.py.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np

NPY_MAGIC = b"\x93NUMPY"
ID_KEYS = ("routed_experts", "prompt_routed_experts")  # where vLLM and SGLang put ids into an answer
COLUMNS = ("token", "layer", "expert")


@dataclass(frozen=True)
class Layout:
    """What a file may leave open: the numbers of layers and of experts per token. None: not known."""

    num_layers: int | None = None
    top_k: int | None = None


@dataclass(frozen=True, eq=False)
class Counts:
    """counts_LE: int64 assignments. num_tokens_L: int64; None when the file does not say."""

    counts_LE: np.ndarray
    num_tokens_L: np.ndarray | None = None


Ids = Iterator[tuple[int, np.ndarray, np.ndarray]]  # layer number, ids int64 (T, K), bool (T, K): which are there


def read(path: Path, layout: Layout) -> Counts | Ids:
    """Counts, or expert ids layer by layer (a layer may come in several pieces).

    .npy: ids, int (T, L, K), or (T, K) for one layer: vLLM's `routed_experts`.
    .npz: ids as `indices`, with a bool (T,) `mask` that is False for padding; or `counts`, int (L, E) or (E,), with
        `num_tokens`, int (L,) or one number.
    .json, .jsonl: answers of a server, one or a list or one per line, with ids under `routed_experts` and
        `prompt_routed_experts` at any depth: a nested list or base64 of a .npy file (vLLM), or base64 of int32 without
        a shape (SGLang: `extract_routed_experts_from_meta_info`), which needs num_layers and top_k. SGLang's layers are
        all hidden layers, dense ones too.
    .pt: SGLang's expert distribution in mode stat, `logical_count` int (steps, L, E) (`sglang:srt/eplb/
        expert_distribution.py`); or one tensor of ids. Read with weights_only.
    .parquet: integer columns token, layer, expert, a row per assignment; a token's number is its own in the file.
    Raises ValueError for another ending, a file that cannot be read, and arrays of other types or shapes.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: expected a file that ends in {', '.join(_READERS)}, got {path.suffix or 'no ending'!r}"
        )
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; check the path")
    return reader(path, layout)


# ------------------------------------------------------------------------------------------------------- readers


def _read_npy(path: Path, layout: Layout) -> Ids:
    return _ids(str(path), _load_file(path, archive=False)["array"], None, layout)


def _read_npz(path: Path, layout: Layout) -> Counts | Ids:
    arrays = _load_file(path, archive=True)
    has = [name for name in ("indices", "counts") if name in arrays]
    if len(has) != 1:
        raise ValueError(f"{path}: expected an array named indices or counts, got {', '.join(arrays) or 'none'}")
    if "indices" in arrays:
        return _ids(str(path), arrays["indices"], arrays.get("mask"), layout)
    return _counts(str(path), arrays["counts"], arrays.get("num_tokens"))


def _read_json(path: Path, layout: Layout) -> Ids:
    try:
        text = path.read_text(encoding="utf-8")
        documents = [text] if path.suffix.lower() == ".json" else text.split("\n")
        answers = [json.loads(document) for document in documents if document.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: this is no JSON: {error}; check the file") from error
    payloads = list(_payloads(answers))
    if not payloads:
        raise ValueError(
            f"{path}: expected {' or '.join(ID_KEYS)} in the answers, found neither; "
            "ask the server to return routed experts"
        )
    return (
        layer
        for key, payload in payloads
        for layer in _ids(f"{path}: {key}", decode_routed_experts(payload, layout), None, layout)
    )


def decode_routed_experts(payload: str | list[Any], layout: Layout) -> np.ndarray:
    """The ids of one answer, (T, L, K): of a nested list, base64 of a .npy file, or base64 of little-endian int32.

    Raises ValueError for something else, and for int32 without a known layout.
    """
    if isinstance(payload, list):
        try:
            return np.asarray(payload)
        except ValueError as error:
            raise ValueError(
                "routed_experts: expected as many ids for every token and layer, got a ragged list"
            ) from error
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(
            f"routed_experts: expected a list or base64, got {type(payload).__name__} ({error})"
        ) from error
    if data.startswith(NPY_MAGIC):
        return _load_numpy(io.BytesIO(data), "routed_experts", archive=False)["array"]
    if layout.num_layers is None or layout.top_k is None:
        raise ValueError("routed_experts: these ids come without a shape; pass num_layers and top_k")
    size = 4 * layout.num_layers * layout.top_k
    if len(data) % size:
        raise ValueError(
            f"routed_experts: expected a multiple of {size} bytes, int32 for {layout.num_layers} layers and top_k "
            f"{layout.top_k}, got {len(data)}; check num_layers (SGLang counts dense layers too) and top_k"
        )
    return np.frombuffer(data, dtype="<i4").reshape(-1, layout.num_layers, layout.top_k)


def _payloads(value: Any) -> Iterator[tuple[str, Any]]:
    """Every routed-experts entry at any depth, with its key; null or nothing is what servers send for none."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in ID_KEYS:
                if inner not in (None, [], ""):
                    yield key, inner
            else:
                yield from _payloads(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _payloads(inner)


def _read_pt(path: Path, layout: Layout) -> Counts | Ids:
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a refused file it is an error class of the pickle module
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: cannot be read as plain tensors: {first}; save tensors, numbers and text only"
        ) from error
    if isinstance(found, torch.Tensor):
        return _ids(str(path), _plain(found), None, layout)
    keys = list(found) if isinstance(found, Mapping) else [type(found).__name__]
    counts = found.get("logical_count") if isinstance(found, Mapping) else None
    if not isinstance(counts, torch.Tensor):
        raise ValueError(
            f"{path}: expected a tensor of ids, or logical_count of SGLang's recorder, got "
            f"{', '.join(map(str, keys))}; record with --expert-distribution-recorder-mode stat"
        )
    if counts.ndim == 3:
        counts = counts.sum(0)  # steps; int32 adds up to int64
    return _counts(f"{path}: logical_count", _plain(counts), None)


def _read_parquet(path: Path, layout: Layout) -> Ids:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(".parquet needs pyarrow; install it with: pip install pyarrow") from error
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a table: {error}; check the file") from error
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: expected columns {', '.join(COLUMNS)}, got {', '.join(table.column_names)}")
    for name in COLUMNS:
        if table[name].null_count:
            raise ValueError(f"{path}: expected numbers in column {name}, got {table[name].null_count} nulls")
    token_N, layer_N, expert_N = (_integers(f"{path}: column {name}", table[name].to_numpy()) for name in COLUMNS)
    return _by_layer(token_N, layer_N, expert_N)


def _by_layer(token_N: np.ndarray, layer_N: np.ndarray, expert_N: np.ndarray) -> Ids:
    """Assignments as a row per token, each layer as wide as its token with most experts."""
    for number in np.unique(layer_N):
        of_layer = layer_N == number
        _, row_N, length_T = np.unique(token_N[of_layer], return_inverse=True, return_counts=True)
        order_N = np.argsort(row_N, kind="stable")
        column_N = np.arange(len(row_N)) - np.repeat(np.cumsum(length_T) - length_T, length_T)
        ids_TK = np.zeros((len(length_T), length_T.max()), dtype=np.int64)
        ids_TK[row_N[order_N], column_N] = expert_N[of_layer][order_N]
        yield int(number), ids_TK, np.arange(ids_TK.shape[1]) < length_T[:, None]


_READERS: Mapping[str, Callable[[Path, Layout], Counts | Ids]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".pt": _read_pt,
    ".parquet": _read_parquet,
}


# ---------------------------------------------------------------------------------------------- types and shapes


def _ids(name: str, ids: np.ndarray, mask: np.ndarray | None, layout: Layout) -> Ids:
    ids = _integers(name, ids, convert=False)
    if ids.ndim == 2:
        ids = ids[:, None, :]
    if ids.ndim != 3 or not ids.shape[2]:
        raise ValueError(f"{name}: expected ids of shape (tokens, layers, k) or (tokens, k), got {ids.shape}")
    for axis, expected, what in ((1, layout.num_layers, "num_layers"), (2, layout.top_k, "top_k")):
        if expected not in (None, ids.shape[axis]):
            raise ValueError(f"{name}: expected {what} = {expected}, got ids of shape {ids.shape}")
    real_T = np.ones(len(ids), dtype=bool) if mask is None else np.asarray(mask)
    if real_T.shape != ids.shape[:1] or not np.isin(real_T, (0, 1)).all():
        raise ValueError(f"{name}: expected a mask of {len(ids)} zeros and ones, got shape {real_T.shape}")
    present_TK = np.repeat(real_T.astype(bool)[:, None], ids.shape[2], axis=1)
    # one layer at a time: a file may be as large as memory
    return ((number, ids[:, number].astype(np.int64), present_TK) for number in range(ids.shape[1]))


def _counts(name: str, counts: np.ndarray, num_tokens: np.ndarray | None) -> Counts:
    counts_LE = np.atleast_2d(_integers(name, counts))
    if counts_LE.ndim != 2 or not counts_LE.size or counts_LE.min() < 0:
        raise ValueError(f"{name}: expected counts of shape (layers, experts), none negative, got {counts.shape}")
    if num_tokens is None:
        return Counts(counts_LE)
    tokens = _integers(f"{name}: num_tokens", np.asarray(num_tokens))
    if tokens.shape not in ((), (len(counts_LE),)):
        raise ValueError(f"{name}: expected num_tokens for each of {len(counts_LE)} layers, got shape {tokens.shape}")
    return Counts(counts_LE, np.broadcast_to(tokens, len(counts_LE)))


def _integers(name: str, array: np.ndarray, *, convert: bool = True) -> np.ndarray:
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers, got {array.dtype}")
    return array.astype(np.int64) if convert else array


def _plain(tensor: Any) -> np.ndarray:
    """A tensor as NumPy has it; bfloat16, which it has not, as float64."""
    return np.asarray(tensor.double() if tensor.is_floating_point() else tensor)


def _load_file(path: Path, *, archive: bool) -> dict[str, np.ndarray]:
    with path.open("rb") as file:  # np.load by name leaves a broken file open
        return _load_numpy(file, str(path), archive=archive)


def _load_numpy(file: IO[bytes], name: str, *, archive: bool) -> dict[str, np.ndarray]:
    """The arrays of an .npz archive by name, or the array of an .npy file under "array"."""
    try:
        found = np.load(file, allow_pickle=False)
        arrays = {"array": found} if isinstance(found, np.ndarray) else dict(found)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{name}: cannot be read as NumPy arrays: {error}; save plain arrays, no objects") from error
    if archive == isinstance(found, np.ndarray):
        kinds = ("one array (.npy)", "an archive of arrays (.npz)")
        raise ValueError(f"{name}: expected {kinds[archive]}, got {kinds[not archive]}; rename the file")
    return arrays
