"""Reads run.sqlite for the pages: bounded, however long the run and however large the model.

A connection lives for one read and waits half a second for a lock, so that one bad file does not hold up the others.
Curves are thinned in SQL, keeping the lowest and highest of each stretch. It writes nothing and judges nothing.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.dashboard.records import Evenness, Frame, Head, Series, evenness_of
from equipoise.monitor.incidents import PAGE, incidents
from equipoise.monitor.store import APPLICATION_ID, SCHEMA_VERSION, StoreError, load_action, store_path
from equipoise.types import Action, Alert, Finding, RoutingStats

MAX_POINTS = 400  # of one curve
MAX_COLUMNS = 100  # of a map over time
MAX_CELLS = 16_000  # of a map
MAX_EVENTS = 1000  # changes of alerts, and of repairs, the newest
MAX_NAMES = 64  # of scalars
SPARK_POINTS = 60
LOCK_SECONDS = 0.5

_FLOATS = {f.name for f in fields(RoutingStats) if f.type == "float"}
_FIELDS = {f.name for f in fields(RoutingStats)} - {"counts_E"}


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that sees the run of one moment, and is closed at the end.

    path: a run folder or its .sqlite file. Raises StoreError (a ValueError) with what is wrong and what to do.
    """
    file = store_path(path)
    if not file.is_file():
        raise StoreError(f"{file}: there is no such file; the run may not have written its first step yet")
    try:
        uri = f"{file.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=LOCK_SECONDS)) as db:
            _check(db, file)
            db.execute("BEGIN")
            yield db
    except sqlite3.Error as error:
        raise StoreError(f"{file}: {str(error).rstrip('.')}; {_remedy(str(error))}") from error
    except StoreError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # of JSON that is not what we write
        raise StoreError(
            f"{file}: a record cannot be read ({type(error).__name__}); the file is damaged, or newer than this program"
        ) from error


def head(db: sqlite3.Connection, path: Path) -> Head:
    """The run at a glance."""
    meta = {key: json.loads(value) for key, value in db.execute("SELECT key, value FROM meta")}
    loss, newest = _newest(db, "loss"), newest_frame(db)
    flush_step = newest.step if newest else None
    found = incidents(alerts(db), actions(db))
    worst = min(newest.layers, key=evenness_of, default=None) if newest else None
    spark = scalar(db, "loss", SPARK_POINTS)
    return Head(
        name=str(meta.get("name", store_path(path).parent.name)),
        status=str(meta.get("status", "running")),
        step=max(loss[0] if loss else 0, flush_step or 0),
        total_steps=_whole(meta.get("total_steps")),
        loss=loss[1] if loss else None,
        val_perplexity=(_newest(db, "val_perplexity") or (0, None))[1],
        tokens_per_s=(_newest(db, "tokens_per_s") or (0, None))[1],
        spark=tuple(value for _, value in spark.points),
        worst=worst,
        num_layers=len(newest.layers) if newest else 0,
        firing=tuple(incident for incident in found if incident.firing),
        num_repairs=_num_repairs(db),
        flush_step=flush_step,
        flush_time=_flush_time(db, path, flush_step),
    )


# ------------------------------------------------------------------------------------------------------- scalars


def scalar_names(db: sqlite3.Connection) -> list[str]:
    """The recorded scalars, at most 64, found by jumping from name to name in the index."""
    query = """
        WITH RECURSIVE names(name) AS (SELECT min(name) FROM scalars UNION ALL
            SELECT (SELECT min(name) FROM scalars WHERE name > names.name) FROM names WHERE name IS NOT NULL)
        SELECT name FROM names WHERE name IS NOT NULL LIMIT ?"""
    return [name for (name,) in db.execute(query, (MAX_NAMES,))]


def scalar(db: sqlite3.Connection, name: str, max_points: int = MAX_POINTS) -> Series:
    """One scalar by step, thinned to at most max_points: of each stretch of steps its lowest and its highest value."""
    first, last, count = db.execute(
        "SELECT min(step), max(step), count(*) FROM scalars WHERE name = ?", (name,)
    ).fetchone()
    if not count:
        return Series(name, ())
    if count <= max_points:
        rows = db.execute("SELECT step, value FROM scalars WHERE name = ? ORDER BY step", (name,)).fetchall()
        return Series(name, tuple((step, _finite(value)) for step, value in rows))
    width = (last - first) // (max_points // 2 - 1) + 1
    points: dict[int, float | None] = {}
    for pick in ("min", "max"):  # SQLite gives `step` of the row that is the lowest, or highest
        query = f"""SELECT step, {pick}(value) FROM scalars WHERE name = ? AND value IS NOT NULL
            AND value BETWEEN -1e300 AND 1e300 GROUP BY (step - ?) / ?"""
        points |= dict(db.execute(query, (name, first, width)).fetchall())
    gaps = """SELECT min(step) FROM scalars WHERE name = ? AND (value IS NULL OR NOT value BETWEEN -1e300 AND 1e300)
        GROUP BY (step - ?) / ? LIMIT ?"""
    for (step,) in db.execute(gaps, (name, first, width, max_points // 2)):
        points.setdefault(step, None)
    return Series(name, tuple(sorted(points.items())[: 2 * max_points]))


# ------------------------------------------------------------------------------------------------------- routing


def layers(db: sqlite3.Connection) -> list[str]:
    """The names of the recorded layers, in the order of the model."""
    return [name for (name,) in db.execute("SELECT layer FROM routing GROUP BY layer ORDER BY min(id)")]


def flush_steps(db: sqlite3.Connection, max_points: int = MAX_POINTS, keep: Sequence[int] = ()) -> list[int]:
    """Steps of flushes, at most about max_points: every 2^n-th, the last, and the flushes nearest before `keep`.

    2^n: as the run grows the chosen steps stay chosen, or every other one does.
    """
    steps = [step for (step,) in db.execute("SELECT DISTINCT step FROM routing ORDER BY step")]
    stride = 1
    while len(steps) > stride * max_points:
        stride *= 2
    index = np.searchsorted(steps, np.array(sorted(set(keep))[-max_points // 4 :], dtype=np.int64), side="right") - 1
    chosen = set(range(0, len(steps), stride)) | {len(steps) - 1} | {int(i) for i in index}
    return [steps[i] for i in sorted(chosen) if 0 <= i < len(steps)]


def newest_frame(db: sqlite3.Connection) -> Frame | None:
    """The newest flush; None before the first."""
    step = db.execute("SELECT max(step) FROM routing").fetchone()[0]
    return None if step is None else frame(db, step)


def frame(db: sqlite3.Connection, step: int) -> Frame | None:
    """The newest flush at or before a step; None when there is none."""
    at = db.execute("SELECT max(step) FROM routing WHERE step <= ?", (step,)).fetchone()[0]
    if at is None:
        return None
    rows = db.execute("SELECT stats, counts FROM routing WHERE step = ? ORDER BY id", (at,))
    return Frame(at, tuple(_stats(*row) for row in rows))


def history(db: sqlite3.Connection, layer: str, steps: Sequence[int]) -> list[RoutingStats]:
    """The records of one layer at some steps; fewer where it has none."""
    marks = ",".join("?" * len(steps))
    query = f"SELECT stats, counts FROM routing WHERE layer = ? AND step IN ({marks}) ORDER BY step"
    return [_stats(*row) for row in db.execute(query, (layer, *steps))]


def evenness(db: sqlite3.Connection, steps: Sequence[int], names: Sequence[str]) -> Evenness:
    """Effective experts relative to E for every layer and step; SQLite takes the number out of the record."""
    column, row = {step: i for i, step in enumerate(steps)}, {name: i for i, name in enumerate(names)}
    share_LS = np.full((len(names), len(steps)), np.nan)
    marks = ",".join("?" * len(steps))
    query = f"""SELECT layer, step, json_extract(stats, '$.effective_experts'), length(counts) / 8
        FROM routing WHERE step IN ({marks})"""
    for layer, step, effective, num_experts in db.execute(query, list(steps)):
        if layer in row and effective is not None and num_experts:
            share_LS[row[layer], column[step]] = float(effective) / num_experts
    return Evenness(tuple(steps), tuple(names), share_LS)


# -------------------------------------------------------------------------------------------------------- events


def alerts(db: sqlite3.Connection) -> list[Alert]:
    """The newest changes of alerts, at most 1000, oldest first."""
    query = "SELECT key, state, since_step, step, finding FROM alerts ORDER BY id DESC LIMIT ?"
    rows = db.execute(query, (MAX_EVENTS,)).fetchall()
    return [Alert(key, state, since, step, _finding(text)) for key, state, since, step, text in reversed(rows)]


def actions(db: sqlite3.Connection) -> list[Action]:
    """The newest changes of repairs, at most 1000, oldest first."""
    rows = db.execute("SELECT kind, layer, step, reason, detail FROM actions ORDER BY id DESC LIMIT ?", (MAX_EVENTS,))
    return [load_action(row) for row in rows][::-1]


# ------------------------------------------------------------------------------------------------------- helpers


def _check(db: sqlite3.Connection, file: Path) -> None:
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        raise StoreError(f"{file}: this is an SQLite file of something else, not a run store; check the path")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{file}: expected schema version {SCHEMA_VERSION}, got {version}; open it with the version of equipoise "
            "that wrote it"
        )


def _remedy(message: str) -> str:
    if "locked" in message:
        return "another process holds it; it is tried again"
    if "not a database" in message or "malformed" in message:
        return "the file is damaged or no run store; move it away"
    return "check the file and its folder"


def _newest(db: sqlite3.Connection, name: str) -> tuple[int, float | None] | None:
    query = "SELECT step, value FROM scalars WHERE name = ? ORDER BY step DESC LIMIT 1"
    row = db.execute(query, (name,)).fetchone()
    return None if row is None else (row[0], math.nan if row[1] is None else row[1])


def _num_repairs(db: sqlite3.Connection) -> int:
    """How many repairs were applied; rows from before repairs had states say nothing of theirs."""
    query = """SELECT count(*) FROM actions
        WHERE kind != ? AND coalesce(json_extract(detail, '$.state'), 'applied') = 'applied'"""
    return int(db.execute(query, (PAGE,)).fetchone()[0])


def _flush_time(db: sqlite3.Connection, path: Path, step: int | None) -> float:
    """Routing has no clock of its own: the time of the loss of that step, else of the file's last change."""
    query = "SELECT time FROM scalars WHERE name = 'loss' AND step <= ? ORDER BY step DESC LIMIT 1"
    row = db.execute(query, (step,)).fetchone() if step is not None else None
    if row is not None:
        return float(row[0])
    file = store_path(path)
    both = (file, file.with_name(file.name + "-wal"))
    return max((each.stat().st_mtime for each in both if each.exists()), default=0.0)


def _stats(text: str, counts: bytes) -> RoutingStats:
    """A record; fields that this version does not know are left out."""
    stored = {key: value for key, value in json.loads(text).items() if key in _FIELDS}
    record: dict[str, Any] = {key: float(value) if key in _FLOATS else value for key, value in stored.items()}
    record["losses"] = {key: float(value) for key, value in record.get("losses", {}).items()}
    record["dead_experts"] = tuple(record["dead_experts"])
    return RoutingStats(**record, counts_E=np.frombuffer(counts, dtype="<i8").astype(np.int64))


def _finding(text: str) -> Finding:
    record = json.loads(text)
    known = {f.name: record[f.name] for f in fields(Finding)}
    return Finding(**{**known, "value": float(record["value"]), "threshold": float(record["threshold"])})


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None
