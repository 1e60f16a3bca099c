"""One look at the run files for all browsers: which runs there are, which have changed, and their newest heads.

A change is seen by size and time of run.sqlite and its WAL, without opening them. Reads happen in threads, one per run
and version for all pages together. It keeps heads only: what a page shows beyond is read for it and forgotten.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from equipoise.dashboard import reader
from equipoise.dashboard.records import Head
from equipoise.dashboard.runs import RunRef, find_runs
from equipoise.monitor.store import RunStore, StoreError, store_path

T = TypeVar("T")
LOOK_SECONDS = 0.4  # between looks at the files
SEARCH_SECONDS = 3.0  # between searches for new runs
REST = 4.0  # a read that took t seconds is followed by at least REST * t without one
RETRY_SECONDS = 3.0  # a run that could not be read is tried again, changed or not
MAX_READS = 4  # at the same time

Mark = tuple[int, int, int]
Fingerprint = tuple[Mark, ...]


class Hub:
    """The runs of one dashboard. Everything but `read` is for the event loop's thread.

    version(id) grows whenever the run's files change; pages compare it with the one they show.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.runs: dict[str, RunRef] = {}
        self.generation = 0  # grows when the set of runs changes
        self._versions: dict[str, int] = {}
        self._fingerprints: dict[str, Fingerprint] = {}
        self._heads: dict[str, tuple[int, Head | StoreError, float]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._reads = asyncio.Semaphore(MAX_READS)
        self._searched = 0.0

    def version(self, run_id: str) -> int:
        """How often the run has changed since the dashboard was started; 0 for an unknown one."""
        return self._versions.get(run_id, 0)

    async def watch(self) -> None:
        """Look at the files for ever."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Look at the files once: find runs when it is time, and raise the version of those that have changed."""
        now = time.monotonic()
        if not self.runs or now - self._searched > SEARCH_SECONDS:
            self._searched = now
            self._replace(await asyncio.to_thread(find_runs, self.paths))
        seen = await asyncio.to_thread(lambda: {ref.id: fingerprint(ref.path) for ref in list(self.runs.values())})
        for run_id, found in seen.items():
            if self._fingerprints.get(run_id) != found or self._to_retry(run_id, now):
                self._fingerprints[run_id] = found
                self._versions[run_id] = self.version(run_id) + 1

    async def head(self, run_id: str) -> Head | StoreError:
        """The run at a glance, or why it cannot be read. Raises KeyError for an unknown run."""
        ref = self.runs[run_id]
        async with self._locks.setdefault(run_id, asyncio.Lock()):
            version = self.version(run_id)
            kept = self._heads.get(run_id)
            if kept is None or kept[0] != version:
                result = await self.read(ref, lambda run: reader.head(run, ref.path))
                kept = self._heads[run_id] = (version, result, time.monotonic())
            return kept[1]

    async def read(self, ref: RunRef, query: Callable[[RunStore], T]) -> T | StoreError:
        """What `query` reads from the run, in a thread; an error is returned, because pages show it."""

        def work() -> T | StoreError:
            try:
                with reader.reading(ref.path) as run:
                    return query(run)
            except StoreError as error:
                return error
            except OSError as error:  # a folder that is not ours to read, or gone meanwhile
                return StoreError(f"{ref.path}: {error}")

        async with self._reads:
            return await asyncio.to_thread(work)

    def _replace(self, found: Sequence[RunRef]) -> None:
        new = {ref.id: ref for ref in found}
        if new.keys() == self.runs.keys():
            return
        self.runs = new
        self.generation += 1
        for gone in self._heads.keys() - new.keys():
            del self._heads[gone]

    def _to_retry(self, run_id: str, now: float) -> bool:
        kept = self._heads.get(run_id)
        if kept is None or not isinstance(kept[1], StoreError) or now - kept[2] < RETRY_SECONDS:
            return False
        return kept[0] == self.version(run_id)


def fingerprint(path: Path) -> Fingerprint:
    """Size, time and inode of the file and of its WAL; it differs after every commit."""
    file = store_path(path)
    return tuple(mark(each) for each in (file, file.with_name(file.name + "-wal")))


def mark(file: Path) -> Mark:
    """Size, time and inode of a file; it differs after every change, and where the file is not there."""
    try:
        found = file.stat()
    except OSError:
        return (-1, 0, 0)
    return (found.st_size, found.st_mtime_ns, found.st_ino)
