"""`equipoise serve` as a process: the official client, the metrics, the admin port, a collapse under load, signals."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import httpx
import openai
import pytest
from tests.serve.live.process import SRC, operator, serving, wait_for

from equipoise.monitor.alert_names import RULES
from equipoise.monitor.prometheus.commands import export
from equipoise.monitor.store import RunStore
from equipoise.recovery.policy import SERVING_RUNGS
from equipoise.serve.admin import VARIABLE, admin_token

LAYER = "layers.1.mlp"


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    """One for the tests that leave it as it was."""
    out = tmp_path_factory.mktemp("record") / "serving"
    with serving(trained, "--recover", "--flush-s", "0.2", "--out", str(out)) as server:
        server.out = out
        yield server


def test_ready_client_and_pages(server):
    assert httpx.get(f"{server.url}/health/ready").json() == {"status": "ok"}
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["run"]
    whole = client.completions.create(model="run", prompt="The", max_tokens=12, seed=3)
    pieces = client.completions.create(model="run", prompt="The", max_tokens=12, seed=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text
    assert "equipoise_serve_answer_tokens_total 24.0" in httpx.get(f"{server.url}/metrics").text
    assert "<title>Runs · equipoise</title>" in httpx.get(server.url).text
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["code"] == "unknown_url"


def test_the_admin_port_asks_for_the_token(server):
    token_file = server.out / "admin_token"
    assert token_file.stat().st_mode & 0o777 == 0o600
    paths = [
        "state",
        "reload",
        "reload/undo",
        "router/rollback",
        "faults",
        "faults/remove",
        "recovery",
        "alerts",
        "repairs/lift",
    ]
    for path in [*paths, "drain", "resume"]:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic eDp5"}):
            method = "GET" if path == "state" else "POST"
            reply = httpx.request(
                method, f"{server.admin}/{path}", headers=headers, json={} if method == "POST" else None
            )
            assert reply.status_code == 401, path
    assert httpx.post(f"{server.url}/admin/drain", json={}).status_code in (404, 405)  # not on the public port
    token = token_file.read_text()
    assert token not in "".join(server.lines)


def test_verbs(server):
    with operator(server) as admin:
        state = admin.get("state").json()
        assert state["weights"]["checkpoints"] == ["step-000040", "step-000080"]
        refused = admin.post("reload", json={"checkpoint": "../x"})
        assert refused.status_code == 409
        assert "expected one of step-000040, step-000080" in refused.json()["error"]["message"]
        taken = admin.post("reload", json={"checkpoint": "step-000040", "max_loss_increase": 10}).json()
        assert (taken["number"], taken["source"]) == (2, "step-000040")
        assert admin.post("reload/undo", json={}).json()["source"] == "step-000080"
        assert len(admin.post("router/rollback", json={}).json()["actions"]) == 2
        assert admin.post("recovery", json={"act": "yes"}).status_code == 400
        assert admin.post("alerts", json={"alerts": [{"status": "firing", "labels": 3}]}).status_code == 400
        resolved = {"status": "resolved", "labels": {"layer": LAYER, "rule": "collapse"}}
        others = {"status": "firing", "labels": {"alertname": "EquipoiseMonitorStalled", "run": "run"}}
        no_repair = {"status": "firing", "labels": {"alertname": "EquipoiseExpertHot", "layer": LAYER}}
        page = {"status": "firing", "labels": {"rule": "recovery_exhausted", "layer": LAYER}}
        ignored = admin.post("alerts", json={"alerts": [resolved, others, no_repair, page]}).json()
        assert ignored == {"actions": [], "ignored": 3}
        unknown = {"status": "firing", "labels": {"alertname": "EquipoiseDeadExperts", "layer": "layers.9.mlp"}}
        assert admin.post("alerts", json={"alerts": [unknown]}).status_code == 409
        assert admin.post("drain", json={}).json()["draining"] is True
        assert httpx.get(f"{server.url}/health/ready").status_code == 503
        assert admin.post("resume", json={}).json()["draining"] is False
        assert httpx.get(f"{server.url}/health/ready").status_code == 200


def test_a_collapse_under_load_is_repaired_and_no_request_is_lost(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    done, failed, marked, stop = [], [], [], threading.Event()

    def user(number):
        count = 0
        while not stop.is_set():
            count += 1
            try:
                reply = client.completions.with_raw_response.create(
                    model="run", prompt=f"{number} The king {count}", max_tokens=16, echo=True
                )
                done.append(reply.parse().choices[0].text.startswith(f"{number} The king {count}"))
                marked.append(reply.headers.get("x-equipoise-degraded", ""))
            except openai.APIError as error:
                failed.append(error)

    users = [threading.Thread(target=user, args=(n,)) for n in range(6)]
    for each in users:
        each.start()
    try:
        with operator(server) as admin:
            fault = {"fault": "collapse", "layer": LAYER, "expert": 3, "intensity": 30.0}
            assert admin.post("faults", json={"fault": fault}).status_code == 200
            with RunStore.open_readonly(server.out) as store:
                repaired = wait_for(
                    lambda: [a for a in store.actions() if a.state == "kept" and a.reason != "operator"]
                )
                resolved = wait_for(lambda: [a for a in store.alerts() if a.state == "resolved"])
            assert repaired[0].layer == LAYER
            assert resolved[0].finding.rule == "collapse"
            assert admin.post("faults/remove", json={}).status_code == 200
            admin.post("router/rollback", json={})
    finally:
        stop.set()
        for each in users:
            each.join()
    assert failed == []
    assert all(done)
    assert any(LAYER in mark for mark in marked)


def test_a_slow_expert_is_named_and_shut_alone(trained, tmp_path):
    """In the state, the metrics and the records; the others of its layer go on."""
    out, group, stop = tmp_path / "serving", f"{LAYER}/3", threading.Event()
    with serving(trained, "--breaker-by", "expert", "--flush-s", "0.2", "--out", str(out)) as server:
        server.out = out
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        answered = []

        def user(number):
            while not stop.is_set():
                prompt = f"{number} The king {len(answered)}"
                answered.append(client.completions.create(model="run", prompt=prompt, max_tokens=16))

        users = [threading.Thread(target=user, args=(n,)) for n in range(4)]
        for each in users:
            each.start()
        try:
            with operator(server) as admin:
                # what is usual is known by then: a fault from the first calls on would be taken for it
                assert wait_for(lambda: len(answered) >= 40 and group in admin.get("state").json()["experts_ms"])
                fault = {"fault": "slow-expert", "layer": LAYER, "expert": 3, "seconds": 0.1}
                assert admin.post("faults", json={"fault": fault}).status_code == 200

                def named():
                    state = admin.get("state").json()
                    return state if any(alert["rule"] == "expert_p99" for alert in state["alerts"]) else None

                state = wait_for(named)
        finally:
            stop.set()
            for each in users:
                each.join()
        [alert] = [alert for alert in state["alerts"] if alert["rule"] == "expert_p99"]
        assert (alert["layer"], alert["expert"]) == (LAYER, 3)
        assert {name for name, is_ in state["breaker"].items() if is_ != "closed"} == {group}
        assert state["degraded"] == [f"{group}: the breaker is open"]
        assert state["experts_ms"][group]["p99"] >= state["experts_ms"][group]["p50"] >= 100
        lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{server.url}/metrics").text.splitlines())
        for name in ("breaker_open", "experts_p50_seconds", "experts_p99_seconds"):
            of_expert = {
                expert: float(lines[f'equipoise_serve_{name}{{group="{LAYER}/{expert}"}}']) for expert in (0, 3)
            }
            assert of_expert[3] >= 0.1 > of_expert[0], name
        with RunStore.open_readonly(out) as store:
            for name in (group, LAYER):  # a layer's is that of its slowest expert
                assert store.scalar_history(f"experts_ms.{name}.p99", last=1)[0][1] >= 100
            assert any(action.kind == "breaker" and action.note.startswith(group) for action in store.actions())


def test_names_of_the_exported_rules_are_known():
    """Each rule that a served model has repairs for is asked for by the name of its alert, as Prometheus sends it."""
    text = export("rules", "relative", runbooks="x")
    known = {rule for name, rule in RULES.items() if f'alert: "{name}"' in text}
    assert known == set(SERVING_RUNGS) - {"load_drift", "not_finite"}  # the monitor's alone, which has the label rule


def test_sigterm_finishes_what_is_open(trained, tmp_path):
    with serving(trained, "--out", str(tmp_path / "serving")) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="run", prompt="The", max_tokens=100, stream=True)
        first = next(iter(stream))
        assert first.choices[0].finish_reason is None
        server.process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason in ("length", "stop")
        code, out, _ = server.end()
    assert code == 0
    assert re.search(r"stopping: \d open requests get 30 s\nstopped\n", out)
    with RunStore.open_readonly(tmp_path / "serving") as store:
        assert store.meta()["status"] == "finished"


class TestMistakes:
    def test_in_one_line(self, trained, tmp_path):
        cases = [
            ([str(tmp_path)], r"expected a run folder with config\.json"),
            ([str(trained), "--host", "0.0.0.0"], r"host: 0\.0\.0\.0 can be reached.*add --keys-file"),
            ([str(trained), "--max-running", "0"], r"max_running: expected at least 1, got 0"),
            (
                [str(trained), "--max-seconds", "0"],
                r"max_seconds: expected more than 0, got 0; leave it out for no end",
            ),
            ([str(trained), "--cache-gb", "0.00001"], r"cache_gb: one sequence of 128 tokens takes"),
        ]
        for arguments, told in cases:
            done = subprocess.run(
                [sys.executable, "-m", "equipoise", "serve", *arguments],
                capture_output=True, text=True, timeout=60, check=False,
                env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert done.returncode == 2, done.stderr
            assert re.search(told, done.stderr), done.stderr
            assert done.stderr.count("\n") == 1

    def test_port_in_use(self, server, trained, tmp_path):
        port = server.url.rpartition(":")[2]
        done = subprocess.run(
            [sys.executable, "-m", "equipoise", "serve", str(trained), "--port", port, "--out", str(tmp_path / "s")],
            capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PYTHONPATH": str(SRC)},
        )  # fmt: skip
        assert done.returncode == 2
        assert f"port: {port} is in use" in done.stderr


class TestToken:
    def test_of_the_environment(self, tmp_path):
        assert admin_token(tmp_path, {VARIABLE: "x" * 20}) == "x" * 20
        assert not list(tmp_path.iterdir())

    def test_too_short_is_refused_and_not_shown(self, tmp_path):
        with pytest.raises(ValueError, match=r"EQUIPOISE_ADMIN_TOKEN: expected at least 16.*got 5") as error:
            admin_token(tmp_path, {VARIABLE: "secre"})
        assert "secre" not in str(error.value)

    def test_fresh_ones_differ(self, tmp_path):
        assert admin_token(tmp_path, {}) != admin_token(tmp_path, {})


def test_state_is_written_as_json(server):
    with operator(server) as admin:
        assert json.loads(admin.get("state").text)["engine"]["error"] == ""
