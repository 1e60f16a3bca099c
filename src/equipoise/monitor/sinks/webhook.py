"""Alerts to any HTTP endpoint, in the shape that Alertmanager's webhooks have ("version 4"), so that receivers exist.

Source: prometheus.io/docs/alerting/latest/configuration/#webhook_config. One alert per message; each change of a
repair sends the alert that led to it again, with an annotation. Windows are not sent.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from equipoise.monitor.sinks.delivery import Delivery, Effort
from equipoise.monitor.sinks.destination import Destination, check_url
from equipoise.monitor.sinks.labels import Naming, Standing, Standings, fingerprint
from equipoise.monitor.sinks.plain import rfc3339
from equipoise.types import Action, Alert, RoutingStats

GROUP_BY = ("alertname", "layer", "run")
NOT_ENDED = "0001-01-01T00:00:00Z"  # Go's zero time, which receivers expect for an alert that fires


@dataclass(frozen=True)
class Webhook:
    """One endpoint. url, or url_env if the URL is a secret; token_env: variable with a bearer token.

    receiver: the name that the payload has for it. external_url: a page about the run.
    Raises ValueError for what cannot work.
    """

    naming: Naming
    url: str | None = None
    url_env: str | None = None
    token_env: str | None = None
    receiver: str = "equipoise"
    external_url: str = ""
    effort: Effort = field(default_factory=Effort)

    def __post_init__(self) -> None:
        if self.external_url:
            check_url("external_url", self.external_url)

    @property
    def destination(self) -> Destination:
        """The endpoint."""
        name = f"webhook {self.url_env if self.url is None else self.url}"
        return Destination(name, url=self.url, url_env=self.url_env, token_env=self.token_env)

    def build(self) -> WebhookSink:
        """The sink. Wrap it in a `Background`."""
        return WebhookSink(self, Delivery(self.destination, self.effort))


class WebhookSink:
    """Posts each change of an alert, and again at each change of its repairs. clock: seconds since 1970."""

    def __init__(self, config: Webhook, delivery: Delivery, *, clock: Callable[[], float] = time.time) -> None:
        self.delivery = delivery
        self._config = config
        self._clock = clock
        self._standings = Standings(config.naming)

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Windows are not sent."""

    def alert(self, alert: Alert) -> None:
        """Post one change. Raises DeliveryError."""
        self._send(self._standings.take(alert, self._clock()))

    def action(self, action: Action) -> None:
        """Post the alert that led to it again, with its repairs among the annotations. Raises DeliveryError."""
        standing = self._standings.note(action)
        if standing is not None:
            self._send(standing)

    def spill(self) -> None:
        """See `Delivery.spill`."""
        self.delivery.spill()

    def close(self) -> None:
        """Close the connections."""
        self.delivery.close()

    def _send(self, standing: Standing) -> None:
        self.delivery.send(payload(standing, self._config), key=fingerprint(standing.labels))


def payload(standing: Standing, config: Webhook) -> Mapping[str, Any]:
    """The version 4 payload with one alert in it."""
    status = "firing" if standing.ends_at is None else "resolved"
    group = {name: standing.labels[name] for name in GROUP_BY if name in standing.labels}
    pairs = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in group.items())
    alert = {
        "status": status,
        "labels": standing.labels,
        "annotations": standing.annotations,
        "startsAt": rfc3339(standing.starts_at),
        "endsAt": NOT_ENDED if standing.ends_at is None else rfc3339(standing.ends_at),
        "generatorURL": config.external_url,
        "fingerprint": fingerprint(standing.labels),
    }
    return {
        "version": "4",
        "groupKey": f"{{}}:{{{pairs}}}",
        "truncatedAlerts": 0,
        "status": status,
        "receiver": config.receiver,
        "groupLabels": group,
        "commonLabels": standing.labels,
        "commonAnnotations": standing.annotations,
        "externalURL": config.external_url,
        "alerts": [alert],
    }
