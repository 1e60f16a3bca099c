"""The exposition server: on this machine only, closing cleanly, and clear about ports and packages."""

import json
import re
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter
from tests.monitor.prometheus.cases import samples, value, window

from equipoise.monitor.prometheus.collector import RoutingCollector
from equipoise.monitor.prometheus.http import Exporter
from equipoise.monitor.prometheus.live import LiveSource


@pytest.fixture
def collector():
    source = LiveSource("run")
    source.routing([window()])
    return RoutingCollector(source)


def get(url):
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read().decode()


def test_it_serves_until_it_is_closed(collector):
    before = threading.active_count()
    with Exporter(collector, port=0) as exporter:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", exporter.url)
        for _ in range(2):
            assert value(samples(get(exporter.url)), "equipoise_layer_tokens_total", layer="blocks.0") == 1024
        port = exporter.port
    exporter.close()
    with pytest.raises(urllib.error.URLError):
        get(exporter.url)
    assert threading.active_count() == before
    with Exporter(collector, port=port) as again:  # the port is free, the collector can be registered again
        assert again.port == port


def test_it_listens_on_this_machine_only(collector):
    with Exporter(collector, port=0) as exporter:
        assert exporter._server.socket.getsockname()[0] == "127.0.0.1"


def test_a_registry_of_the_caller(collector):
    registry = CollectorRegistry()
    Counter("requests", "Requests.", registry=registry).inc(3)
    with Exporter(collector, port=0, registry=registry) as exporter:
        scraped = samples(get(exporter.url))
        assert value(scraped, "requests_total") == 3
        assert value(scraped, "equipoise_layers") == 1
    assert {family.name for family in registry.collect()} == {"requests"}


def test_a_port_that_is_taken(collector):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port: cannot listen on 127.0.0.1 port {port}: .*choose another, or 0"):
            Exporter(collector, port=port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_no_port(collector, port):
    with pytest.raises(ValueError, match=f"port: expected 0 to 65535, got {port}; 0 takes a free one"):
        Exporter(collector, port=port)


def test_without_prometheus_client_the_error_names_the_extra():
    code = """
import json, sys
sys.modules["prometheus_client"] = None
from equipoise.monitor.prometheus import commands
from equipoise.monitor.prometheus.collector import RoutingCollector
from equipoise.monitor.prometheus.http import Exporter
from equipoise.monitor.prometheus.live import LiveSource
assert commands.export("rules") and commands.export("grafana") and commands.export("alertmanager")
source = LiveSource("run")
source.routing([])
said = []
for use in (lambda: Exporter(RoutingCollector(source), port=0), lambda: list(RoutingCollector(source).collect())):
    try:
        use()
    except ImportError as error:
        said.append(str(error))
print(json.dumps(said))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    said = json.loads(done.stdout)
    assert len(said) == 2
    assert all("pip install 'equipoise[prometheus]'" in each for each in said)
