"""The run store: one SQLite file per run with scalars, routing statistics, alerts and actions.

One process writes (training), any number read (a terminal, a dashboard) at the same time: WAL mode. It keeps what it
is given and draws no conclusions. No pickle: JSON for records, little-endian int64 for counts.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from equipoise.types import Action, Alert, Finding, RoutingStats

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


class StoreError(ValueError):
    """The run store cannot be opened, read or written; the message says why and what to do."""


class RunStore:
    """The history of one run, on disk. Implements the protocol `Sink` of types.py.

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
    def open_readonly(cls, path: str | Path) -> Self:
        """Open an existing store for reading only, also while another process writes it."""
        store = cls.__new__(cls)
        store.path = store_path(path)
        if not store.path.is_file():
            raise StoreError(
                f"{store.path.parent}: expected a run folder with {store.path.name} in it, found none; "
                "check the path, or wait until the run has written its first step"
            )
        store._db = _open(store.path, readonly=True)
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
        rows = [(name, step, _to_real(value), now) for name, value in values.items()]
        with self.transaction():
            self._db.executemany("INSERT OR REPLACE INTO scalars VALUES (?, ?, ?, ?)", rows)

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Keep one flush, a record per layer; the same layer and step again replaces the record."""
        rows = [(s.step, s.layer, _dump_stats(s), np.asarray(s.counts_E, dtype="<i8").tobytes()) for s in window]
        with self.transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO routing (step, layer, stats, counts) VALUES (?, ?, ?, ?)", rows
            )

    def alert(self, alert: Alert) -> None:
        """Keep one change of an alert."""
        row = (alert.step, alert.key, alert.state, alert.since_step, _dump(asdict(alert.finding)))
        with self.transaction():
            self._db.execute("INSERT INTO alerts (step, key, state, since_step, finding) VALUES (?, ?, ?, ?, ?)", row)

    def action(self, action: Action) -> None:
        """Keep one change of a repair."""
        detail = dict(action.detail) | {"state": action.state, "note": action.note}
        row = (action.step, action.kind, action.layer, action.reason, _dump(detail))
        with self.transaction():
            self._db.execute("INSERT INTO actions (step, kind, layer, reason, detail) VALUES (?, ?, ?, ?, ?)", row)

    def set_meta(self, **values: Any) -> None:
        """Keep facts about the run, JSON-able. The views use name, total_steps and status ("running" while it runs)."""
        with self.transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)", [(key, _dump(value)) for key, value in values.items()]
            )

    def truncate_after(self, step: int) -> None:
        """Forget everything after `step`: a run resumed from its checkpoint repeats those steps."""
        with self.transaction():
            for table in ("scalars", "routing", "alerts", "actions"):
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

    def latest_routing(self) -> list[RoutingStats]:
        """The newest flush, a record per layer in the order of the model; empty before the first."""
        rows = self._rows("SELECT stats, counts FROM routing WHERE step = (SELECT max(step) FROM routing) ORDER BY id")
        return [_load_stats(*row) for row in rows]

    def routing_history(self, layer: str) -> list[RoutingStats]:
        """All records of one layer by step.

        Raises StoreError for a layer without any, naming those that have some.
        """
        rows = self._rows("SELECT stats, counts FROM routing WHERE layer = ? ORDER BY step", (layer,))
        if not rows:
            known = ", ".join(self.layers()) or "none"
            raise StoreError(f"layer: expected one of the recorded layers ({known}), got {layer!r}")
        return [_load_stats(*row) for row in rows]

    def layers(self) -> list[str]:
        """The names of all recorded layers, in the order of the model."""
        return [name for (name,) in self._rows("SELECT layer FROM routing GROUP BY layer ORDER BY min(id)")]

    def scalar_history(self, name: str, *, last: int | None = None) -> list[tuple[int, float, float]]:
        """(step, value, time) of one scalar by step, the `last` ones or all; time is in seconds since 1970."""
        query = "SELECT step, value, time FROM scalars WHERE name = ? ORDER BY step DESC LIMIT ?"
        rows = self._rows(query, (name, -1 if last is None else last))
        return [(step, math.nan if value is None else value, when) for step, value, when in reversed(rows)]

    def alerts(self) -> list[Alert]:
        """Every change of every alert, oldest first."""
        rows = self._rows("SELECT key, state, since_step, step, finding FROM alerts ORDER BY id")
        return [Alert(key, state, since, step, _load_finding(text)) for key, state, since, step, text in rows]

    def actions(self) -> list[Action]:
        """Every change of every repair, oldest first."""
        rows = self._rows("SELECT kind, layer, step, reason, detail FROM actions ORDER BY id")
        return [load_action(row) for row in rows]

    def meta(self) -> dict[str, Any]:
        """The facts about the run that `set_meta` kept."""
        return {key: json.loads(value) for key, value in self._rows("SELECT key, value FROM meta")}

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with _explained(self.path):
            return self._db.execute(query, values).fetchall()


def store_path(path: str | Path) -> Path:
    """The SQLite file of a run folder; a path that ends in ".sqlite" is that file itself."""
    path = Path(path)
    return path if path.suffix == ".sqlite" else path / FILE_NAME


# ------------------------------------------------------------------------------------------------------- opening


def _open(path: Path, *, readonly: bool) -> sqlite3.Connection:
    with _explained(path):
        uri = f"{path.absolute().as_uri()}?mode={'ro' if readonly else 'rwc'}"
        # isolation_level None: transactions are begun and ended by us alone
        db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=10.0)
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
    "locked": "another process is writing to this run; end it, or choose another run folder",
    "closed database": "open the run again",
    "disk I/O": "check the disk and go on from the last checkpoint",
}


# ------------------------------------------------------------------------------------------- records as JSON text


def _dump(value: Any) -> str:
    """JSON text; NaN and infinities, which JSON has not, become the strings that float() reads."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _to_real(value: float) -> float | None:
    """SQLite keeps no NaN; NULL stands for it."""
    return None if math.isnan(value) else float(value)


def _floats(record: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in record.items()}


def _dump_stats(stats: RoutingStats) -> str:
    return _dump({f.name: getattr(stats, f.name) for f in fields(stats) if f.name != "counts_E"})


def _load_stats(text: str, counts: bytes) -> RoutingStats:
    record = json.loads(text)
    # a record written before a field existed keeps that field's default
    record.update(
        {f.name: float(record[f.name]) for f in fields(RoutingStats) if f.type == "float" and f.name in record}
    )
    record["losses"] = _floats(record["losses"])
    record["dead_experts"] = tuple(record["dead_experts"])
    return RoutingStats(**record, counts_E=np.frombuffer(counts, dtype="<i8").astype(np.int64))


def load_action(row: tuple[str, str, int, str, str]) -> Action:
    """A row of the table: kind, layer, step, reason, detail. Rows from before repairs had states were applied."""
    kind, layer, step, reason, text = row
    detail = json.loads(text)
    state, note = detail.pop("state", "applied"), detail.pop("note", "")
    return Action(kind, layer, step, reason, _floats(detail), state, note)


def _load_finding(text: str) -> Finding:
    record = json.loads(text)
    return Finding(**{**record, "value": float(record["value"]), "threshold": float(record["threshold"])})
