"""A run folder of ours becomes a checkpoint that transformers, vLLM and SGLang read: sharded safetensors.

One shard is in memory at a time. What the family has no place for is refused, but for the state of training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from equipoise.convert.families import family_for
from equipoise.convert.fields import ConversionError
from equipoise.convert.parts import Part
from equipoise.convert.read import Progress, new_folder, newest_checkpoint, state_shapes
from equipoise.disk.checkpoint import CheckpointError, group_file, verify
from equipoise.disk.rows import shapes
from equipoise.models.dtypes import DTYPES
from equipoise.models.run_files import read_config
from equipoise.models.tokenizer import TokenizerError
from equipoise.models.tokenizers import load_tokenizer, publish_tokenizer

SHARD = 5_000_000_000  # bytes
_STATE = (".balancer.", ".coefs.")  # of training, in the names of tensors


@dataclass(frozen=True)
class Exported:
    """What an export did. left: tensors of ours that no forward pass needs. tokenizer: whether there was one."""

    out: Path
    family: str
    num_tensors: int
    num_shards: int
    num_bytes: int
    left: tuple[str, ...]
    tokenizer: bool


def export_checkpoint(
    source: Path,
    out: Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write the newest whole checkpoint of a run folder as `config.json`, shards, index and tokenizer.

    family: of `equipoise.convert.FAMILIES`; None takes the first that the model fits. dtype: "fp32", "bf16" or "fp16";
    None keeps each tensor's. Raises ConversionError, with nothing written, for a model that no family has all of, and
    for a selection bias that would be lost.
    """
    config = read_config(source)
    chosen = family_for(config, family)
    checkpoint = newest_checkpoint(source)
    try:
        verify(checkpoint)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    path = group_file(checkpoint, "model")
    parts = chosen.parts(config, "per_expert")
    ours = shapes(path)
    _check(path, ours, {name: shape for name, (_, shape) in state_shapes(config).items()})
    left = _left_over(path, parts, ours)
    wanted = None if dtype is None else DTYPES[dtype]
    with new_folder(out) as temporary:
        shards = list(_shards(path, parts, wanted, shard_bytes))
        num_bytes = _write(temporary, path, shards, wanted, progress)
        fields = chosen.write(config) | {"dtype": _dtype_of(path, wanted)}
        has_tokenizer = _tokenizer(source, temporary, fields)
        (temporary / "config.json").write_text(json.dumps(fields, indent=2))
    return Exported(out, chosen.name, len(parts), len(shards), num_bytes, left, has_tokenizer)


def _check(path: Path, actual: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    wrong = sorted(name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name))
    if wrong:
        raise ConversionError(
            f"{path}: {wrong[0]}: expected shape {expected.get(wrong[0])} by the folder's config.json, got "
            f"{actual.get(wrong[0])} ({len(wrong)} such tensors); restore the configuration of this checkpoint"
        )


def _left_over(path: Path, parts: list[Part], ours: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    left = tuple(sorted(ours.keys() - {part.ours for part in parts}))
    for name in left:
        if not any(mark in name for mark in _STATE):
            raise ConversionError(f"{path}: {name} has no place in that family; nothing was written")
        if name.endswith(".bias_E"):
            with safe_open(path, "pt") as file:
                if bool(file.get_tensor(name).any()):
                    raise ConversionError(
                        f"{path}: {name} is a selection bias that moves tokens to other experts, and the family has no "
                        "place for one; train on until it can be set to zero, or export as deepseek_v3"
                    )
    return left


def _shards(path: Path, parts: list[Part], dtype: torch.dtype | None, most: int) -> Iterator[list[Part]]:
    shard: list[Part] = []
    size = 0
    with safe_open(path, "pt") as file:
        for part in parts:
            tensor = _sliced(file, part)
            added = tensor.numel() * (tensor.element_size() if dtype is None else dtype.itemsize)
            if shard and size + added > most:
                yield shard
                shard, size = [], 0
            shard.append(part)
            size += added
    if shard:
        yield shard


def _write(folder: Path, path: Path, shards: list[list[Part]], dtype: torch.dtype | None, progress: Progress) -> int:
    total, done = path.stat().st_size, 0
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        with safe_open(path, "pt") as file:
            for part in shard:
                tensor = part.change.to_theirs(_sliced(file, part))
                keep = dtype is None or part.ours.endswith("balancer.bias_E")  # its steps are smaller than a bf16's
                tensors[part.theirs] = (tensor if keep else tensor.to(dtype)).contiguous()
                done += tensor.nbytes
                progress(min(done, total), total)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    num_bytes = sum(each.stat().st_size for each in folder.glob("*.safetensors"))
    if len(shards) > 1:
        record = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(index.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(record, indent=2))
    return num_bytes


def _sliced(file: Any, part: Part) -> Tensor:
    """The part's region, and no more of the file."""
    sliced = file.get_slice(part.ours)
    rows = slice(None) if part.rows is None else slice(*part.rows)
    tensor: Tensor = sliced[rows] if part.expert is None else sliced[part.expert : part.expert + 1][0][rows]
    return tensor


def _dtype_of(path: Path, wanted: torch.dtype | None) -> str:
    if wanted is None:
        with safe_open(path, "pt") as file:
            wanted = file.get_slice("embed_tokens.weight")[0:1].dtype
    return str(wanted).removeprefix("torch.")


def _tokenizer(source: Path, folder: Path, fields: dict[str, Any]) -> bool:
    try:
        tokenizer = load_tokenizer(source)
    except TokenizerError:
        return False
    publish_tokenizer(tokenizer, folder)
    fields["eos_token_id"] = tokenizer.eot_id
    return True
