"""The experts of a model in one safetensors file, to be read one at a time: a checkpoint's own, or one made for it.

A file that is made has a tensor (E, ...) for each layer and part, and says of what, and for which kernels, it was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from equipoise.disk.atomic import atomic_path
from equipoise.disk.row_file import RowFile, RowFileError
from equipoise.disk.rows import lay_out, write_rows
from equipoise.ops.packed import WeightFormat
from equipoise.small.cache import Key
from equipoise.small.experts import Packed, PackedOf, Sizes


@dataclass(frozen=True)
class Place:
    """Where the parts of a layer's experts are: the names of tensors, in the order of `Sizes.described`."""

    sizes: Sizes
    names: Sequence[str]


class ExpertFile:
    """Open until `close`. places: of the layers, in the model's order. Raises RowFileError for another model's file."""

    def __init__(self, path: Path, format: WeightFormat, places: Sequence[Place]) -> None:
        self.path, self.format, self.places = path, format, tuple(places)
        self._file = RowFile(path)
        self._spare: list[Packed] = []  # appending and popping are atomic
        try:
            for place in places:
                self._check(place)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Twice is once."""
        self._file.close()

    def keys(self) -> list[Key]:
        """(layer, expert) of all there are."""
        return [(layer, expert) for layer, place in enumerate(self.places) for expert in range(place.sizes.num_experts)]

    def size_of(self, key: Key) -> int:
        """Bytes of one expert."""
        return self.places[key[0]].sizes.expert_bytes(self.format)

    def read(self, key: Key) -> Packed:
        """One expert, in memory of its own. Raises RowFileError where the file is not any more what it was."""
        (layer, expert), into = key, self._take_spare(key[0])
        parts = tuple(
            self._file.row(name, expert, out) for name, out in zip(self.places[layer].names, into, strict=True)
        )
        return parts[: len(parts) // 2], parts[len(parts) // 2 :]

    def recycle(self, expert: Packed) -> None:
        """What nobody uses any more: the next expert is read into it.

        Given back to the allocator, blocks of this size end up in pieces, and a process has twice as much as it uses.
        """
        self._spare.append(expert)

    def _take_spare(self, layer: int) -> Sequence[Tensor | None]:
        """The parts of an expert of the same sizes, if there is one; of others, memory is freed."""
        wanted = [(shape, dtype) for dtype, shape in self.places[layer].sizes.described(self.format).values()]
        while self._spare:
            up, down = self._spare.pop()
            if [(tuple(part.shape), part.dtype) for part in (*up, *down)] == wanted:
                return (*up, *down)
        return [None] * len(wanted)

    def _check(self, place: Place) -> None:
        for name, (dtype, shape) in zip(place.names, place.sizes.described(self.format).values(), strict=True):
            expected, entry = (dtype, (place.sizes.num_experts, *shape)), self._file.entries.get(name)
            actual = None if entry is None else (entry.dtype, entry.shape)
            if actual != expected:
                raise RowFileError(
                    f"{self.path}: expected {name} to be {expected}, got {actual or 'none'}: it is of another model; "
                    "pass this model's file, or remove it to have it made anew"
                )


def made_places(layers: Mapping[str, Sizes], format: WeightFormat) -> list[Place]:
    """The names in a file of `make`."""
    return [
        Place(sizes, [f"{name}.experts.{part}" for part in sizes.described(format)]) for name, sizes in layers.items()
    ]


def make(
    path: Path, format: WeightFormat, layers: Mapping[str, tuple[Sizes, PackedOf]], marks: Mapping[str, str]
) -> None:
    """Write the file, one expert after the other; it appears when it is whole. marks: kept with it, for `is_made_of`.

    Raises DiskError where the system refuses, ValueError for weights that the format can't take.
    """
    places = made_places({name: sizes for name, (sizes, _) in layers.items()}, format)
    described = {
        name: (dtype, (place.sizes.num_experts, *shape))
        for place in places
        for name, (dtype, shape) in zip(place.names, place.sizes.described(format).values(), strict=True)
    }
    with atomic_path(path) as temporary:
        lay_out(temporary, described, marks)
        for place, (_, packed_of) in zip(places, layers.values(), strict=True):
            for expert in range(place.sizes.num_experts):
                up, down = packed_of(expert)
                rows = {name: (part[None], [expert]) for name, part in zip(place.names, (*up, *down), strict=True)}
                write_rows(temporary, rows)


def marks_of(format: WeightFormat, origin: str) -> dict[str, str]:
    """What a file is made of, and for. origin: tells weights apart, as a hash does."""
    kernels = torch.backends.cpu.get_cpu_capability()  # they choose the order of int4 values
    return {"experts": format.name, "dtype": str(format.dtype), "origin": origin, "kernels": kernels}


def is_made_of(path: Path, marks: Mapping[str, str]) -> bool:
    """Whether the file is there, whole, and was made with these marks."""
    try:
        file = RowFile(path)
    except (OSError, RowFileError):
        return False
    file.close()
    return file.metadata == marks
