"""Sinks that open a session of their own: with the real libraries where they are installed, and without."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.monitor.sinks.cases import alert, repair, stats

from equipoise.monitor.sinks.session import Session, otlp, wandb


def feed(sink):
    sink.routing([stats()])
    sink.alert(alert())
    sink.action(repair())


def test_a_session_is_its_sink_and_ends_with_it():
    calls = []

    class Sink:
        def routing(self, window):
            calls.append("routing")

        def alert(self, alert):
            calls.append("alert")

        def action(self, action):
            calls.append("action")

    session = Session(Sink(), lambda: calls.append("end"))
    feed(session)
    session.close()
    assert calls == ["routing", "alert", "action", "end"]


@pytest.mark.parametrize(
    ("missing", "make", "message"),
    [
        ("opentelemetry.exporter.otlp.proto.http._log_exporter", lambda path: otlp("run"), r"equipoise\[otel\]"),
        ("wandb", lambda path: wandb("run", path), r"equipoise\[wandb\]"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(missing, make, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)  # Python's own way of saying: not there
    with pytest.raises(ImportError, match=message):
        make(tmp_path)


@pytest.mark.filterwarnings("default")
def test_a_collector_gets_metrics_and_events(monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    bodies = {}

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            bodies[self.path] = bodies.get(self.path, b"") + body
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    sink = otlp("run 7")
    feed(sink)
    sink.close()
    server.shutdown()
    server.server_close()
    assert b"moe.routing.max_violation" in bodies["/v1/metrics"]
    assert b"run 7" in bodies["/v1/metrics"]
    assert b"has collapsed: expert 5" in bodies["/v1/logs"]


@pytest.mark.filterwarnings("default")
def test_a_wandb_run_is_opened_in_the_folder_and_finished(tmp_path, monkeypatch):
    library = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    sink = wandb("run 7", tmp_path / "run")
    assert (library.run.name, library.run.group) == ("run 7", "run 7")
    feed(sink)
    sink.close()
    assert library.run is None
    [written] = (tmp_path / "run").rglob("*.wandb")
    assert b"max_violation" in written.read_bytes()
