"""What is posted to Alertmanager, field by field, and when it is posted again.

Schema: postableAlert in https://github.com/prometheus/alertmanager/blob/main/api/v2/openapi.yaml; what is expected of
clients: https://prometheus.io/docs/alerting/latest/clients/. The real Alertmanager is in test_real_alertmanager.py.
"""

import json
import re
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.monitor.sinks.cases import Answer, Clock, alert, deliver, quick, repair, stats

from equipoise.monitor.sinks.alertmanager import Alertmanager, AlertmanagerSink
from equipoise.monitor.sinks.delivery import DeliveryError
from equipoise.monitor.sinks.labels import MAX_LABEL, Naming, Standings, fingerprint, labels_of

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
NAMING = Naming("run 7", {"team": "moe"}, "https://runbook.example/runbooks#{alert}")
NOW = 1_790_000_000.0


def sink(server, clock, naming=NAMING, effort=None, **changes):
    config = Alertmanager(f"{server.url}/am/", naming, effort=effort or quick(), **changes)
    return AlertmanagerSink(config, deliver(config), clock=clock)


def seconds(text):
    assert RFC3339.fullmatch(text)
    return datetime.fromisoformat(text).timestamp()


def test_a_firing_alert_has_the_fields_of_the_schema(server):
    sink(server, Clock(NOW), generator_url="https://runs.example/7").alert(alert())
    got = server.next()
    assert got.path == "/am/api/v2/alerts"  # the base may have a prefix
    assert got.headers["content-type"] == "application/json"
    [posted] = got.body
    assert posted == {
        "labels": {
            "alertname": "EquipoiseLayerCollapse",
            "rule": "collapse",
            "layer": "blocks.3.moe",
            "expert": "5",
            "severity": "critical",
            "run": "run 7",
            "team": "moe",
        },
        "annotations": {
            "summary": "run 7: collapse in blocks.3.moe, expert 5",
            "description": "blocks.3.moe has collapsed: expert 5 takes 97.0% of the tokens, fair is 25.0%",
            "remedy": "rebalance the layer's bias, or go back to the last known-good router",
            "value": "0.97",
            "threshold": "0.5",
            "since_step": "50",
            "step": "100",
            "runbook_url": "https://runbook.example/runbooks#equipoiselayercollapse",
        },
        "startsAt": posted["startsAt"],
        "endsAt": posted["endsAt"],
        "generatorURL": "https://runs.example/7",
    }
    assert seconds(posted["startsAt"]) == NOW
    assert seconds(posted["endsAt"]) == NOW + 4 * 60  # of a killed process it ends by itself


def test_what_does_not_apply_is_left_out(server):
    sink(server, Clock(NOW), Naming("run 7")).alert(alert(expert=None, layer=""))
    [posted] = server.next().body
    assert set(posted) == {"labels", "annotations", "startsAt", "endsAt"}
    assert set(posted["labels"]) == {"alertname", "rule", "severity", "run"}  # an empty label is no label
    assert "runbook_url" not in posted["annotations"]


def test_it_resolves_with_the_labels_it_fired_with(server):
    """Labels are identity. The latest finding of an alert may be about another expert, and less severe."""
    clock = Clock(NOW)
    ours = sink(server, clock)
    ours.alert(alert())
    clock.now += 600
    ours.alert(alert("resolved", step=400, expert=2, severity="warning"))
    [fired], [resolved] = server.next().body, server.next().body
    assert resolved["labels"] == fired["labels"]
    assert resolved["startsAt"] == fired["startsAt"]
    assert seconds(resolved["endsAt"]) == NOW + 600
    assert resolved["annotations"]["step"] == "400"


def test_one_that_was_not_seen_to_fire_is_resolved_too(server):
    """After a restart. Alertmanager refuses an end before the start; a clock may be set back."""
    clock = Clock(NOW)
    ours = sink(server, clock)
    ours.alert(alert("resolved"))
    [posted] = server.next().body
    assert seconds(posted["startsAt"]) == seconds(posted["endsAt"]) == NOW
    ours.alert(alert())
    clock.now -= 3600
    ours.alert(alert("resolved"))
    server.next()
    [posted] = server.next().body
    assert seconds(posted["endsAt"]) == seconds(posted["startsAt"]) == NOW


def test_what_fires_is_sent_again_and_lives_on(server):
    clock = Clock(NOW)
    ours = sink(server, clock, resend_s=30.0)
    ours.alert(alert())
    ours.alert(alert(layer="blocks.4.moe"))
    server.all()
    clock.now += 29
    ours.tick()
    ours.routing([stats()])
    assert server.all() == []
    clock.now += 1
    ours.routing([stats()])
    ours.tick()
    [again] = server.all()  # both alerts in one message
    assert [posted["labels"]["layer"] for posted in again.body] == ["blocks.3.moe", "blocks.4.moe"]
    assert {seconds(posted["startsAt"]) for posted in again.body} == {NOW}
    assert {seconds(posted["endsAt"]) for posted in again.body} == {NOW + 30 + 4 * 30}
    ours.alert(alert("resolved"))
    server.all()
    clock.now += 30
    ours.tick()
    [again] = server.all()
    assert [posted["labels"]["layer"] for posted in again.body] == ["blocks.4.moe"]


def test_only_changes_are_kept_when_they_fail(server, tmp_path):
    """The next repetition says the same. If they were kept, an hour without a network would leave 60 letters."""
    path, clock = tmp_path / "dead.jsonl", Clock(NOW)
    ours = sink(server, clock, effort=quick(attempts=1, dead_letters=path))
    server.answers.extend([Answer(503)] * 3)
    with pytest.raises(DeliveryError, match="kept in"):
        ours.alert(alert())
    clock.now += 60
    with pytest.raises(DeliveryError, match="it was not to be kept"):
        ours.tick()
    assert len(path.read_text().splitlines()) == 1
    [letter] = [json.loads(line) for line in path.read_text().splitlines()]
    assert letter["key"] == fingerprint(letter["body"][0]["labels"])


def test_a_repair_is_an_annotation_of_its_alert(server):
    ours = sink(server, Clock(NOW))
    ours.action(repair(step=60))  # not known to fire
    ours.alert(alert())
    ours.action(repair(detail={}))
    [fired], [repaired] = (got.body for got in server.all())
    assert repaired["labels"] == fired["labels"]
    told = "quantile_bias on blocks.3.moe at step 120, applied"
    assert repaired["annotations"] == {**fired["annotations"], "action": told}


def test_repairs_stay_with_their_alert_until_its_end(server):
    clock = Clock(NOW)
    ours = sink(server, clock)
    ours.alert(alert())
    ours.action(repair(detail={}))
    clock.now += 60
    ours.tick()
    ours.alert(alert("resolved"))
    ours.action(repair("kept", detail={}))
    told = [got.body[0]["annotations"].get("action", "") for got in server.all()]
    begun = "quantile_bias on blocks.3.moe at step 120"
    assert told == ["", *[f"{begun}, applied"] * 3, f"{begun}, kept"]


def test_what_is_over_is_remembered_for_a_while_only():
    standings = Standings(NAMING)
    for number in range(150):
        standings.take(alert("resolved", layer=f"l{number}"), 1.0)
    noted = [standings.note(repair("kept", reason=f"l{number}:collapse")) for number in range(150)]
    assert [standing is not None for standing in noted] == [False] * 50 + [True] * 100
    assert standings.firing == []


@given(st.text(min_size=1), st.text(), st.text())
def test_any_name_is_a_label(rule, layer, run):
    """Labels are Unicode on one line, of bounded length; the same names always give the same labels."""
    naming = Naming(f"run {run}")
    labels = labels_of(alert(rule=rule, layer=layer), naming)
    assert labels == labels_of(alert("resolved", rule=rule, layer=layer), naming)
    assert re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", labels["alertname"])
    for value in labels.values():
        assert 0 < len(value) <= MAX_LABEL
        assert value.encode().decode() == value
        assert value.isprintable() or not set(value) & {*map(chr, range(32)), "\x7f", "\u2028", "\u202e"}
    assert len(fingerprint(labels)) == 16


def test_names_stay_apart_when_they_are_cut_or_cleaned():
    names = ["a" * 300 + "1", "a" * 300 + "2", "two\nlines", "two lines", "two\tlines", "\u202etwo lines"]
    layers = {labels_of(alert(layer=name), NAMING)["layer"] for name in names}
    assert len(layers) == len(names)


def test_standings_forget_what_is_over():
    standings = Standings(NAMING)
    standings.take(alert(), 1.0)
    assert [standing.starts_at for standing in standings.firing] == [1.0]
    standings.take(alert(), 2.0)
    assert [standing.starts_at for standing in standings.firing] == [1.0]
    standings.take(alert("resolved"), 3.0)
    assert standings.firing == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Naming(" "), "run: expected the run's name, got ' '"),
        (lambda: Naming("r", {"run": "x"}), "labels: expected names .* other than alertname, .*, got 'run'"),
        (lambda: Naming("r", {"a-b": "x"}), "labels: expected names of letters, digits and _ .*, got 'a-b'"),
        (lambda: Naming("r", runbook="javascript:x"), "runbook: expected an address such as"),
        (lambda: Alertmanager("http://a", NAMING, resend_s=0), "resend_s: expected a time above 0 seconds, got 0"),
        (lambda: Alertmanager("http://a", NAMING, generator_url="x"), "generator_url: expected an address such as"),
        (lambda: Alertmanager("am:9093", NAMING).build(), "url: expected an address such as"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
