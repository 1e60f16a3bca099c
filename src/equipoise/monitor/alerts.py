"""The alert book: which findings last long enough to be alerts, and when an alert is over.

A state machine over flushes. It doesn't judge statistics (detectors.py) and sends nothing (the sinks do).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from equipoise.types import Alert, Finding

INHIBITING_RULE = "collapse"  # while a layer has this finding, its other findings are symptoms of it
STATE_VERSION = 1


@dataclass
class _Entry:
    """One key's memory. hits, clean: consecutive flushes with and without the finding."""

    finding: Finding
    since_step: int
    step: int
    hits: int = 0
    clean: int = 0
    firing: bool = False


class AlertBook:
    """Turns the findings of each flush into alerts that fire once and resolve once.

    An alert's key is "layer:rule": it stays one alert while the expert in question moves. It fires after `fire_after`
    flushes in a row with the finding and resolves after `resolve_after` in a row without. While a layer has a
    "collapse" (found now, or firing), its other findings stand still: one page, not 256.
    Raises ValueError if a number of flushes is below 1.
    """

    def __init__(self, *, fire_after: int = 2, resolve_after: int = 2) -> None:
        for name, value in (("fire_after", fire_after), ("resolve_after", resolve_after)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1 flush, got {value}")
        self.fire_after = fire_after
        self.resolve_after = resolve_after
        self._entries: dict[str, _Entry] = {}

    @property
    def firing(self) -> list[Alert]:
        """The alerts that are firing, oldest first, each with its latest finding."""
        entries = sorted(self._entries.items(), key=lambda item: item[1].since_step)
        return [_alert(key, entry) for key, entry in entries if entry.firing]

    def observe(self, step: int, findings: Sequence[Finding], *, unjudged: Collection[str] = ()) -> list[Alert]:
        """Take the findings of one flush; return the alerts that fired or were resolved by it, and only those.

        unjudged: layers with too few tokens for an opinion; their alerts stay as they are. A silent layer is not a
        healthy one.
        """
        found: dict[str, Finding] = {}
        for finding in findings:
            found.setdefault(alert_key(finding), finding)  # the first of a key counts
        frozen = self._inhibited_layers(found)
        changed: list[Alert] = []
        for key in list({**found, **self._entries}):
            layer, rule = _layer_rule(key, found, self._entries)
            if layer in unjudged or (layer in frozen and rule != INHIBITING_RULE):
                continue
            changed += self._hit(key, step, found[key]) if key in found else self._miss(key, step)
        return changed

    def state_dict(self) -> dict[str, Any]:
        """The book as plain JSON-able data, so that a resumed run keeps its alerts."""
        return {"version": STATE_VERSION, "entries": {key: asdict(entry) for key, entry in self._entries.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises ValueError if it is something else, and leaves the book as it was.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"alert state: expected version {STATE_VERSION}, got {state.get('version')!r}; "
                "start with a new AlertBook, alerts that still hold will fire again"
            )
        try:
            self._entries = {
                key: _Entry(**{**entry, "finding": Finding(**entry["finding"])})
                for key, entry in state["entries"].items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"alert state: expected what state_dict() returned, got damaged entries ({error}); "
                "start with a new AlertBook"
            ) from error

    def _inhibited_layers(self, found: Mapping[str, Finding]) -> set[str]:
        now = {finding.layer for finding in found.values() if finding.rule == INHIBITING_RULE}
        firing = {e.finding.layer for e in self._entries.values() if e.firing and e.finding.rule == INHIBITING_RULE}
        return now | firing

    def _hit(self, key: str, step: int, finding: Finding) -> list[Alert]:
        entry = self._entries.setdefault(key, _Entry(finding, since_step=step, step=step))
        entry.finding, entry.step = finding, step
        entry.hits, entry.clean = entry.hits + 1, 0
        if entry.firing or entry.hits < self.fire_after:
            return []
        entry.firing = True
        return [_alert(key, entry)]

    def _miss(self, key: str, step: int) -> list[Alert]:
        entry = self._entries[key]
        entry.hits, entry.clean = 0, entry.clean + 1
        if entry.firing and entry.clean < self.resolve_after:
            return []
        del self._entries[key]  # forgotten when resolved, or when it went away before it fired
        if not entry.firing:
            return []
        return [Alert(key, "resolved", entry.since_step, step, entry.finding)]


def still_firing(history: Iterable[Alert]) -> list[Alert]:
    """Of all changes of alerts, oldest first: those that fire at the end, each as it was when it fired."""
    firing: dict[str, Alert] = {}
    for alert in history:
        if alert.state == "resolved":
            firing.pop(alert.key, None)
        else:
            firing.setdefault(alert.key, alert)
    return list(firing.values())


def alert_key(finding: Finding) -> str:
    """What names an alert across its life: "layer:rule"."""
    return f"{finding.layer}:{finding.rule}"


def _alert(key: str, entry: _Entry) -> Alert:
    return Alert(key, "firing", entry.since_step, entry.step, entry.finding)


def _layer_rule(key: str, found: Mapping[str, Finding], entries: Mapping[str, _Entry]) -> tuple[str, str]:
    finding = found[key] if key in found else entries[key].finding
    return finding.layer, finding.rule
