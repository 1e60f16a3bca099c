"""A folder of safetensors as others publish it: its configuration, and its tensors one at a time.

Headers are looked at before anything is read by them. Pickles are refused unread. Weights that are packed (MXFP4 of
gpt-oss, block-wise FP8 of DeepSeek-V3) are named and read as what they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from equipoise.convert.fields import ConversionError, Raw
from equipoise.convert.packed import BLOCKS, SCALE_INV, SCALES, from_blocks, from_mxfp4
from equipoise.models.tokenizers import copy_tokenizer

MOST_CONFIG, MOST_HEADER = 2**20, 100 * 2**20  # bytes
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Entry:
    """Where a tensor is. packed: how it is kept, if not as it is."""

    file: Path
    packed: str | None = None
    also: tuple[str, Path] | None = None


class Source(Protocol):
    """A checkpoint that was looked over: its configuration, as a `config.json` says it, and its tensors."""

    @property
    def path(self) -> Path:
        """Where it is."""
        ...

    @property
    def config(self) -> Raw:
        """Its configuration."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Of its tensors, those of one file together."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        ...

    def shape_of(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype that `read` gives."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor. Raises ConversionError for a damaged file."""
        ...

    def save_tokenizer(self, folder: Path) -> bool:
        """Write its tokenizer into a folder. False when it has none."""
        ...


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder that was looked over. entries: by name, sorted by file."""

    path: Path
    config: Raw
    entries: dict[str, Entry]

    @property
    def names(self) -> Sequence[str]:
        """Of its tensors, file by file."""
        return list(self.entries)

    @property
    def num_bytes(self) -> int:
        """Of its files."""
        return sum(file.stat().st_size for file in {entry.file for entry in self.entries.values()})

    def save_tokenizer(self, folder: Path) -> bool:
        """Take its files along."""
        return copy_tokenizer(self.path, folder)

    def shape_of(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype that `read` gives, from the header alone for those that are not packed."""
        entry = self.entries[name]
        if entry.packed is not None:
            tensor = self.read(name)
            return tuple(tensor.shape), tensor.dtype
        with _opened(entry.file) as file:
            sliced = file.get_slice(name)
            return tuple(sliced.get_shape()), _DTYPES.get(sliced.get_dtype(), torch.float64)

    def read(self, name: str) -> Tensor:
        """One tensor. Raises ConversionError for a damaged file."""
        entry = self.entries[name]
        if entry.packed == "mxfp4":
            assert entry.also is not None
            return from_mxfp4(_read(entry.file, name + BLOCKS), _read(entry.also[1], name + SCALES))
        tensor = _read(entry.file, name)
        if entry.packed == "fp8":
            assert entry.also is not None
            return from_blocks(tensor, _read(entry.also[1], entry.also[0]))
        return tensor


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_folder(path: Path) -> Folder:
    """Look over a folder. Raises ConversionError for no configuration, pickles, damaged or contradicting files."""
    config = read_json(path / "config.json")
    if "model" in config and "model_type" not in config:
        raise ConversionError(
            f"{path}: expected a checkpoint of another family, got a run folder, which needs no conversion; to take it "
            "out, convert it with --to hf"
        )
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted(each.name for pattern in _PICKLES for each in path.glob(pattern))
        if pickles:
            raise ConversionError(
                f"{path}: expected *.safetensors, found pickles ({', '.join(pickles[:3])}), which can run code when "
                "they are read; convert them to safetensors where you trust them"
            )
        raise ConversionError(f"{path}: expected *.safetensors, found none; pass a folder with config.json and weights")
    where: dict[str, Path] = {}
    for file in files:
        for name in names_in(file):
            if name in where:
                raise ConversionError(f"{file}: tensor {name} is in {where[name].name} too; remove one of the files")
            where[name] = file
    _check_index(path, where)
    return Folder(path, config, _entries(where))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of sensible size. Raises ConversionError."""
    if not path.is_file():
        raise ConversionError(f"{path}: expected a file, found none; pass the folder of a checkpoint")
    if path.stat().st_size > MOST_CONFIG:
        raise ConversionError(f"{path}: expected at most {MOST_CONFIG} bytes, got {path.stat().st_size}")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: expected JSON, got something else ({error}); restore it") from error
    if not isinstance(found, dict):
        raise ConversionError(f"{path}: expected a JSON object, got {type(found).__name__}; restore it")
    return found


def names_in(file: Path) -> list[str]:
    """The tensors of a file, after its header was found possible. Raises ConversionError."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
    if size < 8 or length > min(size - 8, MOST_HEADER):
        raise ConversionError(
            f"{file}: its header says {length} bytes, the file has {size}; it is truncated or no safetensors file: "
            "download it again"
        )
    with _opened(file) as opened:
        return list(opened.keys())


def _check_index(path: Path, where: dict[str, Path]) -> None:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        listed = dict(json.loads(index.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{index}: expected a weight_map, got something else ({error!r}); restore it") from error
    wrong = [name for name, file in listed.items() if name not in where or where[name].name != file]
    wrong += [name for name in where if name not in listed]
    if wrong:
        raise ConversionError(
            f"{index}: {len(wrong)} tensors are not where it says, such as {wrong[0]}; a shard is missing or from "
            "another checkpoint"
        )


def _entries(where: dict[str, Path]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for name, file in sorted(where.items(), key=lambda item: (item[1].name, item[0])):
        if name.endswith(BLOCKS) and name.removesuffix(BLOCKS) + SCALES in where:
            base = name.removesuffix(BLOCKS)
            found[base] = Entry(file, "mxfp4", (base + SCALES, where[base + SCALES]))
        elif name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in where:
            continue
        elif name + SCALE_INV in where:
            found[name] = Entry(file, "fp8", (name + SCALE_INV, where[name + SCALE_INV]))
        elif not (name.endswith(SCALE_INV) and name.removesuffix(SCALE_INV) in where):
            found[name] = Entry(file)
    return found


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{file}: can't be read ({error}); it is truncated or damaged: download it again"
        ) from error


def _read(file: Path, name: str) -> Tensor:
    with _opened(file) as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor
