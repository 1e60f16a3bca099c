"""What an alert is called outside: one name in the exported rules, in what sinks send, and at a server's admin port.

Each name has a section in docs/runbooks.md, at the anchor `anchor_of` gives.
"""

from __future__ import annotations

import re

from equipoise.types import Severity

PREFIX = "Equipoise"
_LOGITS: dict[str, str] = {"critical": "LogitBlowUp", "warning": "LogitStdDrift"}  # one rule, two things to do
_NAMES: dict[str, str] = {
    "collapse": "LayerCollapse",
    "dead_experts": "DeadExperts",
    "drops": "DropRate",
    "not_finite": "NotFinite",
    "diverged": "Diverged",
    "load_drift": "LoadDrift",
    "domain_shift": "DomainShift",
    "counters": "Counters",
    "expert_p99": "ExpertP99",
    "recovery_exhausted": "RecoveryExhausted",
    # of the profile "absolute"
    "utilisation_low": "UtilisationLow",
    "utilisation_high": "UtilisationHigh",
    "one_bin": "OneBin",
    "entropy": "EntropyLow",
    "entropy_target": "EntropyBelowTarget",
    "cold_expert": "ColdExpert",
    "hot_expert": "HotExpert",
    "logit_std": "LogitStd",
}
RULES: dict[str, str] = {
    **{PREFIX + name: rule for rule, name in _NAMES.items()},
    **{PREFIX + name: "logits" for name in _LOGITS.values()},
}
"""The monitor's rule by the alert's name."""


def alert_name(rule: str, severity: Severity | str = "critical") -> str:
    """Such as "EquipoiseLayerCollapse" for "collapse". A rule of your own gets a name of its words."""
    if rule == "logits":
        return PREFIX + _LOGITS.get(severity, _LOGITS["warning"])
    words = re.split(r"[^a-zA-Z0-9]+", rule)
    return PREFIX + (_NAMES.get(rule) or "".join(word[:1].upper() + word[1:] for word in words))


def anchor_of(name: str) -> str:
    """Of the alert's section in docs/runbooks.md."""
    return name.lower()
