"""Write a file whole or not at all: a temporary name in the same folder, fsync, rename.

It turns a full disk into an error that says so. It does not lock: of two writers the later one wins.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from equipoise.disk.files import fsync


class DiskError(ValueError):
    """The system refused to write. The message says what to do about it."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path` when the block ends well, and leaves nothing behind when not.

    The folder is created when missing. Raises DiskError in place of an OSError of the operating system (disk full,
    quota, no permission).
    """
    with atomic_path(path) as temporary, temporary.open("xb") as file:
        yield file


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """The same for whoever opens the file itself, once or more often: a name to write it under."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise DiskError(
            f"could not write {path}: {error.strerror or error}. Nothing was left behind. "
            "Free some space or pass a folder on another disk."
        ) from error
    finally:
        with suppress(OSError):  # the folder itself may be out of reach; the error above says so
            temporary.unlink(missing_ok=True)
