"""Alerts of a training run to real receivers: options, secrets, Ctrl-C, receivers that hang, and what a resume says."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tests.monitor.sinks.cases import PATIENCE_S, Answer, Server

from equipoise.faults import Collapse, inject
from equipoise.monitor.sinks.jsonl import read_json_lines
from equipoise.monitor.sinks.options import DEAD_LETTERS, Alerts, delivering
from equipoise.routing import SwitchLoss, TopK
from equipoise.train.loop import Trainer, load_config
from equipoise.train.report import Silent
from equipoise.train.run import open_data, train

LAYER = "layers.1.mlp"
KEY = f"run:{LAYER}:collapse"


class Lines(Silent):
    """What a person is told."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def secrets(server, monkeypatch):
    monkeypatch.setenv("PAGERDUTY_ROUTING_KEY", "s3cret-pagerduty")
    monkeypatch.setenv("SLACK_WEBHOOK_URL", f"{server.url}/services/s3cret-slack")
    monkeypatch.setenv("HOOK_TOKEN", "s3cret-token")


@pytest.fixture(scope="module")
def broken(make_config, tmp_path_factory):
    """A run stopped at step 60, its router just broken: the alert fires four steps later."""
    out = tmp_path_factory.mktemp("broken") / "run"
    moe = {"router": TopK(k=2), "balance": (SwitchLoss(coef=0.1),), "capacity": None}
    options = {"batch_size": 16, "micro_batch_size": None, "eval_every": 0, "checkpoint_every": 30, "watch_every": 2}
    config, data = open_data(make_config(steps=80, moe=moe, **options))
    torch.manual_seed(0)
    trainer = Trainer(config, data, out, Silent())
    trainer.run(until=60)
    assert trainer.repairs.known_good.records
    with trainer.watch.recorder.paused():
        inject(trainer.model, Collapse(LAYER, 5, 40.0), trainer.show_text)
    trainer.save()
    trainer.close("interrupted")
    return out


@pytest.fixture
def run_folder(broken, tmp_path):
    """A copy of it. recover: whether the run repairs itself."""

    def copy(recover):
        out = tmp_path / "run"
        shutil.copytree(broken, out)
        config = replace(load_config(out), recover=recover)
        (out / "config.json").write_text(config.to_json(), encoding="utf-8")
        return out

    return copy


def pagerduty(server, **more):
    return Alerts(pagerduty=True, pagerduty_url=f"{server.url}/v2/enqueue", **more)


def events(received, path="/v2/enqueue"):
    """(action, key) of what PagerDuty got, one of each change: repairs trigger again."""
    pages = [(each.body["event_action"], each.body["dedup_key"]) for each in received if each.path == path]
    return [page for i, page in enumerate(pages) if i == 0 or page != pages[i - 1]]


def test_alerts_repairs_and_their_end_reach_every_receiver(run_folder, server, tmp_path):
    out = run_folder(recover=True)
    lines = Lines()
    alerts = pagerduty(
        server,
        slack=True,
        alertmanager=server.url,
        webhook=f"{server.url}/hook",
        webhook_token_env="HOOK_TOKEN",
        jsonl=tmp_path / "log.jsonl",
        tensorboard=tmp_path / "board",
    )
    result = train(None, out, lines, resume=True, alerts=alerts)
    assert result.step == 80
    received = server.all()
    assert events(received) == [("trigger", KEY), ("resolve", KEY)]
    by_path = {path: [each for each in received if each.path == path] for path in {each.path for each in received}}
    assert set(by_path) == {"/v2/enqueue", "/services/s3cret-slack", "/api/v2/alerts", "/hook"}
    titles = [each.body["text"] for each in by_path["/services/s3cret-slack"]]
    assert titles[0] == f"Critical: run: collapse in {LAYER}, expert 5"
    assert any(title.startswith("Repair applied: run: quantile_bias") for title in titles)
    assert any(title.startswith("Repair kept: run: quantile_bias") for title in titles)
    assert [each.body["status"] for each in by_path["/hook"]][:: len(by_path["/hook"]) - 1] == ["firing", "resolved"]
    assert {each.headers["authorization"] for each in by_path["/hook"]} == {"Bearer s3cret-token"}
    assert by_path["/api/v2/alerts"][0].body[0]["labels"]["run"] == "run"
    records = list(read_json_lines(tmp_path / "log.jsonl"))
    assert {record["record"] for record in records} == {"routing", "alert", "action"}
    assert list((tmp_path / "board").iterdir())
    assert not (out / DEAD_LETTERS).exists()
    assert not [line for line in lines.lines if line.startswith("alerts:")]
    for path in [path for path in out.rglob("*") if path.is_file()]:
        assert b"s3cret" not in path.read_bytes(), path


def test_a_resume_tells_what_still_fires_once_and_its_end_has_the_same_key(run_folder, server):
    """The pager may have resolved or forgotten it since. Nobody repairs here: the router is mended by hand."""
    out = run_folder(recover=False)
    config, data = open_data(load_config(out))

    def going_on(until, mend=False):
        with delivering(pagerduty(server, webhook=f"{server.url}/hook"), out, Silent().say) as sinks:
            trainer = Trainer(config, data, out, Silent(), resume=True, sinks=sinks)
            if mend:
                registry = trainer.repairs.known_good
                good = registry.load(registry.latest())
                with torch.no_grad():
                    trainer.model.moe_layers[LAYER].router.weight.copy_(good[f"{LAYER}.router.weight"])
            trainer.run(until=until)
            trainer.save()
            fired = [alert.key for alert in trainer.store.alerts()]
            trainer.close("interrupted")
        received = server.all()
        hook = [each.body["alerts"][0] for each in received if each.path == "/hook"]
        return events(received), [(each["status"], each["fingerprint"]) for each in hook], fired

    pages, hook, recorded = going_on(64)
    assert pages == [("trigger", KEY)]
    fingerprint = hook[0][1]
    again, hook, recorded_again = going_on(66)
    assert again == [("trigger", KEY)]
    assert hook == [("firing", fingerprint)]
    assert recorded_again == recorded  # the run's own history has it once
    last, hook, _ = going_on(74, mend=True)
    assert last == [("trigger", KEY), ("resolve", KEY)]
    assert [status for status, _ in hook] == ["firing", "resolved"]
    assert {print_ for _, print_ in hook} == {fingerprint}
    nothing, hook, _ = going_on(76)
    assert (nothing, hook) == ([], [])


def test_a_receiver_that_hangs_is_given_up_and_its_messages_are_kept(run_folder, server, monkeypatch):
    monkeypatch.setattr("equipoise.monitor.sinks.options.CLOSE_S", 0.01)
    out, lines = run_folder(recover=False), Lines()
    server.hold.set()
    result = train(None, out, lines, resume=True, alerts=pagerduty(server))
    assert result.step == 80
    letters = [json.loads(line) for line in (out / DEAD_LETTERS).read_text().splitlines()]
    assert letters[0]["body"]["event_action"] == "trigger"
    assert letters[0]["key"] == KEY
    assert [line for line in lines.lines if line.startswith("alerts: ")] != []
    server.release.set()


def test_a_receiver_that_refuses_is_told_at_the_end_without_the_secret(run_folder, server):
    out, lines = run_folder(recover=False), Lines()
    server.answers.extend([Answer(400, echo=True)] * 20)
    train(None, out, lines, resume=True, alerts=pagerduty(server))
    [line] = [line for line in lines.lines if line.startswith("alerts:")]
    assert "failed" in line
    assert "HTTP 400" in line
    assert "s3cret" not in line
    assert b"s3cret" not in (out / DEAD_LETTERS).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slack": True}, r"SLACK_WEBHOOK_URL: expected a secret in this environment variable, found none"),
        ({"pagerduty": True}, r"PAGERDUTY_ROUTING_KEY: expected a secret"),
        ({"webhook": "nonsense"}, r"url: expected an address such as https://host/path, got 'nonsense'"),
        ({"webhook": "http://x/", "webhook_url_env": "HOOK"}, r"expected one of url and url_env, got both"),
        ({"alertmanager": "http://me:pw@host"}, r"without user and password, got one with"),
    ],
)
def test_a_mistake_is_told_before_anything_else_is_done(options, message, make_config, tmp_path, monkeypatch):
    monkeypatch.delenv("SLACK_WEBHOOK_URL")
    monkeypatch.delenv("PAGERDUTY_ROUTING_KEY")
    with pytest.raises(ValueError, match=message):
        train(make_config(), tmp_path / "run", Silent(), alerts=Alerts(**options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"webhook_token_env": "X"},
            r"alerts\.webhook_token_env: expected an address in alerts\.webhook or .* got none",
        ),
        ({"alertmanager_token_env": "X"}, r"alerts\.alertmanager_token_env: expected an address .* got none"),
    ],
)
def test_a_token_for_nobody_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Alerts(**options)


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"alerts: W&B needs wandb, .*pip install 'equipoise\[wandb\]'"):
        Alerts(wandb=True).sinks(tmp_path)


def test_ctrl_c_delivers_what_waits_and_the_command_line_has_the_options(run_folder, server, wait_until):
    """A real process: the alert is on its way when it is interrupted; it arrives, and the exit code is Ctrl-C's."""
    out = run_folder(recover=False)
    config = replace(load_config(out), steps=100_000)
    (out / "config.json").write_text(config.to_json(), encoding="utf-8")
    options = ["--alerts.pagerduty", "--alerts.pagerduty-url", f"{server.url}/v2/enqueue", "--alerts.run", "night"]
    command = [sys.executable, "-m", "equipoise", "train", "--resume", "--out", str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server.hold.set()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        wait_until(lambda: server.received.qsize() > 0, process)
        process.send_signal(signal.SIGINT)
        server.hold.clear()
        server.release.set()
        output, _ = process.communicate(timeout=3 * PATIENCE_S)
    assert process.returncode == 130, output
    assert events(server.all()) == [("trigger", f"night:{LAYER}:collapse")]
    assert "s3cret" not in output
    assert not (out / DEAD_LETTERS).exists()
