"""Frozen configurations to plain JSON data and back: each object carries the name of its type, one of a given list."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any


def encode(value: Any, known: Iterable[type[Any]]) -> Any:
    """Plain JSON data: a dataclass becomes an object with its type's name, a tuple a list."""
    known = tuple(known)
    if is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        _of_name(name, known)
        return {"type": name} | {each.name: encode(getattr(value, each.name), known) for each in fields(value)}
    if isinstance(value, list | tuple):
        return [encode(item, known) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"config: expected numbers, strings, tuples and known strategies, got {type(value).__name__}. "
        "Use a strategy object of equipoise, or keep this configuration as Python."
    )


def decode(data: Any, known: Iterable[type[Any]]) -> Any:
    """Undo `encode`. Every strategy's constructor checks its own values."""
    known = tuple(known)
    if isinstance(data, list):
        return tuple(decode(item, known) for item in data)
    if not isinstance(data, dict):
        return data
    cls = _of_name(data.get("type"), known)
    names = {each.name for each in fields(cls)}
    values = {name: decode(value, known) for name, value in data.items() if name != "type"}
    if unknown := values.keys() - names:
        raise ValueError(
            f"config: {cls.__name__} has no {sorted(unknown)}, expected fields among {sorted(names)}. "
            "The file may come from another version of equipoise."
        )
    return cls(**values)


def _of_name(name: object, known: tuple[type[Any], ...]) -> type[Any]:
    by_name = {cls.__name__: cls for cls in known}
    if not isinstance(name, str) or name not in by_name:
        raise ValueError(
            f"config: unknown type {name!r}, expected one of {sorted(by_name)}. "
            "The file may come from another version of equipoise."
        )
    return by_name[name]
