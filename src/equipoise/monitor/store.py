"""The run store: one SQLite file per run with scalars, routing statistics, alerts and actions.

One process writes (training), any number read (a terminal, a dashboard) at the same time: WAL mode. It keeps what it
is given and draws no conclusions. No pickle: JSON for records, little-endian int64 for counts.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from equipoise.monitor.store_records import (
    dump,
    dump_pairs,
    dump_stats,
    load_action,
    load_alert,
    load_pairs,
    load_stats,
    to_real,
)
from equipoise.types import Action, Alert, CoSelection, RoutingStats

T = TypeVar("T")
_LAST = 2**63 - 1  # SQLite's largest integer
FILE_NAME = "run.sqlite"
SCHEMA_VERSION = 1
APPLICATION_ID = 0x45515049  # "EQPI" in the file's header: tells our files from other people's SQLite files

_SCHEMA = """
CREATE TABLE scalars (name TEXT NOT NULL, step INTEGER NOT NULL, value REAL, time REAL NOT NULL,
    PRIMARY KEY (name, step)) WITHOUT ROWID;
CREATE TABLE routing (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, layer TEXT NOT NULL, stats TEXT NOT NULL,
    counts BLOB NOT NULL, UNIQUE (layer, step));
CREATE INDEX routing_by_step ON routing (step);
CREATE TABLE alerts (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, key TEXT NOT NULL, state TEXT NOT NULL,
    since_step INTEGER NOT NULL, finding TEXT NOT NULL);
CREATE TABLE actions (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, kind TEXT NOT NULL, layer TEXT NOT NULL,
    reason TEXT NOT NULL, detail TEXT NOT NULL);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""
_CO_SELECTION = """
CREATE TABLE IF NOT EXISTS co_selection (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, layer TEXT NOT NULL,
    num_tokens INTEGER NOT NULL, num_experts INTEGER NOT NULL, counts BLOB NOT NULL, UNIQUE (step, layer));
"""  # came later: a run from before is readable, and gets it when it goes on
MAX_CO_SELECTIONS = 16  # flushes that are kept: of more, every other one goes


class StoreError(ValueError):
    """The run store cannot be opened, read or written; the message says why and what to do."""


class RunStore:
    """The history of one run, on disk. Implements the protocols `Sink` and `CoSelectionSink` of types.py.

    path: the run folder (the file is run.sqlite in it), or a path that ends in ".sqlite". Both are created.
    Each method that writes is one transaction; `transaction()` makes several into one. A killed process loses at most
    the transaction in hand. Use one RunStore per thread. Raises StoreError (a ValueError).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = store_path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.path.parent}: cannot make the run folder: {error}; choose another path") from error
        self._db = _open(self.path, readonly=False)

    @classmethod
    def open_readonly(cls, path: str | Path, *, wait_s: float = 10.0) -> Self:
        """Open an existing store for reading only, also while another process writes it.

        wait_s: seconds to wait for a lock, which only a process that wants the file for itself holds.
        """
        store = cls.__new__(cls)
        store.path = store_path(path)
        if not store.path.is_file():
            raise StoreError(
                f"{store.path.parent}: expected a run folder with {store.path.name} in it, found none; "
                "check the path, or wait until the run has written its first step"
            )
        store._db = _open(store.path, readonly=True, wait_s=wait_s)
        return store

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------- writing

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside are kept together or not at all; nested ones join the outer one."""
        with _explained(self.path):
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        if self._db.in_transaction:  # SQLite has already done it after some errors, such as a full disk
            self._db.execute("ROLLBACK")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keep named numbers of one step; the same name and step again replaces the value."""
        now = time.time()
        rows = [(name, step, to_real(value), now) for name, value in values.items()]
        with self.transaction():
            self._db.executemany("INSERT OR REPLACE INTO scalars VALUES (?, ?, ?, ?)", rows)

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Keep one flush, a record per layer; the same layer and step again replaces the record."""
        rows = [(s.step, s.layer, dump_stats(s), np.asarray(s.counts_E, dtype="<i8").tobytes()) for s in window]
        with self.transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO routing (step, layer, stats, counts) VALUES (?, ?, ?, ?)", rows
            )

    def co_selection(self, window: Sequence[CoSelection]) -> None:
        """Keep which experts one flush chose together. Of at most 16 flushes, spread over the run, the newest included.

        Half of each symmetric matrix, in the smallest whole numbers that hold it: 61 layers of 256 experts take 2 to
        8 MB per flush.
        """
        rows = [(c.step, c.layer, c.num_tokens, len(c.counts_EE), dump_pairs(c.counts_EE)) for c in window]
        with self.transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO co_selection (step, layer, num_tokens, num_experts, counts) "
                "VALUES (?, ?, ?, ?, ?)",
                rows,
            )
            steps = [step for (step,) in self.rows("SELECT DISTINCT step FROM co_selection ORDER BY step")]
            if len(steps) > MAX_CO_SELECTIONS:
                gone = [(step,) for step in steps[1:-1:2]]
                self._db.executemany("DELETE FROM co_selection WHERE step = ?", gone)

    def alert(self, alert: Alert) -> None:
        """Keep one change of an alert."""
        row = (alert.step, alert.key, alert.state, alert.since_step, dump(asdict(alert.finding)))
        with self.transaction():
            self._db.execute("INSERT INTO alerts (step, key, state, since_step, finding) VALUES (?, ?, ?, ?, ?)", row)

    def action(self, action: Action) -> None:
        """Keep one change of a repair."""
        detail = dict(action.detail) | {"state": action.state, "note": action.note}
        row = (action.step, action.kind, action.layer, action.reason, dump(detail))
        with self.transaction():
            self._db.execute("INSERT INTO actions (step, kind, layer, reason, detail) VALUES (?, ?, ?, ?, ?)", row)

    def set_meta(self, **values: Any) -> None:
        """Keep facts about the run, JSON-able. The views use name, total_steps and status ("running" while it runs)."""
        with self.transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)", [(key, dump(value)) for key, value in values.items()]
            )

    def truncate_after(self, step: int) -> None:
        """Forget everything after `step`: a run resumed from its checkpoint repeats those steps."""
        with self.transaction():
            for table in ("scalars", "routing", "co_selection", "alerts", "actions"):
                self._db.execute(f"DELETE FROM {table} WHERE step > ?", (step,))

    def forget_before(self, step: int) -> None:
        """Forget numbers and routing before `step`; alerts and repairs stay. For what runs for ever."""
        with self.transaction():
            for table in ("scalars", "routing"):
                self._db.execute(f"DELETE FROM {table} WHERE step < ?", (step,))

    # -------------------------------------------------------------------------------------------------- reading

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read inside is of one moment, whatever is written meanwhile."""
        with _explained(self.path):
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._roll_back()

    def latest_routing(self, at: int | None = None) -> list[RoutingStats]:
        """The newest flush, or the newest at or before step `at`, a record per layer in the order of the model.

        Empty where there is none.
        """
        query = """SELECT stats, counts FROM routing WHERE step = (SELECT max(step) FROM routing WHERE step <= ?)
            ORDER BY id"""
        return self.records(load_stats, query, (_LAST if at is None else at,))

    def routing_history(self, layer: str, steps: Sequence[int] | None = None) -> list[RoutingStats]:
        """All records of one layer by step, or those of some steps, fewer where it has none.

        Raises StoreError for a layer without any, naming those that have some.
        """
        query, values = "SELECT stats, counts FROM routing WHERE layer = ?", [layer, *(steps or ())]
        if steps is not None:
            query += f" AND step IN ({','.join('?' * len(steps))})"
        found = self.records(load_stats, f"{query} ORDER BY step", values)
        if not found and layer not in self.layers():
            known = ", ".join(self.layers()) or "none"
            raise StoreError(f"layer: expected one of the recorded layers ({known}), got {layer!r}")
        return found

    def routing_after(self, step: int, page: int = 64) -> Iterator[list[RoutingStats]]:
        """The flushes after `step`, oldest first, each a record per layer. Reads `page` flushes at a time."""
        while steps := self.flush_steps(after=step, at_most=page):
            query = "SELECT stats, counts FROM routing WHERE step > ? AND step <= ? ORDER BY step, id"
            records = self.records(load_stats, query, (step, steps[-1]))
            yield from (list(flush) for _, flush in groupby(records, key=lambda stats: stats.step))
            step = steps[-1]

    def latest_co_selection(self, layer: str, at: int | None = None) -> CoSelection | None:
        """Which experts a layer chose together, newest, or newest at or before step `at`; None where none is kept."""
        if not self.rows("SELECT 1 FROM sqlite_master WHERE name = 'co_selection'"):
            return None
        query = """SELECT layer, step, num_tokens, num_experts, counts FROM co_selection
            WHERE layer = ? AND step <= ? ORDER BY step DESC LIMIT 1"""
        return next(iter(self.records(load_pairs, query, (layer, _LAST if at is None else at))), None)

    def flush_steps(self, after: int = -1, at_most: int = -1) -> list[int]:
        """The steps of the flushes after a step, oldest first; at_most: so many, -1 for all."""
        query = "SELECT DISTINCT step FROM routing WHERE step > ? ORDER BY step LIMIT ?"
        return self.records(int, query, (after, at_most))

    def flushed_at(self, step: int) -> float:
        """When the flush of `step` was written, in seconds since 1970: routing has no clock of its own.

        The time of that step's loss, else of the file's last change (of its log, if that is newer).
        """
        for when in self.records(float, "SELECT time FROM scalars WHERE name = 'loss' AND step = ?", (step,)):
            return when
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)

    def layers(self) -> list[str]:
        """The names of all recorded layers, in the order of the model."""
        return self.records(str, "SELECT layer FROM routing GROUP BY layer ORDER BY min(id)")

    def scalar_history(self, name: str, *, last: int | None = None) -> list[tuple[int, float, float]]:
        """(step, value, time) of one scalar by step, the `last` ones or all; time is in seconds since 1970."""
        query = "SELECT step, value, time FROM scalars WHERE name = ? ORDER BY step DESC LIMIT ?"
        rows = self.rows(query, (name, -1 if last is None else last))
        return [(step, math.nan if value is None else value, when) for step, value, when in reversed(rows)]

    def alerts(self, last: int | None = None) -> list[Alert]:
        """The `last` changes of alerts, or all, oldest first."""
        query = "SELECT key, state, since_step, step, finding FROM alerts ORDER BY id DESC LIMIT ?"
        return self.records(load_alert, query, (-1 if last is None else last,))[::-1]

    def actions(self, last: int | None = None) -> list[Action]:
        """The `last` changes of repairs, or all, oldest first."""
        query = "SELECT kind, layer, step, reason, detail FROM actions ORDER BY id DESC LIMIT ?"
        return self.records(load_action, query, (-1 if last is None else last,))[::-1]

    def meta(self) -> dict[str, Any]:
        """The facts about the run that `set_meta` kept."""
        return dict(self.records(lambda key, value: (key, json.loads(value)), "SELECT key, value FROM meta"))

    def records(self, load: Callable[..., T], query: str, values: Sequence[Any] = ()) -> list[T]:
        """What a query of the reader's own finds, each row through `load(*columns)`; the tables are above.

        Raises StoreError for a query that fails, and for a row that cannot be read.
        """
        found = self.rows(query, values)
        try:
            return [load(*row) for row in found]
        except (KeyError, TypeError, AttributeError, ValueError) as error:  # of JSON that is not what we write
            raise StoreError(
                f"{self.path}: a record cannot be read ({type(error).__name__}); the file is damaged, or newer than "
                "this program"
            ) from error

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The same, without a `load`."""
        with _explained(self.path):
            return self._db.execute(query, values).fetchall()


def store_path(path: str | Path) -> Path:
    """The SQLite file of a run folder; a path that ends in ".sqlite" is that file itself."""
    path = Path(path)
    return path if path.suffix == ".sqlite" else path / FILE_NAME


# ------------------------------------------------------------------------------------------------------- opening


def _open(path: Path, *, readonly: bool, wait_s: float = 10.0) -> sqlite3.Connection:
    with _explained(path):
        uri = f"{path.absolute().as_uri()}?mode={'ro' if readonly else 'rwc'}"
        # isolation_level None: transactions are begun and ended by us alone
        db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=wait_s)
        try:
            if not readonly:
                _prepare(db, path)
            _check_version(db, path)
        except BaseException:
            db.close()
            raise
        return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Make a new file ours; leave an existing one as it is."""
    with closing(db.execute("SELECT count(*) FROM sqlite_master")) as cursor:
        new = cursor.fetchone()[0] == 0
    if new:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(
            f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id = {APPLICATION_ID};"
            f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
    else:
        _check_version(db, path)
    db.executescript(_CO_SELECTION)
    db.execute("PRAGMA synchronous = NORMAL")  # safe against a killed process; a power cut may cost the last commits


def _check_version(db: sqlite3.Connection, path: Path) -> None:
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        raise StoreError(
            f"{path}: expected a run store of equipoise, got an SQLite file of something else; check the path"
        )
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{path}: expected schema version {SCHEMA_VERSION}, got {version}; "
            "it was written by another version of equipoise: open it with that one"
        )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ones that say which file, what is wrong and what to do."""
    try:
        yield
    except sqlite3.Error as error:
        text = str(error).rstrip(".")
        remedy = next((remedy for part, remedy in _REMEDIES.items() if part in text), "check the file and its folder")
        raise StoreError(f"{path}: {text}; {remedy}") from error


_REMEDIES = {
    "disk is full": "free some space and go on from the last checkpoint",
    "readonly": "open it with RunStore.open_readonly, or make file and folder writable",
    "unable to open": "check that the folder exists and that you may write in it",
    "not a database": "this is no run store, or it is damaged; move it away and go on from the last checkpoint",
    "malformed": "the file is damaged; move it away and go on from the last checkpoint",
    "locked": "another process holds it; try again when it is done, or choose another run folder",
    "closed database": "open the run again",
    "disk I/O": "check the disk and go on from the last checkpoint",
}
