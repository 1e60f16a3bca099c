"""Evidence as JSON, from a server to whoever looks into it. What comes in is checked: the other side may be anything.

Text that comes in is cut, and made printable; numbers must be numbers. What this version does not know is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, get_args

import numpy as np

from equipoise.monitor.evidence import Evidence, Serving
from equipoise.monitor.store_records import load_action, load_alert, load_stats, plain
from equipoise.types import Action, ActionState, Alert, RoutingStats, Severity

FORMAT = "equipoise evidence 1"
MAX_TEXT, MAX_EXPERTS, MAX_COUNT = 2000, 65_536, 2**53


class EvidenceError(ValueError):
    """There is no evidence to be had, or it is not what it should be; the message says why and what to do."""


def to_json(evidence: Evidence) -> dict[str, Any]:
    """All of it, as `json.dumps` takes it; NaN and infinities are strings."""
    record = {field.name: getattr(evidence, field.name) for field in fields(evidence)}
    record |= {
        "format": FORMAT,
        "routing": {name: [asdict(stats) for stats in history] for name, history in evidence.routing.items()},
        "alerts": [asdict(alert) for alert in evidence.alerts],
        "actions": [asdict(action) for action in evidence.actions],
        "times": list(evidence.times.items()),
        "serving": None if evidence.serving is None else asdict(evidence.serving),
    }
    for each in record["routing"].values():
        for stats in each:
            stats["counts_E"] = stats["counts_E"].tolist()
    found: dict[str, Any] = plain(record)
    return found


def from_json(record: object) -> Evidence:
    """The evidence. Raises EvidenceError for a record that is none."""
    if not isinstance(record, Mapping) or record.get("format") != FORMAT:
        raise EvidenceError(f"expected the format {FORMAT!r}; got something else")
    try:
        return _evidence(_clean(record))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        said = _text(f"{type(error).__name__}: {error}")[:200]
        raise EvidenceError(f"a record in it is none ({said})") from error


def _evidence(record: Mapping[str, Any]) -> Evidence:
    live = record["serving"]
    return Evidence(
        name=_str(record["name"]),
        status=_str(record["status"]),
        age_s=float(record["age_s"]),
        routing={layer: _history(layer, rows) for layer, rows in record["routing"].items()},
        scalars={
            name: tuple((_count(step), float(value)) for step, value in points)
            for name, points in record["scalars"].items()
        },
        alerts=tuple(map(_alert, record["alerts"])),
        actions=tuple(map(_action, record["actions"])),
        times={_count(step): _finite(when) for step, when in record["times"]},
        kind=_str(record["kind"]),
        serving=None if live is None else _serving(live),
    )


def _history(layer: str, rows: Sequence[Mapping[str, Any]]) -> tuple[RoutingStats, ...]:
    found = tuple(_stats(layer, row) for row in rows)
    steps = [stats.step for stats in found]
    if steps != sorted(set(steps)):
        raise ValueError(f"routing of {layer}: expected steps that rise")
    if len({stats.num_experts for stats in found}) > 1:
        raise ValueError(f"routing of {layer}: expected the same experts in each")
    return found


def _stats(layer: str, row: Mapping[str, Any]) -> RoutingStats:
    counts = [_count(count) for count in row["counts_E"]]
    if not 0 < len(counts) <= MAX_EXPERTS:
        raise ValueError(f"counts_E: expected 1 to {MAX_EXPERTS}, got {len(counts)}")
    whole = {
        "layer": layer,
        "step": _count(row["step"]),
        "num_tokens": _count(row["num_tokens"]),
        "dead_experts": [_count(expert) for expert in row["dead_experts"]],
        **{name: {key: _count(value) for key, value in row[name].items()} for name in ("dropped", "rerouted")},
    }
    return load_stats(json.dumps({**row, **whole}), np.array(counts, dtype="<i8").tobytes())


def _alert(row: Mapping[str, Any]) -> Alert:
    finding = dict(row["finding"])
    for name in ("rule", "layer", "message", "remedy"):
        _str(finding[name])
    if finding["severity"] not in get_args(Severity) or row["state"] not in ("firing", "resolved"):
        raise ValueError("alert: unknown severity or state")
    finding["expert"] = None if finding["expert"] is None else _count(finding["expert"])
    key, since, step = _str(row["key"]), _count(row["since_step"]), _count(row["step"])
    return load_alert(key, row["state"], since, step, json.dumps(finding))


def _action(row: Mapping[str, Any]) -> Action:
    if row["state"] not in get_args(ActionState):
        raise ValueError("action: unknown state")
    detail = json.dumps({**row["detail"], "state": row["state"], "note": _str(row["note"])})
    return load_action(_str(row["kind"]), _str(row["layer"]), _count(row["step"]), _str(row["reason"]), detail)


def _serving(row: Mapping[str, Any]) -> Serving:
    port = row["admin_port"]
    return Serving(
        folder=_str(row["folder"]),
        admin_port=None if port is None else min(65_535, _count(port)),
        weights=_str(row["weights"]),
        version=_count(row["version"]),
        acts=row["acts"] is True,
        down=_str(row["down"]),
        degraded=tuple(map(_str, row["degraded"])),
        faults=tuple(map(_str, row["faults"])),
        num_open=_count(row["num_open"]),
        max_waiting=_count(row["max_waiting"]),
    )


def _clean(value: Any) -> Any:
    """With texts that a terminal can show."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return {_text(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value


def _text(value: str) -> str:
    return "".join(char if char.isprintable() else " " for char in value[:MAX_TEXT])


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _count(value: Any) -> int:
    """A whole number, not below 0."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"expected a whole number from 0 to {MAX_COUNT}, got {value!r:.40}")
    return value


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or abs(number) > 1e11:
        raise ValueError(f"expected a time, got {value!r:.40}")
    return number
