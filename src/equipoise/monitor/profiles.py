"""Profiles: which rules judge a window. "relative" is the default; "absolute" is a checklist taken literally."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from equipoise.monitor.baseline import Baseline
from equipoise.monitor.detectors import CollapseDetector
from equipoise.monitor.rules import AbsoluteRule, DropRule, LoadDriftRule, LogitRule
from equipoise.types import Detector

Profile = Literal["relative", "absolute"]


def rules_of(
    profile: Profile, baselines: Mapping[str, Baseline] | None = None, *, learning: bool = False
) -> tuple[Detector, ...]:
    """The rules of a profile. baselines: by layer, of the model in health, for the rules that compare.

    learning: the model is still being trained. Its loads move and its logits grow though nothing is wrong, so neither
    is compared; logits that are no longer numbers are still a finding. docs/monitoring.md has what healthy runs show.
    Raises ValueError for another name.
    """
    known = dict(baselines or {})
    settled = {} if learning else known
    if profile == "relative":
        logits = LogitRule(baselines=known, std_ratio=math.inf) if learning else LogitRule(baselines=known)
        return (CollapseDetector(), DropRule(), logits, LoadDriftRule(settled))
    if profile == "absolute":
        return (AbsoluteRule(baselines=settled), DropRule(false_alarms=None, min_dropped=1))
    raise ValueError(f"profile: expected relative or absolute, got {profile!r}")
