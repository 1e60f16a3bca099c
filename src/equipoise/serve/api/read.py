"""JSON to the frozen records of `bodies.py`, strictly: no text for a number, the first mistake ends it and is named.

pydantic would do, but it tries every item and keeps every error: a body of 1 MiB made it take 1.4 GB.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from equipoise.serve.api.errors import ApiError

T = TypeVar("T")
_NAMES: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    types.NoneType: "null",
}


def read(kind: type[T], raw: bytes) -> T:
    """A record of that kind. Raises ApiError 400, with the field's name."""
    from pydantic_core import from_json

    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", None, "invalid_json") from error
    return cast(T, _read(kind, value, ""))


def _read(kind: Any, value: Any, place: str) -> Any:
    """The value as that kind. place: where it stands, such as messages[0].content."""
    if kind is Any:
        return value
    if get_origin(kind) in (Union, types.UnionType):
        return _read_union(kind, value, place)
    if is_dataclass(kind) and isinstance(value, dict):
        return _read_record(kind, value, place)
    if get_origin(kind) is tuple and isinstance(value, list):
        item = get_args(kind)[0]
        if item in _NAMES and all(type(each) is item for each in value):
            return tuple(value)  # the usual case, and the long one
        return tuple(_read(item, each, f"{place}[{n}]") for n, each in enumerate(value))
    if get_origin(kind) is Mapping and isinstance(value, dict):
        item = get_args(kind)[1]
        return {key: _read(item, each, f"{place}.{key}") for key, each in value.items()}
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return _as_float(value, place)
    raise _wrong(kind, value, place)


def _read_union(kind: Any, value: Any, place: str) -> Any:
    if value is None and types.NoneType in get_args(kind):
        return None
    members = [each for each in get_args(kind) if each is not types.NoneType]
    if len(members) == 1:
        return _read(members[0], value, place)
    for member in members:
        try:
            return _read(member, value, place)
        except ApiError:
            continue
    raise _wrong(kind, value, place)


def _read_record(kind: Any, value: dict[str, Any], place: str) -> Any:
    hints, given = _hints(kind), {}
    for each in fields(kind):
        name = f"{place}.{each.name}" if place else each.name
        if each.name in value:
            given[each.name] = _read(hints[each.name], value[each.name], name)
        elif each.default is MISSING:
            raise ApiError(400, f"{name}: is missing; expected {_name(hints[each.name])}", name, "missing")
    return kind(**given)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _as_float(value: int, place: str) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ApiError(400, f"{place}: is too large a number", place, "invalid_value") from error


def _wrong(kind: Any, value: Any, place: str) -> ApiError:
    got = _NAMES[type(value)]
    if not place:
        return ApiError(400, f"the body: expected an object, got {got}", None, "invalid_type")
    return ApiError(400, f"{place}: expected {_name(kind)}, got {got}", place, "invalid_type")


def _name(kind: Any) -> str:
    """In words."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_name(each) for each in get_args(kind) if each is not types.NoneType)
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        inner = _NAMES[item].split(" ", 1)[1] + "s" if item in _NAMES else "objects" if is_dataclass(item) else "lists"
        return f"a list of {inner}"
    return _NAMES.get(kind, "an object")
