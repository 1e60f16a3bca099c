"""Routing as OpenTelemetry metrics, alerts and repairs as OpenTelemetry events (log records with a name).

Names begin with "moe."; OpenTelemetry has no convention for experts. The caller brings the providers, and with them
exporters, intervals and views: nothing global is read or set. Needs the API (`equipoise[otel]`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from equipoise.monitor.sinks.layer_numbers import NUMBERS, layer_numbers
from equipoise.monitor.sinks.plain import name_line, one_line
from equipoise.types import Action, Alert, RoutingStats

if TYPE_CHECKING:
    from opentelemetry._logs import LoggerProvider
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.util.types import AttributeValue

SCOPE = "equipoise.monitor"
MAX_NAME, MAX_TEXT = 256, 2000


class OpenTelemetry:
    """Gauges per layer, counters of tokens and lost assignments, a gauge of alerts that fire, events.

    Metrics, all with the attributes moe.run and moe.layer: moe.routing.NUMBER for each of `NUMBERS`, moe.routing.loss
    (moe.loss), counters moe.routing.tokens, moe.routing.dropped and .rerouted (moe.reason), moe.repairs (moe.kind and
    moe.repair.state: each change counts once), and moe.alert.firing (moe.rule), which is 1 or 0. Events: moe.alert and
    moe.repair, given a `logger_provider`.
    Raises ImportError where opentelemetry-api is missing.
    """

    def __init__(
        self, meter_provider: MeterProvider, *, run: str, logger_provider: LoggerProvider | None = None
    ) -> None:
        try:
            from opentelemetry._logs import SeverityNumber
        except ImportError as error:
            raise ImportError(
                "OpenTelemetry needs the package opentelemetry-api, which is not installed; "
                "pip install 'equipoise[otel]'"
            ) from error
        meter = meter_provider.get_meter(SCOPE)
        self._gauges = {
            name: meter.create_gauge(f"moe.routing.{name}", unit=unit, description=text)
            for name, (unit, text) in NUMBERS.items()
        }
        self._loss = meter.create_gauge("moe.routing.loss", description="Balancing loss before its coefficient")
        self._tokens = meter.create_counter("moe.routing.tokens", unit="{token}", description="Tokens routed")
        self._lost = {
            kind: meter.create_counter(f"moe.routing.{kind}", unit="{assignment}", description=f"Assignments {kind}")
            for kind in ("dropped", "rerouted")
        }
        self._firing = meter.create_gauge("moe.alert.firing", description="1 while the alert fires")
        self._repairs = meter.create_counter("moe.repairs", unit="{repair}", description="Changes of repairs, by state")
        self._logger = None if logger_provider is None else logger_provider.get_logger(SCOPE)
        self._severity = {
            "info": SeverityNumber.INFO,
            "warning": SeverityNumber.WARN,
            "critical": SeverityNumber.ERROR,
        }
        self._run = name_line(run, MAX_NAME)

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Set the gauges and raise the counters."""
        for stats in window:
            about = self._about(stats.layer)
            numbers = layer_numbers(stats)
            for name, gauge in self._gauges.items():
                gauge.set(numbers[name], about)
            for loss, value in stats.losses.items():
                self._loss.set(value, {**about, "moe.loss": loss})
            self._tokens.add(stats.num_tokens, about)
            for kind, counts in (("dropped", stats.dropped), ("rerouted", stats.rerouted)):
                for reason, count in counts.items():
                    self._lost[kind].add(int(count), {**about, "moe.reason": reason})

    def alert(self, alert: Alert) -> None:
        """Set the alert's gauge and emit an event."""
        finding = alert.finding
        about = {**self._about(finding.layer), "moe.rule": name_line(finding.rule, MAX_NAME)}
        self._firing.set(int(alert.state == "firing"), about)
        if self._logger is not None:
            expert: dict[str, AttributeValue] = {} if finding.expert is None else {"moe.expert": finding.expert}
            self._logger.emit(
                event_name="moe.alert",
                severity_number=self._severity["info" if alert.state == "resolved" else finding.severity],
                body=one_line(finding.message, MAX_TEXT),
                attributes={
                    **about,
                    **expert,
                    "moe.alert.state": alert.state,
                    "moe.alert.severity": finding.severity,
                    "moe.alert.value": float(finding.value),
                    "moe.alert.threshold": float(finding.threshold),
                    "moe.alert.remedy": one_line(finding.remedy, MAX_TEXT),
                    "moe.step": alert.step,
                },
            )

    def action(self, action: Action) -> None:
        """Count the change of the repair and emit an event; one that is undone or fails is a warning."""
        about = {**self._about(action.layer), "moe.kind": name_line(action.kind, MAX_NAME)}
        about["moe.repair.state"] = action.state
        self._repairs.add(1, about)
        if self._logger is not None:
            numbers = {f"moe.repair.{name}": float(value) for name, value in action.detail.items()}
            note = f" ({action.note})" if action.note else ""
            self._logger.emit(
                event_name="moe.repair",
                severity_number=self._severity["warning" if action.state in ("undone", "failed") else "info"],
                body=one_line(f"{action.kind} {action.state} because of {action.reason}{note}", MAX_TEXT),
                attributes={
                    **numbers,
                    **about,
                    "moe.repair.note": one_line(action.note, MAX_TEXT),
                    "moe.alert.key": action.reason,
                    "moe.step": action.step,
                },
            )

    def _about(self, layer: str) -> dict[str, AttributeValue]:
        return {"moe.run": self._run, "moe.layer": name_line(layer, MAX_NAME)}
