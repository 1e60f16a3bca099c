"""With the real Alertmanager: an alert fires and is resolved through it, and comes out at a receiver of the test's own.

The Debian package is fetched into a cache, not installed (tests/monitor/debian.py).
"""

import json
import subprocess
import urllib.request
from datetime import datetime

import pytest
from tests.monitor.debian import binary
from tests.monitor.sinks.cases import PATIENCE_S, Clock, Server, alert, deliver, quick
from tests.monitor.sinks.real_alertmanager import PACKAGE, running_alertmanager

from equipoise.monitor.sinks.alertmanager import Alertmanager
from equipoise.monitor.sinks.background import Background
from equipoise.monitor.sinks.labels import Naming, Standings, fingerprint
from equipoise.monitor.sinks.webhook import Webhook, payload
from equipoise.types import Action

HOSTILE = 'blocks.0.moe"} or {x=~".*\\ <!channel> é\n'


@pytest.fixture(scope="module")
def receiver():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def alertmanager(receiver, tmp_path_factory):
    """The URL of one that runs for this file, and the path of its configuration."""
    with running_alertmanager(tmp_path_factory.mktemp("alertmanager"), receiver) as started:
        yield started


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
