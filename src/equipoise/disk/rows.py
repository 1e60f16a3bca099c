"""One safetensors file that many processes write: each puts rows of tensors where they belong, and reads its own.

A row is a slice of a tensor's first axis. The file is an ordinary one: whoever wants it whole reads it whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # the format's names


def lay_out(
    path: Path, described: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> None:
    """Make the file at its full size, with nothing in its tensors yet. Raises ValueError for a type it can't hold."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in described.items():
        if dtype not in DTYPES:
            raise ValueError(f"tensor {name}: expected one of {', '.join(DTYPES.values())}, got {dtype}; cast it first")
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_rows(path: Path, parts: Mapping[str, tuple[Tensor, Sequence[int] | None]]) -> None:
    """Put tensors into a file that was laid out. parts: by name, (tensor, which rows its rows are; None for all).

    Writers of different rows may do so at the same time. Raises OSError where the system refuses.
    """
    header, start = _header(path)
    handle = os.open(path, os.O_WRONLY)
    try:
        for name, (tensor, rows) in parts.items():
            first = start + int(header[name]["data_offsets"][0])
            plain = tensor.detach().cpu().contiguous()
            if rows is None:
                _write(handle, plain, first)
                continue
            row_bytes = torch.Size(header[name]["shape"][1:]).numel() * plain.element_size()
            for source, target, count in _runs(rows):
                _write(handle, plain[source : source + count], first + target * row_bytes)
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path) -> Iterator[Callable[[str, Tensor, int], None]]:
    """put(name, tensor, first): its numbers, contiguous, from element `first` of that tensor of the file on.

    Raises ValueError for a tensor of another dtype or with more numbers than there is room for.
    """
    header, start = _header(path)
    handle = os.open(path, os.O_WRONLY)

    def put(name: str, tensor: Tensor, first: int) -> None:
        begin, end = header[name]["data_offsets"]
        offset = int(begin) + first * tensor.element_size()
        if str(header[name]["dtype"]) != DTYPES.get(tensor.dtype) or offset + tensor.nbytes > int(end):
            raise ValueError(f"tensor {name}: {tensor.dtype} {tuple(tensor.shape)} from {first} on does not fit there")
        _write(handle, tensor.detach().cpu().contiguous(), start + offset)

    try:
        yield put
    finally:
        os.close(handle)


def read_rows(path: Path, name: str, rows: Sequence[int] | None) -> Tensor:
    """The rows of one tensor, in this order; None for all of it. No more of the file comes to memory.

    Raises KeyError for a tensor that is not in the file.
    """
    with safe_open(path, "pt") as file:
        if name not in file.keys():  # noqa: SIM118 - it is no mapping
            raise KeyError(name)
        if rows is None:
            whole: Tensor = file.get_tensor(name)
            return whole
        sliced = file.get_slice(name)
        parts = [sliced[target : target + count] for _, target, count in _runs(rows)]
        return torch.cat(parts) if parts else sliced[0:0]


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a file, by name."""
    header, _ = _header(path)
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _header(path: Path) -> tuple[dict[str, dict[str, list[int]]], int]:
    """(the entries, where the data begins)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(place among `rows`, first row, how many) of each stretch of consecutive rows."""
    begin = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield begin, rows[begin], i - begin
            begin = i


def _write(handle: int, tensor: Tensor, offset: int) -> None:
    data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
    while len(data):
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
