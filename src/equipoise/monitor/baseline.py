"""What is normal for a layer: a record taken while it was healthy, to compare with. Plain numbers, JSON-able."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from equipoise.types import RoutingStats


@dataclass(frozen=True)
class Baseline:
    """One layer in health.

    num_tokens, counts_E: tokens and assignments per expert of the record. load_entropy: H(f)/ln E.
    logit_*: of the fp32 router logits.
    """

    layer: str
    num_tokens: int
    counts_E: tuple[int, ...]
    load_entropy: float
    logit_mean: float
    logit_std: float
    logit_logsumexp: float


def baselines_of(window: Iterable[RoutingStats]) -> dict[str, Baseline]:
    """The baselines of the layers of a healthy window, by layer."""
    return {
        stats.layer: Baseline(
            layer=stats.layer,
            num_tokens=stats.num_tokens,
            counts_E=tuple(stats.counts_E.tolist()),
            load_entropy=stats.load_entropy,
            logit_mean=stats.logit_mean,
            logit_std=stats.logit_std,
            logit_logsumexp=stats.logit_logsumexp,
        )
        for stats in window
    }


def to_json(baselines: Mapping[str, Baseline]) -> list[dict[str, Any]]:
    """Plain data."""
    return [asdict(baseline) for baseline in baselines.values()]


def from_json(records: Iterable[Mapping[str, Any]]) -> dict[str, Baseline]:
    """What `to_json` made. Raises ValueError for something else."""
    try:
        found = [Baseline(**{**record, "counts_E": tuple(record["counts_E"])}) for record in records]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"baselines: expected what baseline.to_json wrote, got something else ({error}); record them again"
        ) from error
    return {baseline.layer: baseline for baseline in found}
