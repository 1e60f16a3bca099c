"""Alerts and repairs to a Slack channel, through an incoming webhook.

Source: docs.slack.dev/messaging/sending-messages-using-incoming-webhooks, /reference/block-kit/blocks, and for what is
escaped /messaging/formatting-message-text. The webhook's address is a secret. Windows are not sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from equipoise.monitor.incidents import PAGE, effect_text, other_numbers, state_text, target
from equipoise.monitor.sinks.delivery import Delivery, Effort
from equipoise.monitor.sinks.destination import Destination
from equipoise.monitor.sinks.labels import Naming, summary
from equipoise.monitor.sinks.on_trial import OnTrial
from equipoise.monitor.sinks.plain import one_line
from equipoise.types import Action, Alert, RoutingStats

RED, AMBER, BLUE, GREEN, GREY = "#d32f2f", "#f9a825", "#1976d2", "#2e7d32", "#757575"
COLOURS = {"critical": RED, "warning": AMBER, "info": BLUE}
OF_REPAIRS = {"proposed": GREY, "applied": BLUE, "kept": GREEN, "undone": AMBER, "failed": AMBER}
MAX_HEADER, MAX_SECTION, MAX_FIELD, MAX_LINE = 150, 3000, 2000, 300  # characters; the last is ours
_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}  # these three and no others


@dataclass(frozen=True)
class Slack:
    """One channel. url_env: the variable with the webhook's address. actions: post each change of a repair, too.

    Raises ValueError for what cannot work.
    """

    naming: Naming
    url_env: str = "SLACK_WEBHOOK_URL"
    actions: bool = True
    effort: Effort = field(default_factory=lambda: Effort(burst=3))  # Slack takes about one message per second

    @property
    def destination(self) -> Destination:
        """The endpoint."""
        return Destination(f"slack {self.url_env}", url_env=self.url_env)

    def build(self) -> SlackSink:
        """The sink. Wrap it in a `Background`."""
        return SlackSink(self, Delivery(self.destination, self.effort))


class SlackSink:
    """Posts a message when an alert fires, when it is over, and at each change of a repair."""

    def __init__(self, config: Slack, delivery: Delivery) -> None:
        self.delivery = delivery
        self._config = config
        self._on_trial = OnTrial()

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Windows are not sent."""

    def alert(self, alert: Alert) -> None:
        """Post one change. Raises DeliveryError."""
        self.delivery.send(alert_message(alert, self._config.naming))

    def action(self, action: Action) -> None:
        """Post one change of a repair. That a human is called is told by its alert. Raises DeliveryError."""
        if self._config.actions and action.kind != PAGE:
            self.delivery.send(action_message(self._on_trial.take(action), self._config.naming.run))

    def spill(self) -> None:
        """See `Delivery.spill`."""
        self.delivery.spill()

    def close(self) -> None:
        """Close the connections."""
        self.delivery.close()


def alert_message(alert: Alert, naming: Naming) -> Mapping[str, Any]:
    """The message for one change of an alert: red, amber or blue by severity, green when it is over."""
    finding = alert.finding
    over = alert.state == "resolved"
    word = "Resolved" if over else finding.severity.capitalize()
    title = f"{word}: {summary(alert, naming.run)}"
    facts = {
        "Layer": finding.layer,
        "Expert": "all" if finding.expert is None else str(finding.expert),
        "Value": f"{finding.value:.4g} (limit {finding.threshold:.4g})",
        "Steps": f"since {alert.since_step}, now {alert.step}",
    }
    blocks = [_header(title), _section(finding.message), _fields(facts)]
    if not over:
        blocks.append(_section(f"What to do: {finding.remedy}"))
    runbook = naming.runbook_url(finding)
    if runbook:
        link = f"<{_link(runbook)}|Runbook>"
        blocks.append({"type": "context", "elements": [{"type": "mrkdwn", "text": link}]})
    return _message(title, GREEN if over else COLOURS[finding.severity], blocks)


def action_message(action: Action, run: str) -> Mapping[str, Any]:
    """The message for one change of a repair: its state, what it did, and why."""
    title = f"Repair {action.state}: {run}: {action.kind} on {target(action)}"
    facts = {
        "State": state_text(action),
        "Step": str(action.step),
        "Because of": action.reason,
        "Effect": effect_text(action.detail),
        "Numbers": other_numbers(action.detail),
    }
    blocks = [_header(title), _fields({name: text for name, text in facts.items() if text})]
    if action.note:
        blocks.append(_section(action.note))
    return _message(title, OF_REPAIRS[action.state], blocks)


def _message(title: str, colour: str, blocks: list[dict[str, Any]]) -> Mapping[str, Any]:
    """With a coloured bar. The text is what a notification shows; names in it are not to be formatted."""
    text = _escape(title, MAX_LINE)
    return {"text": text, "mrkdwn": False, "attachments": [{"color": colour, "fallback": text, "blocks": blocks}]}


def _header(text: str) -> dict[str, Any]:
    return {"type": "header", "text": _plain(text, MAX_HEADER)}


def _section(text: str) -> dict[str, Any]:
    return {"type": "section", "text": _plain(text, MAX_SECTION)}


def _fields(facts: Mapping[str, str]) -> dict[str, Any]:
    pairs = [(_escape(name, MAX_HEADER), _escape(value, MAX_FIELD - MAX_HEADER - 1)) for name, value in facts.items()]
    return {"type": "section", "fields": [_text(f"{name}\n{value}") for name, value in pairs]}


def _plain(text: str, limit: int) -> dict[str, Any]:
    return _text(_escape(text, limit))


def _text(escaped: str) -> dict[str, Any]:
    """A text object without formatting and emoji codes."""
    return {"type": "plain_text", "text": escaped, "emoji": False}


def _escape(text: str, limit: int) -> str:
    """One line in which nothing is a mention or a link, at most `limit` characters with its escapes, and not empty."""
    escaped = [_ESCAPES.get(char, char) for char in one_line(text, limit)]
    if sum(map(len, escaped)) > limit:
        while sum(map(len, escaped)) > limit - 1:
            del escaped[-max(1, (sum(map(len, escaped)) - limit) // 5) :]
        escaped.append("…")
    line = "".join(escaped)
    return line if line.strip() else "-"


def _link(url: str) -> str:
    """An address that can't end its own link: < > | and spaces are percent-encoded, & is escaped."""
    return quote(url, safe="/:?#[]@!$&'()*+,;=%~-._").replace("&", "&amp;")
