"""Alerts of a served model to those who are on call: the options, real receivers, and their failures."""

import json
import signal
from pathlib import Path

import httpx
import openai
import pytest
from tests.monitor.sinks.cases import Answer, Server
from tests.monitor.sinks.real_alertmanager import running_alertmanager
from tests.serve.live.process import operator, serving, users, wait_for

from equipoise.commands.serve import ServeOptions, serve
from equipoise.monitor.sinks.options import DEAD_LETTERS, Alerts

LAYER = "layers.1.mlp"
COLLAPSE = {"fault": {"fault": "collapse", "layer": LAYER, "expert": 3, "intensity": 30.0}}


@pytest.fixture
def receiver():
    server = Server()
    yield server
    server.close()


def metrics(server):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def number(server, name, to):
    return metrics(server)[f'equipoise_serve_alerts_{name}{{to="{to}"}}']


def test_on_call_is_told_and_the_engine_waits_for_nobody(trained, tmp_path, receiver):
    """PagerDuty hangs at first and the webhook refuses: requests are answered meanwhile, and operators see both."""
    out, refusing = tmp_path / "serving", Server()
    refusing.answers.extend([Answer(400)] * 20)
    options = ["--out", str(out), "--flush-s", "0.2", "--alerts.pagerduty", "--alerts.webhook", f"{refusing.url}/hook"]
    options += ["--alerts.pagerduty-url", f"{receiver.url}/v2/enqueue", "--name", "night"]
    env = {"PAGERDUTY_ROUTING_KEY": "s3cret-pagerduty"}
    receiver.hold.set()
    with serving(trained, *options, env=env) as server, users(server, 4, model="night") as failed:
        server.out = out
        with operator(server) as admin:
            assert admin.post("faults", json=COLLAPSE).status_code == 200
            trigger = receiver.next()  # it has the page, and says nothing
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
            assert client.completions.create(model="night", prompt="The", max_tokens=8).usage.completion_tokens == 8
            assert wait_for(lambda: number(server, "pending", "pagerduty"))
            assert wait_for(lambda: number(server, "failed_total", "webhook"))
            assert "HTTP 400" in admin.get("state").json()["delivery"]["webhook"]["last_error"]
            receiver.hold.clear()
            receiver.release.set()
            wait_for(lambda: number(server, "pending", "pagerduty") == 0)
            assert metrics(server)['equipoise_serve_alerts_dropped_total{kind="alert",to="pagerduty"}'] == 0
            assert number(server, "failed_total", "pagerduty") == 0
            assert failed == []
        server.process.send_signal(signal.SIGTERM)
        code, said, _ = server.end()
    refusing.close()
    assert code == 0
    assert "alerts: " in said
    assert "HTTP 400" in said
    assert trigger.body["dedup_key"] == f"night:{LAYER}:collapse"
    assert trigger.body["payload"]["custom_details"]["alert"] == "EquipoiseLayerCollapse"
    last = [each.body for each in receiver.all()][-1]  # nobody else would close it
    assert (last["event_action"], last["dedup_key"]) == ("resolve", trigger.body["dedup_key"])
    kept = [json.loads(line) for line in (out / DEAD_LETTERS).read_text().splitlines()]
    assert kept[0]["body"]["alerts"][0]["labels"]["alertname"] == "EquipoiseLayerCollapse"
    for path in [path for path in Path(out).rglob("*") if path.is_file()]:
        assert b"s3cret" not in path.read_bytes(), path


@pytest.mark.slow
def test_with_the_real_alertmanager(trained, tmp_path, receiver):
    """The collapse of a served router, its repair as an annotation, and its end, through Alertmanager to a receiver."""
    out = tmp_path / "serving"
    with running_alertmanager(tmp_path, receiver) as (url, _):
        options = ["--recover", "--flush-s", "0.2", "--out", str(out), "--name", "served", "--alerts.alertmanager", url]
        with serving(trained, *options) as server, users(server, 6, model="served") as failed:
            server.out = out
            with operator(server) as admin:
                assert admin.post("faults", json=COLLAPSE).status_code == 200
            pages = []
            while not (pages and pages[-1]["status"] == "resolved"):
                body = receiver.next().body
                pages += [body] if body["commonLabels"]["alertname"] == "EquipoiseLayerCollapse" else []
        assert failed == []
    assert pages[0]["status"] == "firing"
    labels = pages[0]["commonLabels"]
    assert (labels["run"], labels["layer"], labels["rule"]) == ("served", LAYER, "collapse")
    assert labels == pages[-1]["commonLabels"]
    assert "quantile_bias" in pages[-1]["commonAnnotations"]["action"]


def test_replicas_do_not_answer_for_each_other(tmp_path):
    with pytest.raises(ValueError, match=r"alerts: replicas would .*; leave out --ray, or --alerts"):
        serve(tmp_path, options=ServeOptions(ray=2), alerts=Alerts(jsonl=tmp_path / "x.jsonl"))


def test_a_mistake_is_told_before_anything_listens(trained, tmp_path, monkeypatch):
    monkeypatch.delenv("SLACK_WEBHOOK_URL", raising=False)
    out = tmp_path / "serving"
    with pytest.raises(ValueError, match="SLACK_WEBHOOK_URL: expected a secret"):
        serve(trained, options=ServeOptions(out=out), alerts=Alerts(slack=True))
    assert not out.exists()
