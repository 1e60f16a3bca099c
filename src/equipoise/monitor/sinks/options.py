"""Where the alerts and repairs of a run or a server go, as options of the command line, and their sinks meanwhile.

Each sink is behind a bounded queue and a thread of its own, so that none holds up a step; what could not be delivered
over HTTP is kept in the run folder. Secrets are read from environment variables and are never options.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from equipoise.monitor.sinks.alertmanager import Alertmanager
from equipoise.monitor.sinks.background import Background
from equipoise.monitor.sinks.delivery import Effort
from equipoise.monitor.sinks.jsonl import JsonLines
from equipoise.monitor.sinks.labels import Naming
from equipoise.monitor.sinks.pagerduty import ENQUEUE, PagerDuty
from equipoise.monitor.sinks.session import otlp, wandb
from equipoise.monitor.sinks.slack import Slack
from equipoise.monitor.sinks.tensorboard import TensorBoard
from equipoise.monitor.sinks.webhook import Webhook
from equipoise.types import Sink

DEAD_LETTERS = "dead_letters.jsonl"
SLACK_BURST = 3  # Slack takes about one message per second
CLOSE_S = 5.0  # for all sinks together, at the end


@dataclass(frozen=True, kw_only=True)
class Alerts:
    """Where alerts and repairs go, beside the run folder. They are no part of a run: name them again with --resume.

    Raises ValueError for an option that needs another one.
    """

    slack: bool = False
    """To the Slack channel of the incoming webhook in SLACK_WEBHOOK_URL."""
    pagerduty: bool = False
    """To PagerDuty, with the integration key in PAGERDUTY_ROUTING_KEY."""
    pagerduty_url: str = ENQUEUE
    """PagerDuty's address, for another service region."""
    alertmanager: str | None = None
    """Address of Prometheus' Alertmanager, such as http://localhost:9093."""
    alertmanager_token_env: str | None = None
    """Name of the environment variable with a bearer token for it."""
    webhook: str | None = None
    """Address that gets each alert as Alertmanager's webhooks send it."""
    webhook_url_env: str | None = None
    """Name of the environment variable with that address, if it is a secret."""
    webhook_token_env: str | None = None
    """Name of the environment variable with a bearer token for it."""
    jsonl: Path | None = None
    """File for all alerts, repairs and routing statistics, a JSON object per line."""
    tensorboard: Path | None = None
    """Folder for TensorBoard's event files."""
    otel: bool = False
    """To an OpenTelemetry collector over OTLP; OTEL_EXPORTER_OTLP_ENDPOINT names it, and its like the rest."""
    wandb: bool = False
    """To Weights & Biases; WANDB_API_KEY, WANDB_PROJECT and their like say who and where."""
    run: str | None = None
    """Name of the run in every message. Default: that of its folder, or of the model that is served."""

    def __post_init__(self) -> None:
        if self.alertmanager_token_env is not None and self.alertmanager is None:
            raise ValueError("alerts.alertmanager_token_env: expected an address in alerts.alertmanager too, got none")
        if self.webhook_token_env is not None and self.webhook is None and self.webhook_url_env is None:
            raise ValueError(
                "alerts.webhook_token_env: expected an address in alerts.webhook or alerts.webhook_url_env too, "
                "got none"
            )

    def sinks(self, out: Path, name: str = "") -> Mapping[str, Sink]:
        """Those that are asked for by option, without their queues. out: the run folder. name: "" for its name.

        Raises ValueError for an address that is none, a secret that is not set and a library that is not installed.
        Nothing is sent.
        """
        try:
            return self._sinks(self.run or name or out.resolve().name, out)
        except ImportError as error:
            raise ValueError(f"alerts: {error}") from error

    def _sinks(self, run: str, out: Path) -> dict[str, Sink]:
        naming, effort = Naming(run), Effort(dead_letters=out / DEAD_LETTERS)
        found: dict[str, Sink] = {}
        if self.slack:
            found["slack"] = Slack(naming, effort=replace(effort, burst=SLACK_BURST)).build()
        if self.pagerduty:
            found["pagerduty"] = PagerDuty(naming, url=self.pagerduty_url, effort=effort).build()
        if self.alertmanager is not None:
            token = self.alertmanager_token_env
            found["alertmanager"] = Alertmanager(self.alertmanager, naming, token_env=token, effort=effort).build()
        if self.webhook is not None or self.webhook_url_env is not None:
            urls, token = (self.webhook, self.webhook_url_env), self.webhook_token_env
            found["webhook"] = Webhook(naming, *urls, token_env=token, effort=effort).build()
        if self.jsonl is not None:
            found["jsonl"] = JsonLines(self.jsonl)
        if self.tensorboard is not None:
            found["tensorboard"] = TensorBoard(self.tensorboard)
        if self.otel:
            found["otel"] = otlp(run)
        if self.wandb:
            found["wandb"] = wandb(run, out)
        return found


NOWHERE = Alerts()


@contextmanager
def delivering(
    alerts: Alerts, out: Path, say: Callable[[str], object], name: str = ""
) -> Iterator[Sequence[Background]]:
    """The sinks, each behind its queue. At the end all have `CLOSE_S` seconds; what is not delivered is said.

    out, name: see `Alerts.sinks`, which raises what this does.
    """
    queues = [Background(sink, name=option) for option, sink in alerts.sinks(out, name).items()]
    try:
        yield queues
    finally:
        deadline = time.monotonic() + CLOSE_S
        for queue in queues:
            in_time = queue.close(max(0.0, deadline - time.monotonic()))
            state = queue.state
            if state.errors or not in_time or any(state.dropped.values()):
                lost = sum(state.dropped.values())
                why = f"; the last error: {state.last_error}" if state.last_error else ""
                say(f"alerts: {state.handled} records taken, {state.errors} failed, {lost} dropped{why}")
