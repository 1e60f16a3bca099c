"""A file of lines that is only ever appended to, and stays readable when the process is killed while it writes.

One system call per line. A line that a crash has cut in two costs itself and no other: the next one starts afresh.
It doesn't rotate or shorten the file.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self


class LineFile:
    """Appends lines to the file at `path`; both it and its folder are created when needed.

    sync: wait until each line is on the disk. Without it a killed process loses nothing, but a power cut may lose the
    last lines.
    """

    def __init__(self, path: str | Path, *, sync: bool = False) -> None:
        self.path = Path(path)
        self._sync = sync
        self._file: int | None = None

    def append(self, line: str) -> None:
        """Append one line, given without its line break. Raises OSError when the disk does."""
        file = self._open()
        data = line.encode("utf-8") + b"\n"
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # the last one was cut: close it
            data = b"\n" + data
        while data:
            data = data[os.write(file, data) :]
        if self._sync:
            os.fsync(file)

    def close(self) -> None:
        """Close the file. May be called twice; the next append opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self._file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
