"""All claims, in the order of the report. To add one, write it into its theme's file."""

from __future__ import annotations

from collections.abc import Sequence

from equipoise.bench.claims import (
    architectures,
    balance,
    capacity,
    coefficient,
    detection,
    expert_choice,
    limits,
    memory,
    out_of_reach,
    placement,
    routers,
    saturation,
    serving,
)
from equipoise.bench.claims.claim import Claim
from equipoise.bench.claims.curves import Curve

THEMES = (
    balance,
    coefficient,
    architectures,
    routers,
    saturation,
    expert_choice,
    capacity,
    limits,
    detection,
    memory,
    serving,
    placement,
    out_of_reach,
)
CURVES: tuple[Curve, ...] = tuple(
    curve for theme in (coefficient, saturation, expert_choice, limits) for curve in theme.CURVES
)
CLAIMS: tuple[Claim, ...] = tuple(claim for theme in THEMES for claim in theme.CLAIMS)


def chosen(names: Sequence[str] = (), cheap: bool = False) -> list[Claim]:
    """Those of the names, or whose name begins so; all without names. cheap: only those that need no training.

    Raises ValueError for a name that fits none.
    """
    for name in names:
        if not any(claim.name.startswith(name) for claim in CLAIMS):
            known = ", ".join(claim.name for claim in CLAIMS)
            raise ValueError(f"claims: expected names or beginnings of {known}, got {name!r}")
    found = [claim for claim in CLAIMS if not names or claim.name.startswith(tuple(names))]
    return [claim for claim in found if claim.cheap or not cheap]
