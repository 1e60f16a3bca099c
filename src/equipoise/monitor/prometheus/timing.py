"""How long Prometheus looks back and waits, in one record that rules and alerts share."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Timing:
    """Whole seconds.

    window: that rates are taken over; at least four scrapes. hold: how long a condition must last before its alert
    fires. stalled: a run without a flush for so long is stalled. evaluate: between evaluations.
    Raises ValueError for a number below 1.
    """

    window: int = 600
    hold: int = 300
    stalled: int = 900
    evaluate: int = 30

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value < 1:
                raise ValueError(f"{each.name}: expected at least 1 second, got {value}")


def duration(seconds: int) -> str:
    """Seconds as Prometheus writes them, in the largest unit that fits: 600 is "10m"."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
