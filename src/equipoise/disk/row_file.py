"""A safetensors file that stays open, of which single rows are read into memory of their own, from any thread.

It is read, not mapped: of a mapped file that someone cuts short, the next look kills the process, and its pages would
count as this process's memory. What was read before is kept by the system as long as it has room, either way.
A row is a slice of a tensor's first axis.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from equipoise.disk.rows import DTYPES

_TYPES = {name: dtype for dtype, name in DTYPES.items()}
_MOST_HEADER = 100 * 2**20  # bytes, as the format's own library has it


class RowFileError(ValueError):
    """A file is not what it should be, or not what it was. The message names it and the remedy."""


@dataclass(frozen=True)
class Entry:
    """A tensor in the file. start: its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """One row."""
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize


class RowFile:
    """Open until `close`. entries: by name. metadata: what its writer noted.

    A file that is renamed, removed or replaced by another of its name goes on being read: it is there until it is
    closed. One that is cut short or written to is refused with the next read.
    Raises RowFileError for what is no whole safetensors file, OSError where it can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._stamp = self._now()
            self.entries, self.metadata = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Twice is once."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def row(self, name: str, index: int, out: Tensor | None = None) -> Tensor:
        """One row, in `out`, or in memory of its own. out: contiguous, of its shape and type.

        Raises RowFileError as above, and IndexError for a row that is not there.
        """
        entry = self.entries[name]
        if not 0 <= index < entry.shape[0]:
            raise IndexError(f"{self.path}: {name} has rows 0 to {entry.shape[0] - 1}, asked for {index}")
        return self._read(entry.dtype, entry.shape[1:], entry.start + index * entry.row_bytes, out)

    def whole(self, name: str) -> Tensor:
        """All of a tensor, in memory of its own."""
        entry = self.entries[name]
        return self._read(entry.dtype, entry.shape, entry.start)

    def _read(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int, out: Tensor | None = None) -> Tensor:
        with torch.inference_mode(False):  # it outlives the forward that asked for it
            tensor = torch.empty(shape, dtype=dtype) if out is None else out
        if (tensor.shape, tensor.dtype, tensor.is_contiguous()) != (torch.Size(shape), dtype, True):
            raise ValueError(f"out: expected contiguous {dtype} of {shape}, got {tensor.dtype} of {[*tensor.shape]}")
        self._now()  # it is open
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        while len(view):
            count = os.preadv(self._handle, [view], offset)
            if count == 0:
                break
            view, offset = view[count:], offset + count
        now = self._now()
        if len(view) or now != self._stamp:
            what = (
                f"it had {self._stamp[0]:,} bytes and has {now[0]:,}"
                if now[0] != self._stamp[0]
                else "it was written to"
            )
            raise RowFileError(
                f"{self.path}: changed while it was in use: {what}. Nothing more is read from it; restore the file, "
                "and start again"
            )
        return tensor

    def _now(self) -> tuple[int, int]:
        """(size, when it was last written to, ns)."""
        if self._handle < 0:
            raise RowFileError(f"{self.path}: is closed; what it belonged to has ended")
        status = os.fstat(self._handle)
        return status.st_size, status.st_mtime_ns

    def _read_header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        size = self._stamp[0]
        length = int.from_bytes(os.pread(self._handle, 8, 0), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise RowFileError(
                f"{self.path}: expected a safetensors file, got something else, or its beginning; restore it"
            )
        try:
            header = json.loads(os.pread(self._handle, length, 8))
            metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
            entries = {
                str(name): Entry(_TYPES[each["dtype"]], tuple(each["shape"]), 8 + length + int(each["data_offsets"][0]))
                for name, each in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RowFileError(f"{self.path}: its header is damaged ({error!r}); restore it") from error
        needed = max((entry.start + entry.num_bytes for entry in entries.values()), default=8 + length)
        if size != needed:
            raise RowFileError(f"{self.path}: expected {needed:,} bytes, got {size:,}: it is not whole; restore it")
        return entries, metadata
