"""Which runs there are: run folders, or folders of them, found again and again while the dashboard is up.

A run's name in addresses is made of its folder's name and place, so that a link stays good after a restart.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from equipoise.monitor.store import FILE_NAME, store_path

MAX_RUNS = 200  # shown
MAX_FOLDERS = 5000  # looked into
DEPTH = 3  # runs/sweep/cells/one is three below runs


@dataclass(frozen=True)
class RunRef:
    """One run. id: for addresses. path: the folder or .sqlite file. label: its folder's name."""

    id: str
    path: Path
    label: str


def find_runs(paths: Sequence[Path]) -> list[RunRef]:
    """The runs in these paths, each once, at most 200, in the order given and then by name."""
    found: dict[str, RunRef] = {}
    for path in paths:
        for each in _runs_in(path):
            ref = run_ref(each)
            found.setdefault(ref.id, ref)
            if len(found) >= MAX_RUNS:
                return list(found.values())
    return list(found.values())


def run_ref(path: Path) -> RunRef:
    """The reference of one run folder or .sqlite file."""
    place = path.absolute()
    folder = place.stem if place.suffix == ".sqlite" and place.name != FILE_NAME else store_path(place).parent.name
    slug = re.sub(r"[^A-Za-z0-9]+", "-", folder).strip("-")[:40].lower() or "run"
    digest = hashlib.sha256(os.fsencode(store_path(place))).hexdigest()[:6]
    return RunRef(f"{slug}-{digest}", path, folder.encode(errors="replace").decode())


def check_paths(paths: Sequence[Path]) -> None:
    """Raise ValueError when there is nothing to look at."""
    if not paths:
        raise ValueError("runs: expected at least one run folder, or a folder of run folders, got none")
    for path in paths:
        if not path.exists():
            raise ValueError(
                f"runs: {path} does not exist; name a run folder, or a folder in which runs are or will be"
            )


def _runs_in(path: Path) -> Iterator[Path]:
    if path.suffix == ".sqlite" or (path / FILE_NAME).is_file():
        yield path
        return
    level, looked = [path], 0
    for _ in range(DEPTH):
        below: list[Path] = []
        for folder in level:
            for child in _folders(folder):
                looked += 1
                if looked > MAX_FOLDERS:
                    return
                if (child / FILE_NAME).is_file():
                    yield child
                else:
                    below.append(child)
        level = below


def _folders(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:  # not ours to read, or gone since
        return []
