"""OpenTelemetry: what reaches the reader and the exporter of the caller's own providers."""

import sys

import pytest
from tests.monitor.sinks.cases import alert, repair, stats

from equipoise.monitor.sinks.layer_numbers import NUMBERS
from equipoise.monitor.sinks.otel import OpenTelemetry
from equipoise.types import Action

RUN = {"moe.run": "run 7", "moe.layer": "blocks.3.moe"}


@pytest.fixture
def telemetry():
    metrics = pytest.importorskip("opentelemetry.sdk.metrics")
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader, exporter = InMemoryMetricReader(), InMemoryLogRecordExporter()
    meters, loggers = metrics.MeterProvider([reader]), LoggerProvider()
    loggers.add_log_record_processor(SimpleLogRecordProcessor(exporter))
    yield OpenTelemetry(meters, run="run 7", logger_provider=loggers), reader, exporter
    meters.shutdown()
    loggers.shutdown()


def points(reader):
    """metric -> [(value, attributes)]."""
    data = reader.get_metrics_data()
    found = [
        metric for resource in data.resource_metrics for scope in resource.scope_metrics for metric in scope.metrics
    ]
    return {metric.name: [(p.value, dict(p.attributes)) for p in metric.data.data_points] for metric in found}


def test_gauges_hold_the_last_window_and_counters_add_up(telemetry):
    sink, reader, _ = telemetry
    sink.routing([stats(step=50), stats("blocks.4.moe")])
    sink.routing([stats(step=100, counts_E=(32, 32, 32, 32))])
    got = points(reader)
    assert {f"moe.routing.{name}" for name in NUMBERS} <= set(got)
    by_layer = {attributes["moe.layer"]: value for value, attributes in got["moe.routing.max_violation"]}
    assert by_layer == {"blocks.3.moe": 0.0, "blocks.4.moe": 0.875}
    assert (128, RUN) in got["moe.routing.tokens"]
    assert (6, {**RUN, "moe.reason": "capacity"}) in got["moe.routing.dropped"]
    assert {attributes["moe.loss"] for _, attributes in got["moe.routing.loss"]} == {"switch"}


def test_an_alert_is_a_gauge_and_an_event(telemetry):
    sink, reader, exporter = telemetry
    sink.alert(alert())
    assert points(reader)["moe.alert.firing"] == [(1, {**RUN, "moe.rule": "collapse"})]
    sink.alert(alert("resolved", expert=2))
    assert points(reader)["moe.alert.firing"] == [(0, {**RUN, "moe.rule": "collapse"})]
    fired, over = (item.log_record for item in exporter.get_finished_logs())
    assert (fired.event_name, fired.severity_number.name, over.severity_number.name) == ("moe.alert", "ERROR", "INFO")
    assert fired.body == alert().finding.message
    assert dict(fired.attributes) == {
        **RUN,
        "moe.rule": "collapse",
        "moe.expert": 5,
        "moe.alert.state": "firing",
        "moe.alert.severity": "critical",
        "moe.alert.value": 0.97,
        "moe.alert.threshold": 0.5,
        "moe.alert.remedy": alert().finding.remedy,
        "moe.step": 100,
    }


def test_each_change_of_a_repair_is_a_count_and_an_event(telemetry):
    sink, reader, exporter = telemetry
    for change in (repair(step=60), repair(step=80), repair("undone", step=90, note="the loss rose")):
        sink.action(change)
    about = {**RUN, "moe.kind": "quantile_bias"}
    assert sorted(points(reader)["moe.repairs"], key=str) == [
        (1, {**about, "moe.repair.state": "undone"}),
        (2, {**about, "moe.repair.state": "applied"}),
    ]
    applied, _, undone = (item.log_record for item in exporter.get_finished_logs())
    assert (applied.event_name, applied.severity_number.name) == ("moe.repair", "INFO")
    assert applied.attributes["moe.repair.max_violation_before"] == 2.98765
    assert dict(undone.attributes) == {
        **about,
        "moe.repair.state": "undone",
        "moe.repair.note": "the loss rose",
        "moe.repair.steps": 0.0,
        "moe.alert.key": "blocks.3.moe:collapse",
        "moe.step": 90,
    }
    assert undone.severity_number.name == "WARN"
    assert undone.body == "quantile_bias undone because of blocks.3.moe:collapse (the loss rose)"


def test_metrics_alone(telemetry):
    metrics = pytest.importorskip("opentelemetry.sdk.metrics")
    meters = metrics.MeterProvider([])
    sink = OpenTelemetry(meters, run="run 7")
    sink.alert(alert(expert=None))
    sink.action(Action("repair", "l", 1, "why"))
    assert telemetry[2].get_finished_logs() == ()  # nothing goes where it was not sent
    meters.shutdown()


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry._logs", None)
    with pytest.raises(ImportError, match=r"needs the package opentelemetry-api.*pip install 'equipoise\[otel\]'"):
        OpenTelemetry(None, run="run 7")
