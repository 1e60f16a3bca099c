"""`equipoise triage ADDRESS` of a server that runs: its word, its records, its key, and what it advises."""

import json
import re
import subprocess

import httpx
import pytest
from tests.serve.live.test_server import LAYER, operator, serving

from equipoise.cli import main
from equipoise.monitor.evidence_http import KEY, PATH

API_KEY = "a-key-of-this-server"


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("record") / "serving"
    keys = out.parent / "keys"
    keys.write_text(API_KEY)
    with serving(trained, "--flush-s", "0.2", "--out", str(out), "--keys-file", str(keys)) as server:
        server.out = out
        yield server


def ask(server, capsys, *options):
    """(exit code, the answer)."""
    with pytest.raises(SystemExit) as ended:
        main(["triage", server.url, "--json", *map(str, options)])
    return ended.value.code, json.loads(capsys.readouterr().out)


def traffic(server, number=8):
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {API_KEY}"}, timeout=60) as client:
        for each in range(number):
            client.post("/v1/completions", json={"model": "run", "prompt": f"{each} The", "max_tokens": 64, "n": 4})


def test_the_key_is_asked_for(server, capsys, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["triage", server.url])
    assert ended.value.code == 2
    assert f"asks for an API key; set {KEY}" in capsys.readouterr().err
    assert httpx.get(server.url + PATH).status_code == 401


def test_a_collapse_that_someone_put_in_and_the_commands_that_mend_it(server, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(KEY, API_KEY)
    traffic(server)
    with operator(server) as admin:
        fault = {"fault": "collapse", "layer": LAYER, "expert": 3, "intensity": 30.0}
        assert admin.post("faults", json={"fault": fault}).status_code == 200
    while "degraded" not in httpx.get(f"{server.url}/health").text:  # until the monitor has seen enough of it
        traffic(server)
    code, found = ask(server, capsys, "--report", tmp_path / "night")
    assert code == 1
    assert re.fullmatch(
        rf"{re.escape(LAYER)} has collapsed since step \d+\. A fault was put in on purpose\. Take them out\.",
        found["conclusion"],
    )
    assert found["conclusion"] in (tmp_path / "night.md").read_text().replace("\\", "")
    commands = {check["question"]: check["command"] for check in found["checks"]}
    mend = commands["Has someone put faults in on purpose?"]
    done = subprocess.run(["bash", "-c", f"{mend} --silent"], capture_output=True, text=True, timeout=60, check=True)
    assert "collapse" in json.loads(done.stdout)["faults"][0]
    _, found = ask(server, capsys)
    assert {check["question"]: check["verdict"] for check in found["checks"]}[
        "Has someone put faults in on purpose?"
    ] == "ok"


def test_a_reload_is_told(server, capsys, monkeypatch):
    monkeypatch.setenv(KEY, API_KEY)
    with operator(server) as admin:
        admin.post("reload", json={"checkpoint": "step-000040", "max_loss_increase": 10}).raise_for_status()
    _, found = ask(server, capsys)
    answers = {check["question"]: check["answer"] for check in found["checks"]}
    assert answers["Which weights are in service, and since when?"].startswith("Those of step-000040, version 2;")


def test_the_admin_port_is_another_server(server, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["triage", server.admin.removesuffix("/admin")])
    assert ended.value.code == 2
    assert "expected a server of equipoise, got status 40" in capsys.readouterr().err
