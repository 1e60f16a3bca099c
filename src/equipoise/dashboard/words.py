"""Numbers, counts and times as texts of the pages."""

from __future__ import annotations

import math
import time


def plural(count: int, noun: str) -> str:
    """A count with its noun: 1 repair, 2 repairs."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def number(value: float | None, form: str = ".4g") -> str:
    """A number as text; a dash for None."""
    return "-" if value is None else format(value, form)


def percent(value: float) -> str:
    """A share in [0, 1] as text."""
    return "-" if math.isnan(value) else "0 %" if value == 0 else f"{100 * value:.3g} %"


def age(when: float) -> str:
    """How long ago, roughly, so that the text changes rarely."""
    if when <= 0:
        return "-"
    seconds = max(0.0, time.time() - when)
    if seconds < 10:
        return "just now"
    if seconds < 60:
        return f"{10 * int(seconds / 10)} s ago"
    for size, limit, unit in ((60, 3600, "min"), (3600, 86400, "h"), (86400, math.inf, "d")):
        if seconds < limit:
            return f"{int(seconds / size)} {unit} ago"
    return "-"
