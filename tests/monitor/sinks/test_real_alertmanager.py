"""With the real Alertmanager: an alert fires and is resolved through it, and comes out at a receiver of the test's own.

The Debian package is fetched into a cache, not installed (tests/monitor/debian.py).
"""

import json
import queue
import re
import subprocess
import threading
import urllib.request
from datetime import datetime

import pytest
from tests.monitor.debian import binary, relocated
from tests.monitor.sinks.cases import PATIENCE_S, Clock, Server, alert, deliver, quick

from equipoise.monitor.sinks.alertmanager import Alertmanager
from equipoise.monitor.sinks.background import Background
from equipoise.monitor.sinks.labels import Naming, Standings, fingerprint
from equipoise.monitor.sinks.webhook import Webhook, payload
from equipoise.types import Action

PACKAGE = "prometheus-alertmanager"
TEMPLATES = "/usr/share/prometheus/alertmanager"
CONFIG = """
route:
  receiver: test
  group_by: [alertname, layer, run]
  group_wait: 10ms
  group_interval: 50ms
  repeat_interval: 1h
receivers:
  - name: test
    webhook_configs:
      - url: {url}/from-alertmanager
        send_resolved: true
"""
HOSTILE = 'blocks.0.moe"} or {x=~".*\\ <!channel> é\n'


@pytest.fixture(scope="module")
def receiver():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def alertmanager(receiver, tmp_path_factory):
    """The URL of one that runs for this file, and the path of its configuration."""
    program = relocated(PACKAGE, "usr/bin/prometheus-alertmanager", folder=TEMPLATES)
    templates = binary(PACKAGE, f"{TEMPLATES[1:]}/default.tmpl").parent
    folder = tmp_path_factory.mktemp("alertmanager")
    config = folder / "alertmanager.yml"
    config.write_text(CONFIG.format(url=receiver.url))
    command = [program, f"--config.file={config}", f"--storage.path={folder / 'data'}"]
    command += ["--cluster.listen-address=", "--web.listen-address=127.0.0.1:0", "--web.external-url=http://am.example"]
    out, err = subprocess.DEVNULL, subprocess.PIPE
    process = subprocess.Popen(command, cwd=templates, stdout=out, stderr=err, text=True)
    said = queue.Queue()
    reader = threading.Thread(target=lambda: [said.put(line) for line in process.stderr] + [said.put("")], daemon=True)
    reader.start()
    try:
        port = None
        while port is None:  # it says which port it was given
            line = said.get(timeout=PATIENCE_S)
            assert line, f"Alertmanager ended with code {process.wait()}"
            match = re.search(r'address="?127\.0\.0\.1:(\d+)', line)
            port = match and match[1]
        yield f"http://127.0.0.1:{port}", config
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        reader.join(PATIENCE_S)
        process.stderr.close()


def sink(url, run, **changes):
    return Alertmanager(url, Naming(run, {"team": "moe"}), effort=quick(), **changes).build()


def standing(url, run):
    """What Alertmanager has for a run."""
    with urllib.request.urlopen(f"{url}/api/v2/alerts?filter=run%3D{run}", timeout=PATIENCE_S) as answer:
        return json.load(answer)


def test_amtool_takes_the_configuration(alertmanager):
    _, config = alertmanager
    done = subprocess.run(
        [binary(PACKAGE, "usr/bin/amtool"), "check-config", config], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "SUCCESS" in done.stdout


def test_an_alert_fires_and_is_resolved(alertmanager, receiver):
    url, _ = alertmanager
    with Background(sink(url, "fires")) as background:
        background.alert(alert())
        fired = receiver.next().body
        background.alert(alert("resolved", step=400, expert=2, severity="warning"))
        over = receiver.next().body
        assert background.flush(PATIENCE_S)
        assert background.state.last_error is None
    assert (fired["version"], fired["status"], over["status"]) == ("4", "firing", "resolved")
    [was], [now] = fired["alerts"], over["alerts"]
    assert was["labels"] == now["labels"]
    assert (was["labels"]["alertname"], was["labels"]["expert"]) == ("EquipoiseLayerCollapse", "5")
    assert was["annotations"]["description"] == alert().finding.message
    assert (was["startsAt"], was["fingerprint"]) == (now["startsAt"], now["fingerprint"])
    assert datetime.fromisoformat(now["endsAt"]) > datetime.fromisoformat(now["startsAt"])


def test_our_webhook_says_what_alertmanager_says(alertmanager, receiver):
    """The same fields, labels, group and fingerprint, so that a receiver can't tell who sent it."""
    url, _ = alertmanager
    ours, clock = sink(url, "same"), Clock(1_790_000_000.0)
    ours.alert(alert(layer=HOSTILE))
    theirs = receiver.next().body
    config = Webhook(
        Naming("same", {"team": "moe"}), url=receiver.url, receiver="test", external_url=theirs["externalURL"]
    )
    mine = payload(Standings(config.naming).take(alert(layer=HOSTILE), clock()), config)
    assert mine.keys() == theirs.keys()
    assert mine["alerts"][0].keys() == theirs["alerts"][0].keys()
    for name in (
        "version",
        "status",
        "receiver",
        "groupLabels",
        "commonLabels",
        "commonAnnotations",
        "truncatedAlerts",
    ):
        assert mine[name] == theirs[name], name
    for name in ("status", "labels", "annotations", "endsAt", "fingerprint"):
        expected = theirs["alerts"][0][name]
        assert mine["alerts"][0][name] == expected, name
    assert mine["groupKey"] == theirs["groupKey"]
    ours.alert(alert("resolved", layer=HOSTILE))
    assert receiver.next().body["status"] == "resolved"


def test_it_is_sent_again_and_so_lives_on(alertmanager, receiver):
    url, _ = alertmanager
    config = Alertmanager(url, Naming("again"), effort=quick(), resend_s=60.0)
    clock = Clock(1_900_000_000.0)  # ahead of Alertmanager's clock: nothing ends during the test
    ours = type(config.build())(config, deliver(config), clock=clock)
    ours.alert(alert())
    [first] = standing(url, "again")
    clock.now += 60
    ours.tick()
    [second] = standing(url, "again")
    assert first["fingerprint"] == second["fingerprint"] == fingerprint(second["labels"])
    assert first["startsAt"] == second["startsAt"]
    assert second["endsAt"] > first["endsAt"]
    ours.action(Action("quantile_bias", "blocks.3.moe", 120, "blocks.3.moe:collapse"))
    [third] = standing(url, "again")
    assert third["annotations"]["action"] == "quantile_bias on blocks.3.moe at step 120, applied"


def test_the_alert_of_a_killed_process_ends_by_itself(alertmanager, receiver):
    url, _ = alertmanager
    sink(url, "killed", resend_s=0.25).alert(alert())  # says that it ends in 1 s, and then nothing more
    seen = []
    while len(seen) < 2:
        body = receiver.next().body
        seen += [body["status"]] if body["commonLabels"]["run"] == "killed" else []
    assert seen == ["firing", "resolved"]


def test_amtool_shows_names_as_they_are(alertmanager, receiver):
    url, _ = alertmanager
    sink(url, "hostile").alert(alert(layer=HOSTILE, rule="x'y\"z"))
    command = [
        binary(PACKAGE, "usr/bin/amtool"),
        "alert",
        "query",
        f"--alertmanager.url={url}",
        "-o",
        "json",
        "run=hostile",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [shown] = json.loads(done.stdout)
    assert shown["labels"]["layer"].startswith('blocks.0.moe"} or {x=~".*\\ <!channel> é ')
    assert shown["labels"]["rule"] == "x'y\"z"
