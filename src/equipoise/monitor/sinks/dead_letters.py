"""The file of messages that could not be delivered, one JSON object per line, to be sent again later.

No secret is in it: messages are written as they are before secrets are filled in. It sends nothing itself.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from equipoise.monitor.sinks.line_file import LineFile
from equipoise.monitor.sinks.plain import dump

VERSION = 1


@dataclass(frozen=True)
class Letter:
    """One message. destination: the name of the one it is for. key: what it is about, "" for a message on its own.

    time: of the message, RFC 3339 with microseconds. reason: why it could not be delivered. A letter without a body
    says that the message of that time got through, so that those with its key up to then are out of date: sending them
    would open what is closed.
    """

    destination: str
    key: str
    time: str
    reason: str
    body: Any = None
    version: int = VERSION


@dataclass
class Taken:
    """Letters taken out of the file, in order; those in `back` when done are put back. outdated: how many were."""

    letters: list[Letter]
    outdated: int
    back: list[Letter] = field(default_factory=list)


class DeadLetters:
    """The file at `path`. Several destinations may share it; threads and processes may append at the same time."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()

    def add(self, letter: Letter) -> None:
        """Append one. Raises OSError when the disk does."""
        self._append([dump(asdict(letter))])

    def keys(self, destination: str) -> set[str]:
        """The keys with letters that are not out of date."""
        letters = (_parse(line) for line in _lines(self.path))
        return {letter.key for letter in _current([item for item in letters if item], destination)[0] if letter.key}

    @contextmanager
    def taken(self, destination: str) -> Iterator[Taken]:
        """Take the letters of one destination out; those that stand in `Taken.back` at the end, or an error, go back.

        Lines of others, and lines that are damaged, stay. The file is moved aside meanwhile, so new letters are not in
        the way; where a process was killed in the middle, the next call finds what it had moved aside. One process at
        a time.
        """
        self._move_aside()
        aside = self._aside()
        lines = [line for path in aside for line in _lines(path)]
        parsed = [(line, _parse(line)) for line in lines]
        mine = [letter for _, letter in parsed if letter is not None and letter.destination == destination]
        current, outdated = _current(mine, destination)
        taken = Taken(current, outdated, back=list(current))
        try:
            yield taken
        finally:
            others = [line for line, letter in parsed if letter is None or letter.destination != destination]
            self._append(others + [dump(asdict(letter)) for letter in taken.back])
            for path in aside:
                path.unlink()

    def _append(self, lines: list[str]) -> None:
        if lines:
            with self._lock, LineFile(self.path, sync=True) as file:
                for line in lines:
                    file.append(line)

    def _aside(self) -> list[Path]:
        found = self.path.parent.glob(f"{_escape_glob(self.path.name)}.*.taken")
        return sorted(found, key=lambda path: int(path.suffixes[-2][1:]))

    def _move_aside(self) -> None:
        with self._lock:
            if self.path.exists():
                last = max((int(path.suffixes[-2][1:]) for path in self._aside()), default=0)
                self.path.rename(self.path.with_name(f"{self.path.name}.{last + 1}.taken"))


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]


def _parse(line: str) -> Letter | None:
    try:
        letter = Letter(**json.loads(line))
    except (ValueError, TypeError):  # cut by a crash, or not ours
        return None
    return letter if letter.version == VERSION else None


def _current(letters: list[Letter], destination: str) -> tuple[list[Letter], int]:
    """The letters of a destination that are not out of date, in order, and how many are."""
    current: list[Letter] = []
    outdated = 0
    for letter in letters:
        if letter.destination != destination:
            continue
        if letter.body is not None:
            current.append(letter)
            continue
        kept = [earlier for earlier in current if earlier.key != letter.key or earlier.time > letter.time]
        outdated += len(current) - len(kept)
        current = kept
    return current, outdated


def _escape_glob(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
