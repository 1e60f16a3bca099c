"""Reads run.sqlite for the pages: bounded, however long the run and however large the model.

A store is opened for one read and waits half a second for a lock, so that one bad file does not hold up the others.
Curves are thinned in SQL, keeping the lowest and highest of each stretch. It writes nothing and judges nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from equipoise.dashboard.records import Evenness, ExpertTimes, Frame, Head, Series, evenness_of
from equipoise.monitor.incidents import PAGE, incidents
from equipoise.monitor.store import RunStore, store_path
from equipoise.types import Action, Alert, RoutingStats

MAX_POINTS = 400  # of one curve
MAX_COLUMNS = 100  # of a map over time
MAX_CELLS = 16_000  # of a map
MAX_EVENTS = 1000  # changes of alerts, and of repairs, the newest
MAX_NAMES = 64  # of scalars
SPARK_POINTS = 60
LOCK_SECONDS = 0.5


@contextmanager
def reading(path: Path) -> Iterator[RunStore]:
    """The run of one moment, closed at the end.

    path: a run folder or its .sqlite file. Raises StoreError (a ValueError) with what is wrong and what to do.
    """
    with RunStore.open_readonly(path, wait_s=LOCK_SECONDS) as store, store.snapshot():
        yield store


def head(run: RunStore, path: Path) -> Head:
    """The run at a glance."""
    meta, loss, newest = run.meta(), _newest(run, "loss"), frame(run)
    flush_step = newest.step if newest else 0
    found = incidents(alerts(run), actions(run))
    worst = min(newest.layers, key=evenness_of, default=None) if newest else None
    spark = scalar(run, "loss", SPARK_POINTS)
    return Head(
        name=str(meta.get("name", store_path(path).parent.name)),
        status=str(meta.get("status", "running")),
        step=max(loss[0] if loss else 0, flush_step),
        total_steps=_whole(meta.get("total_steps")),
        loss=loss[1] if loss else None,
        val_perplexity=(_newest(run, "val_perplexity") or (0, None))[1],
        tokens_per_s=(_newest(run, "tokens_per_s") or (0, None))[1],
        spark=tuple(value for _, value in spark.points),
        worst=worst,
        num_layers=len(newest.layers) if newest else 0,
        firing=tuple(incident for incident in found if incident.firing),
        num_repairs=_num_repairs(run),
        flush_time=run.flushed_at(flush_step),
        is_server=meta.get("kind") == "server",
        first_token_ms=(_newest(run, "time_to_first_token_ms.p99") or (0, None))[1],
        queue_depth=(_newest(run, "queue_depth") or (0, None))[1],
    )


# ------------------------------------------------------------------------------------------------------- scalars


def scalar_names(run: RunStore) -> list[str]:
    """The recorded scalars but those of single experts, at most 64, by jumping from name to name in the index."""
    query = """
        WITH RECURSIVE names(name) AS (SELECT min(name) FROM scalars UNION ALL
            SELECT (SELECT min(name) FROM scalars WHERE name > names.name) FROM names WHERE name IS NOT NULL)
        SELECT name FROM names WHERE name IS NOT NULL AND name NOT LIKE 'experts_ms.%/%' LIMIT ?"""
    return run.records(str, query, (MAX_NAMES,))


def scalar(run: RunStore, name: str, max_points: int = MAX_POINTS) -> Series:
    """One scalar by step, thinned to at most max_points: of each stretch of steps its lowest and its highest value."""
    [(first, last, count)] = run.rows("SELECT min(step), max(step), count(*) FROM scalars WHERE name = ?", (name,))
    if not count:
        return Series(name, ())
    if count <= max_points:
        rows = run.rows("SELECT step, value FROM scalars WHERE name = ? ORDER BY step", (name,))
        return Series(name, tuple((step, _finite(value)) for step, value in rows))
    width = (last - first) // (max_points // 2 - 1) + 1
    points: dict[int, float | None] = {}
    for pick in ("min", "max"):  # SQLite gives `step` of the row that is the lowest, or highest
        query = f"""SELECT step, {pick}(value) FROM scalars WHERE name = ? AND value IS NOT NULL
            AND value BETWEEN -1e300 AND 1e300 GROUP BY (step - ?) / ?"""
        points |= dict(run.rows(query, (name, first, width)))
    gaps = """SELECT min(step) FROM scalars WHERE name = ? AND (value IS NULL OR NOT value BETWEEN -1e300 AND 1e300)
        GROUP BY (step - ?) / ? LIMIT ?"""
    for (step,) in run.rows(gaps, (name, first, width, max_points // 2)):
        points.setdefault(step, None)
    return Series(name, tuple(sorted(points.items())[: 2 * max_points]))


# ------------------------------------------------------------------------------------------------------- routing


def expert_times(run: RunStore, layer: str, num_experts: int) -> ExpertTimes:
    """Of the layer's experts, where a server times them one by one."""
    newest = {
        (expert, share): _newest(run, f"experts_ms.{layer}/{expert}.{share}")
        for expert in range(num_experts)
        for share in ("p50", "p99")
    }
    values = {place: None if found is None else _finite(found[1]) for place, found in newest.items()}
    return ExpertTimes(*(tuple(values[expert, share] for expert in range(num_experts)) for share in ("p50", "p99")))


def flush_steps(run: RunStore, max_points: int = MAX_POINTS, keep: Sequence[int] = ()) -> list[int]:
    """Steps of flushes, at most about max_points: every 2^n-th, the last, and the flushes nearest before `keep`.

    2^n: as the run grows the chosen steps stay chosen, or every other one does.
    """
    steps = run.flush_steps()
    stride = 1
    while len(steps) > stride * max_points:
        stride *= 2
    index = np.searchsorted(steps, np.array(sorted(set(keep))[-max_points // 4 :], dtype=np.int64), side="right") - 1
    chosen = set(range(0, len(steps), stride)) | {len(steps) - 1} | {int(i) for i in index}
    return [steps[i] for i in sorted(chosen) if 0 <= i < len(steps)]


def frame(run: RunStore, step: int | None = None) -> Frame | None:
    """The newest flush, or the newest at or before a step; None where there is none."""
    layers = run.latest_routing(at=step)
    return Frame(layers[0].step, tuple(layers)) if layers else None


def history(run: RunStore, layer: str, steps: Sequence[int]) -> list[RoutingStats]:
    """The records of one layer at some steps; fewer where it has none."""
    return run.routing_history(layer, steps) if layer else []


def evenness(run: RunStore, steps: Sequence[int], names: Sequence[str]) -> Evenness:
    """Effective experts relative to E for every layer and step; SQLite takes the number out of the record."""
    column, row = {step: i for i, step in enumerate(steps)}, {name: i for i, name in enumerate(names)}
    share_LS = np.full((len(names), len(steps)), np.nan)
    marks = ",".join("?" * len(steps))
    query = f"""SELECT layer, step, json_extract(stats, '$.effective_experts'), length(counts) / 8
        FROM routing WHERE step IN ({marks})"""

    def keep(layer: str, step: int, effective: float | str | None, num_experts: int) -> None:
        if layer in row and effective is not None and num_experts:
            share_LS[row[layer], column[step]] = float(effective) / num_experts

    run.records(keep, query, list(steps))
    return Evenness(tuple(steps), tuple(names), share_LS)


# -------------------------------------------------------------------------------------------------------- events


def alerts(run: RunStore) -> list[Alert]:
    """The newest changes of alerts, at most 1000, oldest first."""
    return run.alerts(last=MAX_EVENTS)


def actions(run: RunStore) -> list[Action]:
    """The newest changes of repairs, at most 1000, oldest first."""
    return run.actions(last=MAX_EVENTS)


# ------------------------------------------------------------------------------------------------------- helpers


def _newest(run: RunStore, name: str) -> tuple[int, float | None] | None:
    return next(((step, value) for step, value, _ in run.scalar_history(name, last=1)), None)


def _num_repairs(run: RunStore) -> int:
    """How many repairs were applied; rows from before repairs had states say nothing of theirs."""
    query = """SELECT count(*) FROM actions
        WHERE kind != ? AND coalesce(json_extract(detail, '$.state'), 'applied') = 'applied'"""
    return run.records(int, query, (PAGE,))[0]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None
