"""Alerts to Prometheus' Alertmanager: POST /api/v2/alerts.

Source: github.com/prometheus/alertmanager/blob/main/api/v2/openapi.yaml and prometheus.io/docs/alerting/latest/clients.
Alertmanager wants alerts that hold sent again and again: each post says that they end in four times `resend_s`, so an
alert of a process that was killed ends by itself. The "version 4" payload is what Alertmanager sends: see webhook.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from equipoise.monitor.sinks.delivery import Delivery, Effort
from equipoise.monitor.sinks.destination import Destination, check_url
from equipoise.monitor.sinks.labels import Naming, Standing, Standings, fingerprint
from equipoise.monitor.sinks.plain import rfc3339
from equipoise.types import Action, Alert, RoutingStats

HOLD = 4  # Prometheus, too, lets an alert end after four times the pause between two posts


@dataclass(frozen=True)
class Alertmanager:
    """One Alertmanager; of a cluster, give each member a sink of its own. url: its base, such as http://host:9093.

    token_env: variable with a bearer token. resend_s: pause between two posts of what fires. generator_url: a page
    about the run, linked in notifications. Raises ValueError for what cannot work.
    """

    url: str
    naming: Naming
    token_env: str | None = None
    resend_s: float = 60.0
    generator_url: str = ""
    effort: Effort = field(default_factory=Effort)

    def __post_init__(self) -> None:
        if not self.resend_s > 0:
            raise ValueError(f"resend_s: expected a time above 0 seconds, got {self.resend_s}")
        if self.generator_url:
            check_url("generator_url", self.generator_url)

    @property
    def destination(self) -> Destination:
        """The endpoint."""
        url = f"{self.url.rstrip('/')}/api/v2/alerts"
        return Destination(f"alertmanager {self.url}", url=url, token_env=self.token_env)

    def build(self) -> AlertmanagerSink:
        """The sink. Wrap it in a `Background`."""
        return AlertmanagerSink(self, Delivery(self.destination, self.effort))


class AlertmanagerSink:
    """Posts each change of an alert, repairs as an annotation of the alert that led to them, and again what fires.

    What fires is sent again by `tick` and by each window. After a restart, hand it the alerts that still fire
    (`Watch.alerts`) once: it remembers nothing. clock: seconds since 1970.
    """

    def __init__(self, config: Alertmanager, delivery: Delivery, *, clock: Callable[[], float] = time.time) -> None:
        self.delivery = delivery
        self._config = config
        self._clock = clock
        self._standings = Standings(config.naming)
        self._sent_at = clock()

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Windows are not sent; each is an occasion to send again what fires."""
        self.tick()

    def alert(self, alert: Alert) -> None:
        """Post one alert. Raises DeliveryError."""
        standing = self._standings.take(alert, self._clock())
        self.delivery.send([self._postable(standing)], key=fingerprint(standing.labels))

    def action(self, action: Action) -> None:
        """Post the alert that led to it again, with its repairs among the annotations. Raises DeliveryError."""
        standing = self._standings.note(action)
        if standing is not None:
            self.delivery.send([self._postable(standing)], keep=False)

    def tick(self) -> None:
        """Post what fires again if it is time. Not kept when it fails: the next one says the same."""
        if self._standings.firing and self._clock() - self._sent_at >= self._config.resend_s:
            self._sent_at = self._clock()
            self.delivery.send([self._postable(standing) for standing in self._standings.firing], keep=False)

    def spill(self) -> None:
        """See `Delivery.spill`."""
        self.delivery.spill()

    def close(self) -> None:
        """Close the connections. What fires ends at Alertmanager within four times `resend_s`."""
        self.delivery.close()

    def _postable(self, standing: Standing) -> Mapping[str, Any]:
        ends_at = self._clock() + HOLD * self._config.resend_s if standing.ends_at is None else standing.ends_at
        link = {"generatorURL": self._config.generator_url} if self._config.generator_url else {}
        return {
            "labels": standing.labels,
            "annotations": standing.annotations,
            "startsAt": rfc3339(standing.starts_at),
            "endsAt": rfc3339(ends_at),
            **link,
        }
