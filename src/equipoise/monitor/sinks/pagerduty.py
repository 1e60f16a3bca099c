"""Alerts to PagerDuty: Events API v2 with trigger, acknowledge and resolve.

Source: developer.pagerduty.com/docs/events-api-v2-overview, PagerDuty/api-schema:reference/events-v2/openapiv3.json.
It pages by what it is given: which alerts deserve to wake somebody is decided in PagerDuty's rules, by severity.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from equipoise.monitor.alert_names import alert_name
from equipoise.monitor.incidents import PAGE, repairs, told
from equipoise.monitor.sinks.delivery import Delivery, Effort
from equipoise.monitor.sinks.destination import Destination
from equipoise.monitor.sinks.labels import MAX_CHANGES, MAX_LABEL, MAX_TEXT, Naming
from equipoise.monitor.sinks.plain import name_line, one_line, rfc3339
from equipoise.types import Action, Alert, RoutingStats

ENQUEUE = (
    "https://events.pagerduty.com/v2/enqueue"  # of the service region EU: https://events.eu.pagerduty.com/v2/enqueue
)
MAX_SUMMARY, MAX_DEDUP_KEY = 1024, 255  # characters


@dataclass(frozen=True)
class PagerDuty:
    """One service. routing_key_env: the variable with the integration key of its "Events API v2" integration.

    source: what is affected; as a default this host's name. acknowledge_repairs: acknowledge an alert when a repair
    is applied because of it. That stops PagerDuty from waking the next person, so it is off unless asked for. When a
    repair is undone the alert stays acknowledged; when none is left, that is an alert of its own, which nobody has
    acknowledged.
    Raises ValueError for what cannot work.
    """

    naming: Naming
    routing_key_env: str = "PAGERDUTY_ROUTING_KEY"
    url: str = ENQUEUE
    source: str = ""
    acknowledge_repairs: bool = False
    effort: Effort = field(default_factory=Effort)

    @property
    def destination(self) -> Destination:
        """The endpoint."""
        secrets = {"routing_key": self.routing_key_env}
        return Destination(f"pagerduty {self.routing_key_env}", url=self.url, body_secrets=secrets)

    def build(self) -> PagerDutySink:
        """The sink. Wrap it in a `Background`."""
        return PagerDutySink(self, Delivery(self.destination, self.effort))


class PagerDutySink:
    """Triggers an alert when it fires and resolves it when it is over, by the same key. clock: seconds since 1970.

    What is done about an alert that fires is told by triggers with its key: PagerDuty adds them to the log of the open
    alert and wakes nobody. After a restart, hand it the alerts that still fire (`Watch.alerts`) once: it remembers
    nothing, and an alert that it does not know to fire is not triggered for the sake of a repair.
    """

    def __init__(self, config: PagerDuty, delivery: Delivery, *, clock: Callable[[], float] = time.time) -> None:
        self.delivery = delivery
        self._config = config
        self._clock = clock
        self._firing: dict[str, tuple[Alert, tuple[Action, ...]]] = {}  # with the changes of its repairs

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Windows are not sent."""

    def alert(self, alert: Alert) -> None:
        """Trigger or resolve. Raises DeliveryError."""
        if alert.state == "resolved":
            self._firing.pop(alert.key, None)
            self._send("resolve", alert.key)
        else:
            self._firing[alert.key] = (alert, self._firing.get(alert.key, (alert, ()))[1])
            self._trigger(alert.key)

    def action(self, action: Action) -> None:
        """Tell what was done about its alert; acknowledge that, if a repair was applied and the configuration asks.

        Raises DeliveryError.
        """
        if action.kind == PAGE:  # an alert of its own says so
            return
        if action.reason in self._firing:
            alert, changes = self._firing[action.reason]
            self._firing[action.reason] = (alert, (*changes, action)[-MAX_CHANGES:])
            self._trigger(action.reason)
        if self._config.acknowledge_repairs and action.state == "applied":
            self.acknowledge(action.reason)

    def acknowledge(self, alert_key: str) -> None:
        """Say that somebody is at it. alert_key: `Alert.key`. Raises DeliveryError."""
        self._send("acknowledge", alert_key)

    def spill(self) -> None:
        """See `Delivery.spill`."""
        self.delivery.spill()

    def close(self) -> None:
        """Close the connections."""
        self.delivery.close()

    def _trigger(self, alert_key: str) -> None:
        alert, changes = self._firing[alert_key]
        self._send("trigger", alert_key, **trigger(alert, self._config, self._clock(), changes))

    def _send(self, event: str, alert_key: str, **more: Any) -> None:
        key = dedup_key(self._config.naming.run, alert_key)
        self.delivery.send({"event_action": event, "dedup_key": key, **more}, key=key)


def dedup_key(run: str, alert_key: str) -> str:
    """What ties trigger, acknowledge and resolve together: "run:layer:rule", the same in every process of the run.

    Different pairs give different keys: a ":" in the run is escaped, and in a key that is too long a hash stands for
    the end.
    """
    return name_line(f"{run.replace('%', '%25').replace(':', '%3A')}:{alert_key}", MAX_DEDUP_KEY)


def trigger(alert: Alert, config: PagerDuty, now: float, changes: Sequence[Action] = ()) -> Mapping[str, Any]:
    """The fields of a trigger event beside its key. changes: of the repairs made for the alert, oldest first."""
    finding, naming = alert.finding, config.naming
    runbook = naming.runbook_url(finding)
    details = {
        "alert": name_line(alert_name(finding.rule, finding.severity), MAX_LABEL),
        "layer": finding.layer,
        "expert": "-" if finding.expert is None else str(finding.expert),
        "value": finding.value,
        "threshold": finding.threshold,
        "since_step": alert.since_step,
        "step": alert.step,
        "remedy": one_line(finding.remedy, MAX_TEXT),
        **naming.labels,
    }
    if changes:
        details["repairs"] = [one_line(told(repair), MAX_TEXT) for repair in repairs(changes)]
    return {
        "client": "equipoise",
        "links": [{"href": runbook, "text": "runbook"}] if runbook else [],
        "payload": {
            "summary": one_line(f"{naming.run}: {finding.message}", MAX_SUMMARY),
            "source": config.source or socket.gethostname(),
            "severity": finding.severity,  # info, warning and critical are PagerDuty's words, too
            "timestamp": rfc3339(now),
            "component": name_line(finding.layer, MAX_LABEL),
            "group": name_line(naming.run, MAX_LABEL),
            "class": name_line(finding.rule, MAX_LABEL),
            "custom_details": details,
        },
    }
