"""An alert as Prometheus' Alertmanager sees one: labels that identify it, annotations that describe it, times.

Labels must not change while an alert lives, or the one that fired is never resolved: `Standing` keeps those it fired
with, while expert and severity of its latest finding may move. It sends nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import quote

from equipoise.monitor.alert_names import alert_name, anchor_of
from equipoise.monitor.incidents import PAGE, repairs, told
from equipoise.monitor.sinks.destination import check_url
from equipoise.monitor.sinks.plain import name_line, one_line
from equipoise.types import Action, Alert, Finding

LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")  # prometheus.io/docs/concepts/data_model
OURS = ("alertname", "rule", "layer", "severity", "run", "expert")
MAX_LABEL, MAX_TEXT = 256, 2000
MAX_OVER = 100  # alerts, the newest, that are remembered after their end
MAX_CHANGES = 40  # of repairs, the newest, that are remembered of one alert


@dataclass(frozen=True)
class Naming:
    """What is said of every alert of a run. run: its name. labels: more labels, such as a team's or a cluster's.

    runbook: address of a page on what to do; "" for none. In it "{alert}" stands for the alert's name in lower case,
    as the sections of docs/runbooks.md are called, and "{rule}" for the rule's.
    Raises ValueError for an empty run, a label that is ours or that Prometheus does not take, and a bad address.
    """

    run: str
    labels: Mapping[str, str] = field(default_factory=dict)
    runbook: str = ""

    def __post_init__(self) -> None:
        if not self.run.strip():
            raise ValueError(f"run: expected the run's name, got {self.run!r}; alerts of different runs need it")
        if self.runbook:
            check_url("runbook", self.runbook)
        for name in self.labels:
            if name in OURS or not LABEL_NAME.fullmatch(name):
                raise ValueError(
                    f"labels: expected names of letters, digits and _ other than {', '.join(OURS)}, got {name!r}"
                )

    def runbook_url(self, finding: Finding) -> str:
        """The page for one alert, or ""."""
        alert = anchor_of(alert_name(finding.rule, finding.severity))
        words = {"{rule}": finding.rule, "{alert}": alert}
        return re.sub(r"\{rule\}|\{alert\}", lambda m: quote(name_line(words[m[0]], MAX_LABEL), safe=""), self.runbook)


@dataclass(frozen=True)
class Standing:
    """An alert as it was sent. starts_at, ends_at: seconds since 1970; ends_at is None while it fires.

    changes: of the repairs made for it, oldest first. The annotation "action" tells of each repair, the newest first.
    """

    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    starts_at: float
    ends_at: float | None = None
    changes: tuple[Action, ...] = ()


class Standings:
    """The alerts that fire, by key, with the labels they fired with; and those just over: repairs end with them."""

    def __init__(self, naming: Naming) -> None:
        self._naming = naming
        self._firing: dict[str, Standing] = {}
        self._over: dict[str, Standing] = {}

    @property
    def firing(self) -> list[Standing]:
        """Those that fire, oldest first."""
        return list(self._firing.values())

    def take(self, alert: Alert, now: float) -> Standing:
        """The alert with the labels and the start it fired with; of one not seen before, with its own, from now on."""
        known = self._firing.get(alert.key) or Standing(labels_of(alert, self._naming), {}, now)
        standing = replace(known, annotations=annotations_of(alert, self._naming) | _action(known.changes))
        self._over.pop(alert.key, None)
        if alert.state == "resolved":
            self._firing.pop(alert.key, None)
            self._over[alert.key] = replace(standing, ends_at=max(now, known.starts_at))
            if len(self._over) > MAX_OVER:
                del self._over[next(iter(self._over))]
            return self._over[alert.key]
        self._firing[alert.key] = standing
        return standing

    def note(self, action: Action) -> Standing | None:
        """Say in the alert's annotations what was done about it; None if no alert that fires was the reason.

        A repair that is kept, or undone, because its alert is over changes that one. That a human is called is not
        said here: it is an alert, too.
        """
        place = self._firing
        if action.reason not in place and action.state in ("kept", "undone"):
            place = self._over
        known = place.get(action.reason)
        if known is None or action.kind == PAGE:
            return None
        changes = (*known.changes, action)[-MAX_CHANGES:]
        place[action.reason] = replace(known, annotations={**known.annotations, **_action(changes)}, changes=changes)
        return place[action.reason]


def _action(changes: Sequence[Action]) -> dict[str, str]:
    """The annotation about repairs."""
    lines = [told(repair) for repair in reversed(repairs(changes))]
    return {"action": one_line("; ".join(lines), MAX_TEXT)} if lines else {}


def labels_of(alert: Alert, naming: Naming) -> dict[str, str]:
    """Labels: alertname, rule, layer, severity, run, expert (where it is about one), and the naming's."""
    finding = alert.finding
    ours = {
        "alertname": alert_name(finding.rule, finding.severity),
        "rule": finding.rule,
        "layer": finding.layer,
        "severity": finding.severity,
        "run": naming.run,
    }
    if finding.expert is not None:
        ours["expert"] = str(finding.expert)
    labels = {**naming.labels, **ours}
    return {name: name_line(value, MAX_LABEL) for name, value in labels.items() if value}  # an empty one is no label


def annotations_of(alert: Alert, naming: Naming) -> dict[str, str]:
    """Annotations: summary, description, remedy, value, threshold, since_step, step; runbook_url if there is one."""
    finding = alert.finding
    texts = {
        "summary": summary(alert, naming.run),
        "description": finding.message,
        "remedy": finding.remedy,
        "value": f"{finding.value:g}",
        "threshold": f"{finding.threshold:g}",
        "since_step": str(alert.since_step),
        "step": str(alert.step),
        "runbook_url": naming.runbook_url(finding),
    }
    return {name: one_line(text, MAX_TEXT) for name, text in texts.items() if text}


def summary(alert: Alert, run: str) -> str:
    """One line: "run: rule in layer, expert n"."""
    finding = alert.finding
    expert = "" if finding.expert is None else f", expert {finding.expert}"
    return one_line(f"{run}: {finding.rule} in {finding.layer}{expert}", MAX_TEXT)


def fingerprint(labels: Mapping[str, str]) -> str:
    """The 64-bit FNV-1a hash of the sorted labels, 16 hex digits (prometheus/common:model/signature.go)."""
    value = 0xCBF29CE484222325
    for name in sorted(labels):
        for byte in name.encode() + b"\xff" + labels[name].encode() + b"\xff":
            value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"
