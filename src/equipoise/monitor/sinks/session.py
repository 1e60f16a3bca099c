"""Sinks with a session of their own: an OpenTelemetry pipeline over OTLP, a run of Weights & Biases.

For commands, where nobody has opened one. Who and where is said by the environment variables that both libraries have
for it. A program with providers or a run of its own gives those to `OpenTelemetry` and `WandB`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from equipoise.monitor.sinks.otel import OpenTelemetry
from equipoise.monitor.sinks.wandb import WandB
from equipoise.types import Action, Alert, RoutingStats, Sink


class Session:
    """A sink, and what has to be ended with it."""

    def __init__(self, sink: Sink, end: Callable[[], object]) -> None:
        self._sink, self._end = sink, end

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """As the sink has it."""
        self._sink.routing(window)

    def alert(self, alert: Alert) -> None:
        """As the sink has it."""
        self._sink.alert(alert)

    def action(self, action: Action) -> None:
        """As the sink has it."""
        self._sink.action(action)

    def close(self) -> None:
        """Send what is left and end the session."""
        self._end()


def otlp(run: str) -> Session:
    """Metrics and events to an OpenTelemetry collector, over HTTP; OTEL_EXPORTER_OTLP_ENDPOINT says where.

    Source: opentelemetry.io/docs/specs/otel/protocol/exporter. Raises ImportError naming what to install.
    """
    try:
        log_exporter = import_module("opentelemetry.exporter.otlp.proto.http._log_exporter").OTLPLogExporter
        metric_exporter = import_module("opentelemetry.exporter.otlp.proto.http.metric_exporter").OTLPMetricExporter
        from opentelemetry.sdk._logs import LoggerProvider
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
    except ImportError as error:
        raise ImportError(
            f"OpenTelemetry over OTLP needs {error.name}, which is not installed; pip install 'equipoise[otel]'"
        ) from error
    resource = Resource.create({"service.name": "equipoise", "service.instance.id": run})
    meters = MeterProvider([PeriodicExportingMetricReader(metric_exporter())], resource=resource)
    logs = LoggerProvider(resource=resource)
    logs.add_log_record_processor(BatchLogRecordProcessor(log_exporter()))

    def end() -> None:
        logs.shutdown()
        meters.shutdown()

    return Session(OpenTelemetry(meters, run=run, logger_provider=logs), end)


def wandb(run: str, folder: Path) -> Session:
    """A new run of Weights & Biases, in the group `run`; each start of a run that is resumed is one of them.

    folder: for what the library writes. Raises ImportError naming what to install, and RuntimeError when the library
    can't open the run, as without a key.
    """
    try:
        library = import_module("wandb")
    except ImportError as error:
        raise ImportError("W&B needs wandb, which is not installed; pip install 'equipoise[wandb]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    try:
        opened = library.init(dir=str(folder), name=run, group=run)
    except library.errors.Error as error:
        raise RuntimeError(f"W&B: can't open a run: {error}; set WANDB_API_KEY, or WANDB_MODE=offline") from error
    return Session(WandB(opened, name=run), opened.finish)
