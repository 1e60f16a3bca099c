"""Profiles: which rules judge a window. "relative" is the default; "absolute" is a checklist taken literally."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from equipoise.monitor.baseline import Baseline
from equipoise.monitor.detectors import CollapseDetector
from equipoise.monitor.rules import AbsoluteRule, DropRule, LoadDriftRule, LogitRule
from equipoise.types import Detector

Profile = Literal["relative", "absolute"]


def rules_of(profile: Profile, baselines: Mapping[str, Baseline] | None = None) -> tuple[Detector, ...]:
    """The rules of a profile. baselines: by layer, for those that compare. Raises ValueError for another name."""
    known = dict(baselines or {})
    if profile == "relative":
        return (CollapseDetector(), DropRule(), LogitRule(baselines=known), LoadDriftRule(known))
    if profile == "absolute":
        return (AbsoluteRule(baselines=known), DropRule(false_alarms=None, min_dropped=1))
    raise ValueError(f"profile: expected relative or absolute, got {profile!r}")
