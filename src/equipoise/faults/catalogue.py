"""The table of all faults by name, and a fault as JSON and back. What each does is in its own file."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from equipoise.faults.counters import StaleCounters
from equipoise.faults.data import SkewedInput
from equipoise.faults.experts import NaNExpert
from equipoise.faults.files import CheckpointDamage
from equipoise.faults.router import BiasRunaway, Collapse, DeadExpert, Drift, LogitBlowUp, RouterCorruption
from equipoise.faults.slow import SlowExpert, SlowRank

Fault: TypeAlias = (
    Collapse
    | Drift
    | DeadExpert
    | LogitBlowUp
    | RouterCorruption
    | BiasRunaway
    | NaNExpert
    | SlowExpert
    | SlowRank
    | StaleCounters
    | SkewedInput
    | CheckpointDamage
)

FAULTS: Mapping[str, type[Fault]] = MappingProxyType(
    {
        "collapse": Collapse,
        "drift": Drift,
        "dead-expert": DeadExpert,
        "logit-blow-up": LogitBlowUp,
        "router-corruption": RouterCorruption,
        "bias-runaway": BiasRunaway,
        "nan-expert": NaNExpert,
        "slow-expert": SlowExpert,
        "slow-rank": SlowRank,
        "stale-counters": StaleCounters,
        "skewed-input": SkewedInput,
        "checkpoint-damage": CheckpointDamage,
    }
)


def name_of(fault: Fault) -> str:
    """The fault's plain name, such as "dead-expert"."""
    return next(name for name, kind in FAULTS.items() if kind is type(fault))


def summary(name: str) -> str:
    """What the fault does, in one line: the first of its docstring."""
    return (FAULTS[name].__doc__ or "").partition("\n")[0]


def sentence(fault: Fault) -> str:
    """The fault with what is set, in one line of plain characters: "collapse (layer 'layers.1.mlp', expert 5)"."""
    values = {f.name: getattr(fault, f.name) for f in fields(fault)}
    told = ", ".join(f"{name} {value!r}" for name, value in values.items() if value not in ((), ""))
    return f"{name_of(fault)} ({told})"


def to_json(fault: Fault) -> dict[str, Any]:
    """The fault as plain JSON: {"fault": its name, and each field}."""
    values = {f.name: getattr(fault, f.name) for f in fields(fault)}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {"fault": name_of(fault), **plain}


def from_json(record: object) -> Fault:
    """The fault that `to_json` wrote, or a person: fields with a default may be left out.

    Raises ValueError for an unknown name, an unknown or missing field, a wrong type, and a value out of range.
    """
    if not isinstance(record, dict):
        raise ValueError(f'fault: expected an object such as {{"fault": "collapse", ...}}, got {_short(record)}')
    name = record.get("fault")
    if not isinstance(name, str) or name not in FAULTS:
        raise ValueError(f"fault: expected one of {', '.join(FAULTS)}, got {_short(name)}")
    kind = FAULTS[name]
    known = {f.name: f for f in fields(kind)}
    given = {key: value for key, value in record.items() if key != "fault"}
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{name}: unknown field {_short(unknown[0])}; it has {', '.join(known)}")
    if missing := [key for key, f in known.items() if _required(f) and key not in given]:
        raise ValueError(f"{name}: {missing[0]} is missing; it has {', '.join(known)}")
    hints = typing.get_type_hints(kind)
    values = {key: _value(f"{name}.{key}", hints[key], value) for key, value in given.items()}
    return kind(**values)


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _value(where: str, hint: Any, value: object) -> Any:
    """The value as the dataclass wants it. Raises ValueError for a value of another type."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if isinstance(value, str) and value in choices:
            return value
        raise ValueError(f"{where}: expected one of {', '.join(choices)}, got {_short(value)}")
    if hint is str and isinstance(value, str):
        return value
    if hint is int and _is_index(value):
        return value
    if hint is float and (_is_int(value) or isinstance(value, float)):
        return _float(where, value)
    if hint not in (str, int, float) and isinstance(value, list) and all(_is_index(item) for item in value):
        return tuple(value)
    names = {str: "text", int: "a whole number", float: "a number"}
    raise ValueError(f"{where}: expected {names.get(hint, 'a list of whole numbers')}, got {_short(value)}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_index(value: object) -> bool:
    """A whole number that tensors and generators take, of 64 bits."""
    return _is_int(value) and -(2**63) <= typing.cast(int, value) < 2**63


def _float(where: str, value: Any) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where}: expected a finite number, got {_short(value)}")
    return number


def _short(value: object) -> str:
    """A value for a message: plain characters, and not a page of it."""
    if _is_int(value) and abs(typing.cast(int, value)) >= 10**18:
        return "a very large number"
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nested too deep; a number in it has more digits than Python prints
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."
