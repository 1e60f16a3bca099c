"""YAML text of plain data, for files that people read and edit: block style, every string in double quotes.

Double-quoted strings are written as JSON writes them, which YAML reads the same: nothing is guessed to be a number, a
date or a boolean. ASCII only, as JSON's escapes of characters beyond 16 bits are not YAML's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}  # keys that YAML 1.1 takes for something else


def to_yaml(value: Any) -> str:
    """The text of mappings, sequences, strings, whole numbers and booleans. Raises ValueError for anything else."""
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Any) -> list[str]:
    if isinstance(value, Mapping) and value:
        return [line for key, item in value.items() for line in _entry(f"{_key(key)}:", item)]
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return [line for item in value for line in _item(item)]
    return [_scalar(value)]


def _entry(head: str, item: Any) -> list[str]:
    lines = _lines(item)
    if not _is_block(item):
        return [f"{head} {lines[0]}"]
    return [head, *(f"  {line}" for line in lines)]


def _item(item: Any) -> list[str]:
    first, *rest = _lines(item)
    return [f"- {first}", *(f"  {line}" for line in rest)]


def _is_block(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple) and bool(value)


def _key(key: Any) -> str:
    text = str(key)
    return text if _PLAIN_KEY.fullmatch(text) and text.lower() not in _WORDS else _scalar(text)


def _scalar(value: Any) -> str:
    if isinstance(value, str) and not value.isascii():
        raise ValueError(f"yaml: expected ASCII text, got {value!r}; write it in ASCII")
    if value in ({}, [], ()) or isinstance(value, str | bool | int):
        return json.dumps(value)
    raise ValueError(
        f"yaml: expected a mapping, list, string, whole number or boolean, got {value!r}; write it as text"
    )
