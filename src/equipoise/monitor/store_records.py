"""Records of the run store as text, and back: JSON with NaN and infinities, tolerant of other versions' records."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

import numpy as np

from equipoise.types import Action, Alert, CoSelection, Finding, RoutingStats

_FLOATS = {f.name for f in fields(RoutingStats) if f.type == "float"}
_TEXT = {f.name for f in fields(RoutingStats)} - {"counts_E"}
_WIDTHS = {1: "u1", 2: "<u2", 4: "<u4", 8: "<i8"}  # bytes of a count -> its type


def dump(value: Any) -> str:
    """JSON text; NaN and infinities, which JSON has not, become the strings that float() reads."""
    return json.dumps(plain(value), allow_nan=False)


def plain(value: Any) -> Any:
    """What JSON can hold of it, with the strings of NaN and infinities."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def nulls(value: Any) -> Any:
    """What JSON can hold of it for other programs: numbers that are not known, or beyond all bounds, are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nulls(item) for item in value]
    return value


def to_real(value: float) -> float | None:
    """SQLite keeps no NaN; NULL stands for it."""
    return None if math.isnan(value) else float(value)


def _floats(record: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in record.items()}


def dump_stats(stats: RoutingStats) -> str:
    """All but the counts, which are kept beside it."""
    return dump({f.name: getattr(stats, f.name) for f in fields(stats) if f.name != "counts_E"})


def load_stats(text: str, counts: bytes) -> RoutingStats:
    """A record. What it does not have keeps its default, and what this version does not know is left out."""
    stored = {key: value for key, value in json.loads(text).items() if key in _TEXT}
    record: dict[str, Any] = {key: float(value) if key in _FLOATS else value for key, value in stored.items()}
    record["losses"] = _floats(record.get("losses", {}))
    record["dead_experts"] = tuple(record["dead_experts"])
    return RoutingStats(**record, counts_E=np.frombuffer(counts, dtype="<i8").astype(np.int64))


def dump_pairs(counts_EE: np.ndarray) -> bytes:
    """The upper half of symmetric counts with its diagonal, row by row, in the smallest type that holds it."""
    half = counts_EE[_upper(len(counts_EE))]
    most = int(half.max(initial=0))
    width = next(width for width in _WIDTHS if most < 2 ** (8 * width - (width == 8)))
    return bytes(half.astype(_WIDTHS[width]).tobytes())


def load_pairs(layer: str, step: int, num_tokens: int, num_experts: int, counts: bytes) -> CoSelection:
    """A record of which experts were chosen together."""
    rows, columns = _upper(num_experts)
    half = np.frombuffer(counts, dtype=_WIDTHS[len(counts) // len(rows)])
    counts_EE = np.zeros((num_experts, num_experts), dtype=np.int64)
    counts_EE[rows, columns] = counts_EE[columns, rows] = half
    return CoSelection(layer, step, num_tokens, counts_EE)


@lru_cache(maxsize=4)
def _upper(num_experts: int) -> tuple[np.ndarray, ...]:
    return np.triu_indices(num_experts)


def load_action(kind: str, layer: str, step: int, reason: str, text: str) -> Action:
    """A repair. Rows from before repairs had states were applied."""
    detail = json.loads(text)
    state, note = detail.pop("state", "applied"), detail.pop("note", "")
    return Action(kind, layer, step, reason, _floats(detail), state, note)


def load_alert(key: str, state: Any, since_step: int, step: int, text: str) -> Alert:
    """An alert, with its finding as text."""
    record = json.loads(text)
    known = {f.name: record[f.name] for f in fields(Finding)}
    finding = Finding(**{**known, "value": float(record["value"]), "threshold": float(record["threshold"])})
    return Alert(key, state, since_step, step, finding)
