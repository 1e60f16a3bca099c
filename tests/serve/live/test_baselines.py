"""A server exports what its layers are like in health, so that Prometheus can compare; the real one does."""

import contextlib
import urllib.error

import pytest
from tests.monitor.prometheus.cases import samples
from tests.monitor.prometheus.real import firing, prometheus
from tests.serve.live.process import operator, serving, users, wait_for

from equipoise.models.run_files import load
from equipoise.recovery.known_good import KnownGood
from equipoise.serve.server import Server, ServerConfig

LAYER, DRIFT, NORMAL = "layers.1.mlp", "EquipoiseLogitStdDrift", "equipoise_layer_baseline_logit_std"


def test_the_baselines_are_those_of_the_known_good_record(trained, tmp_path):
    server = Server(load(trained), ServerConfig("served", tmp_path / "serving", cache_gb=0.05), {})
    try:
        server.care.look()
        found = samples(server.metrics_text()[0].decode())
    finally:
        server.care.stop()
        server.record.close()
        server.engine.close()
    exported = {dict(labels)["layer"]: value for (name, labels), value in found.items() if name == NORMAL}
    assert exported == {layer: each.logit_std for layer, each in KnownGood(trained).latest().baselines.items()}
    assert set(exported) == {"layers.0.mlp", LAYER}


@pytest.mark.slow
def test_prometheus_says_that_the_logits_of_a_served_model_have_blown_up(trained, tmp_path):
    out = tmp_path / "serving"
    with serving(trained, "--flush-s", "0.2", "--out", str(out), "--name", "served") as server:
        server.out = out
        target = server.url.removeprefix("http://")
        with prometheus(tmp_path / "prometheus", [target]) as url, users(server, 4, model="served") as failed:

            def drifted():
                with contextlib.suppress(urllib.error.URLError, ConnectionError):  # not up yet
                    return [each for each in firing(url) if each["alertname"] == DRIFT]

            wait_for(lambda: drifted() == [])
            with operator(server) as admin:
                fault = {"fault": "logit-blow-up", "layer": LAYER, "intensity": 5.0}
                assert admin.post("faults", json={"fault": fault}).status_code == 200
                [alert] = wait_for(drifted)
                assert (alert["run"], alert["layer"], alert["severity"]) == ("served", LAYER, "warning")
                assert admin.post("faults/remove", json={}).status_code == 200
                wait_for(lambda: drifted() == [])
        assert failed == []
