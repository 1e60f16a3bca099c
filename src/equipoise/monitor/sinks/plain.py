"""Values and names made fit to send: numbers that JSON can hold, text on one line, times as RFC 3339.

Names of runs and layers come from people and files, so they may hold anything. Escaping for one destination (Slack,
Markdown) is in that destination's file.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

# Characters that change the direction of the text around them: a name with one can make a message read backwards.
_DIRECTIONS = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)}


def plain(value: Any) -> Any:
    """The value with NumPy scalars, tuples, NaN and broken text replaced by what JSON can hold.

    NaN and infinities become the strings that float() reads. Halves of surrogate pairs become "?".
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def dump(value: Any) -> str:
    """One line of JSON text, ASCII only."""
    return json.dumps(plain(value), allow_nan=False)


def one_line(text: str, limit: int) -> str:
    """The text without control characters and line breaks, at most `limit` characters; what is cut ends with "…"."""
    text = "".join(" " if _breaks(char) else char for char in text if char not in _DIRECTIONS)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def name_line(name: str, limit: int) -> str:
    """A name on one line, at most `limit` (>= 32) characters. Where that changes it, a hash of the whole is put behind.

    So different names stay different, and the same name is always the same.
    """
    line = one_line(name, limit)
    if line == name:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{one_line(name, limit - 17)}~{digest}"


def _breaks(char: str) -> bool:
    return unicodedata.category(char) in {"Cc", "Cs", "Zl", "Zp"}


def rfc3339(seconds: float, timespec: str = "milliseconds") -> str:
    """Seconds since 1970 as "2026-01-31T12:00:00.000Z". timespec: how fine, as in `datetime.isoformat`."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec=timespec).replace("+00:00", "Z")
