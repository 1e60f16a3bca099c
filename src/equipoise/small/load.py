"""A run's model for a small machine: experts quantised or in a file, without ever having all of them in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from equipoise.disk.checkpoint import CheckpointError, group_file, verify
from equipoise.disk.files import sha256_of
from equipoise.disk.row_file import RowFile
from equipoise.models.decoder import Decoder
from equipoise.models.run_files import MODEL, Loaded, cast, fill, load, loaded, locate
from equipoise.ops.packed import Full, WeightFormat
from equipoise.small.cache import Policy, check_memory
from equipoise.small.expert_file import ExpertFile, Place, is_made_of, made_places, make, marks_of
from equipoise.small.experts import PackedOf, Resident, Sizes, StoredExperts, packing, sizes_of
from equipoise.small.offload import Offload, stored
from equipoise.small.quantise import format_of, layers_of, put_in

EXPERTS = "experts"  # in a run folder: the files that are made
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class SmallConfig:
    """What of a model is made small.

    precision: of the experts, "full", "int8", "int4", "int4-32", "int4-64" or "int4-128"; int4 is int4-64. memory:
    bytes of experts that are in memory at most, None for all of them; the others stay in a file. policy: who makes
    room, see `ExpertCache`. prefetch: read ahead what the next layer will probably want. folder: of files that have to
    be made; None is `experts` in the run folder.
    """

    precision: str = "full"
    memory: int | None = None
    policy: Policy = "lru"
    prefetch: bool = True
    folder: Path | None = None

    def __post_init__(self) -> None:
        format_of(self.precision, torch.float32)

    @property
    def is_plain(self) -> bool:
        """Whether all experts are in memory as the checkpoint has them."""
        return self.precision == "full" and self.memory is None


@dataclass(frozen=True, eq=False)
class Small:
    """A loaded model. offload: where its experts are, if they are in a file; it is closed by whoever loaded."""

    loaded: Loaded
    offload: Offload | None


def bytes_of(text: str) -> int:
    """ "64M" is 64 * 2**20; K, M and G, or none of them. Raises ValueError for anything else."""
    number, unit = (text[:-1], text[-1].upper()) if text and text[-1].isalpha() else (text, "")
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"memory: expected a number of bytes such as 64M or 1.5G, got {text!r}") from error


def load_small(
    path: str | Path, config: SmallConfig, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Small:
    """As `models.run_files.load`, with the experts as the configuration says.

    The checkpoint is verified, byte for byte. Quantised experts are made from it at each load; a file of quantised or
    cast experts is made once, and used again as long as checkpoint, format and processor are the same. Experts as the
    checkpoint has them are read from the checkpoint itself.
    device: experts that are not in full precision, or are on the disk, compute on the CPU, with the whole model.
    Raises ValueError, with what to do, for what can't be loaded, quantised, written, or fit into the memory.

    For example: load_small("runs/demo", SmallConfig("int4-64", memory=bytes_of("2M")))
    """
    if config.is_plain:
        return Small(load(path, dtype=dtype, device=device), None)
    if torch.device(device).type != "cpu":
        raise ValueError(
            f"device: experts in few bits, or on the disk, compute on the CPU, got {device}; leave out --device, or "
            "take --expert-precision full and no --expert-memory"
        )
    folder, model_config, checkpoint = locate(path)
    verify(checkpoint)
    with torch.device("meta"):
        model = Decoder(model_config)
    layers = layers_of(model)
    sizes = {name: sizes_of(layer) for name, layer in layers.items()}
    for layer in layers.values():
        layer.register_module("experts", nn.Identity())  # no memory for what comes from elsewhere
    others = all_but_experts(checkpoint, sizes)
    kept = others["embed_tokens.weight"].dtype
    format = format_of(config.precision, dtype or kept)
    least = max(each.expert_bytes(format) for each in sizes.values())
    if config.memory is not None:
        check_memory(config.memory, least)
    fill(model.to_empty(device="cpu"), others, checkpoint)
    cast(model, dtype or kept)
    plain = ExpertFile(group_file(checkpoint, MODEL), Full(kept), _plain_places(sizes))
    try:
        new, offload = _experts(plain, format, sizes, config, dtype or kept)
    except BaseException:
        plain.close()
        raise
    put_in(layers, new)
    return Small(loaded(model.requires_grad_(False), folder, checkpoint), offload)


def _experts(
    plain: ExpertFile, format: WeightFormat, sizes: Mapping[str, Sizes], config: SmallConfig, dtype: torch.dtype
) -> tuple[dict[str, StoredExperts], Offload | None]:
    """The modules, and what they are read from; plain is closed unless that is it."""
    packed = _packed(plain, format, sizes)
    if config.memory is None:
        new = {
            name: StoredExperts(each, format, Resident(each, format, packed[name]), dtype)
            for name, each in sizes.items()
        }
        plain.close()
        return new, None
    file = plain
    if format != plain.format:
        path = _made(plain, format, {name: (each, packed[name]) for name, each in sizes.items()}, config.folder)
        plain.close()
        file = ExpertFile(path, format, made_places(sizes, format))
    offload = Offload(file, config.memory, config.policy, config.prefetch)
    return stored(offload, sizes, dtype), offload


def all_but_experts(checkpoint: Path, layers: Iterable[str]) -> dict[str, Tensor]:
    """All of a model but the experts of these layers, read into memory of their own."""
    path = group_file(checkpoint, MODEL)
    if not path.is_file():
        raise CheckpointError(f"{checkpoint}: expected a group of tensors called {MODEL}, found none")
    file = RowFile(path)
    try:
        ours = tuple(f"{name}.experts." for name in layers)
        return {name: file.whole(name) for name in file.entries if not name.startswith(ours)}
    finally:
        file.close()


def _plain_places(sizes: Mapping[str, Sizes]) -> list[Place]:
    """Where a checkpoint has its experts."""
    return [
        Place(each, (f"{name}.experts.{each.up_name}", f"{name}.experts.down_proj")) for name, each in sizes.items()
    ]


def _packed(plain: ExpertFile, format: WeightFormat, sizes: Mapping[str, Sizes]) -> dict[str, PackedOf]:
    """Each layer's experts in another format, read and packed one by one."""

    def weights_of(layer: int, expert: int) -> tuple[Tensor, Tensor]:
        (up,), (down,) = plain.read((layer, expert))
        return up, down

    return {name: packing(format, partial(weights_of, layer)) for layer, name in enumerate(sizes)}


def _made(
    plain: ExpertFile, format: WeightFormat, layers: Mapping[str, tuple[Sizes, PackedOf]], folder: Path | None
) -> Path:
    """The file of the experts in another format, which is written if it is not there yet."""
    checkpoint, marks = plain.path.parent, marks_of(format, sha256_of(plain.path))
    folder = checkpoint.parent.parent / EXPERTS if folder is None else folder
    path = folder / f"{checkpoint.name}-{format.name}-{str(format.dtype).removeprefix('torch.')}.safetensors"
    if not is_made_of(path, marks):
        make(path, format, layers, marks)
    return path
