"""Events to PagerDuty, field by field, and the key that ties them together.

Schema: https://github.com/PagerDuty/api-schema/blob/main/reference/events-v2/openapiv3.json, limits:
https://developer.pagerduty.com/docs/send-alert-event.
"""

import socket
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.monitor.sinks.cases import Answer, Clock, alert, deliver, quick, repair, stats

from equipoise.monitor.sinks.delivery import DeliveryError
from equipoise.monitor.sinks.labels import Naming
from equipoise.monitor.sinks.pagerduty import PagerDuty, PagerDutySink, dedup_key

KEY = "e93facc04764012d7bfb002500d5d1a6"
NOW = 1_790_000_000.0


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("PAGERDUTY_ROUTING_KEY", KEY)


def sink(server, naming=None, effort=None, **changes):
    naming = naming or Naming("run 7", {"team": "moe"}, "https://runbook.example/{rule}")
    config = PagerDuty(naming, url=f"{server.url}/v2/enqueue", effort=effort or quick(), **changes)
    return PagerDutySink(config, deliver(config), clock=Clock(NOW))


def test_trigger_has_the_fields_of_the_schema(server):
    server.answers.append(Answer(202, body=b'{"status":"success","message":"Event processed","dedup_key":"k"}'))
    ours = sink(server, source="node-3")
    ours.routing([stats()])
    ours.alert(alert())
    got = server.next()
    assert got.path == "/v2/enqueue"
    assert got.body == {
        "routing_key": KEY,
        "event_action": "trigger",
        "dedup_key": "run 7:blocks.3.moe:collapse",
        "client": "equipoise",
        "links": [{"href": "https://runbook.example/collapse", "text": "runbook"}],
        "payload": {
            "summary": "run 7: blocks.3.moe has collapsed: expert 5 takes 97.0% of the tokens, fair is 25.0%",
            "source": "node-3",
            "severity": "critical",
            "timestamp": "2026-09-21T14:13:20.000Z",
            "component": "blocks.3.moe",
            "group": "run 7",
            "class": "collapse",
            "custom_details": {
                "alert": "EquipoiseLayerCollapse",
                "layer": "blocks.3.moe",
                "expert": "5",
                "value": 0.97,
                "threshold": 0.5,
                "since_step": 50,
                "step": 100,
                "remedy": "rebalance the layer's bias, or go back to the last known-good router",
                "team": "moe",
            },
        },
    }
    assert datetime.fromisoformat(got.body["payload"]["timestamp"]).timestamp() == NOW


@pytest.mark.parametrize("severity", ["info", "warning", "critical"])
def test_severities_are_pagerdutys(server, severity):
    sink(server, Naming("r")).alert(alert(severity=severity, expert=None))
    body = server.next().body
    assert body["payload"]["severity"] == severity
    assert (body["payload"]["source"], body["links"]) == (socket.gethostname(), [])
    assert body["payload"]["custom_details"]["expert"] == "-"


def test_trigger_acknowledge_and_resolve_have_one_key(server):
    ours = sink(server, acknowledge_repairs=True)
    ours.alert(alert(expert=5))
    ours.action(repair())
    ours.alert(alert("resolved", step=400, expert=2, severity="warning"))
    events = [got.body for got in server.all()]
    assert [event["event_action"] for event in events] == ["trigger", "trigger", "acknowledge", "resolve"]
    assert {event["dedup_key"] for event in events} == {"run 7:blocks.3.moe:collapse"}
    assert {event["routing_key"] for event in events} == {KEY}
    assert events[2].keys() == events[3].keys() == {"routing_key", "event_action", "dedup_key"}


def test_what_is_done_is_told_in_the_details_of_the_open_alert(server):
    """A trigger with the key of an open alert goes into its log: all else in it is as it was."""
    ours = sink(server)
    ours.alert(alert())
    for change in (repair(), repair("undone", note="the loss rose"), repair("failed", kind="spill", note="no path")):
        ours.action(change)
    first, *updates = (got.body for got in server.all())
    told = [update["payload"]["custom_details"].pop("repairs") for update in updates]
    assert updates == [first] * 3
    begun = "quantile_bias on blocks.3.moe at step 120"
    effect = "perplexity 9.974 → 10.07, MaxVio 2.99 before"
    assert told[0] == [f"{begun}, applied, {effect}"]
    assert told[1] == [f"{begun}, undone at once, {effect} (the loss rose)"]
    assert told[2] == [*told[1], "spill on blocks.3.moe at step 120, failed (no path)"]


@pytest.mark.parametrize("state", ["proposed", "applied", "kept", "undone", "failed"])
def test_only_an_applied_repair_acknowledges(server, state):
    ours = sink(server, acknowledge_repairs=True)
    ours.alert(alert())
    ours.action(repair(state))
    events = [got.body["event_action"] for got in server.all()]
    assert events == ["trigger", "trigger"] + ["acknowledge"] * (state == "applied")


def test_a_call_for_a_human_acknowledges_nothing_and_pages_as_any_other_alert(server):
    ours = sink(server, acknowledge_repairs=True)
    ours.alert(alert())
    ours.action(repair(kind="page", note="tried: quantile_bias undone"))
    ours.alert(alert(rule="recovery_exhausted"))
    events = [(got.body["event_action"], got.body["dedup_key"]) for got in server.all()]
    assert events == [
        ("trigger", "run 7:blocks.3.moe:collapse"),
        ("trigger", "run 7:blocks.3.moe:recovery_exhausted"),
    ]


def test_a_repair_opens_no_alert(server):
    """Neither one that is over nor one that this process has not seen: nobody would ever resolve it."""
    ours = sink(server)
    ours.action(repair("undone"))
    ours.alert(alert())
    ours.alert(alert("resolved"))
    ours.action(repair("undone"))
    assert [got.body["event_action"] for got in server.all()] == ["trigger", "resolve"]
    ours.alert(alert())
    assert "repairs" not in server.next().body["payload"]["custom_details"]  # those were the last one's


def test_a_repair_acknowledges_only_when_asked_to(server):
    ours = sink(server)
    ours.action(repair())
    assert server.all() == []
    ours.acknowledge("blocks.3.moe:collapse")
    assert server.next().body["event_action"] == "acknowledge"


def test_the_key_is_the_same_in_another_process_and_per_run(server):
    for _ in range(2):
        sink(server).alert(alert())
    sink(server, Naming("run 8")).alert(alert())
    keys = [got.body["dedup_key"] for got in server.all()]
    assert keys[0] == keys[1] != keys[2]


@given(st.tuples(st.text(max_size=400), st.text(max_size=400)), st.tuples(st.text(max_size=400), st.text(max_size=400)))
def test_different_alerts_have_different_keys(one, other):
    keys = dedup_key(*one), dedup_key(*other)
    assert (keys[0] == keys[1]) == (one == other)
    assert all(0 < len(key) <= 255 for key in keys)


def test_a_colon_moves_nothing_from_run_to_key():
    assert dedup_key("a:b", "c") != dedup_key("a", "b:c")
    assert dedup_key("a%3Ab", "c") != dedup_key("a:b", "c")
    assert dedup_key("r" * 300, "a") != dedup_key("r" * 300, "b")


def test_long_and_hostile_texts_fit(server):
    sink(server, Naming("run\nInjected: x")).alert(alert(message="m\r\n" * 900, layer="l" * 999, rule="ev\x00il"))
    body = server.next().body
    assert len(body["payload"]["summary"]) == 1024
    assert body["payload"]["summary"].startswith("run Injected: x: m  m  ")
    assert len(body["dedup_key"]) == 255
    for name in ("component", "group", "class"):
        assert len(body["payload"][name]) <= 256
        assert body["payload"][name].isprintable()


def test_the_reason_of_a_refusal_is_told(server, tmp_path):
    answer = b'{"status":"invalid event","message":"Event object is invalid","errors":["routing_key is wrong"]}'
    server.answers.append(Answer(400, body=answer))
    with pytest.raises(DeliveryError, match=r"HTTP 400: .*routing_key is wrong"):
        sink(server, effort=quick(dead_letters=tmp_path / "dead")).alert(alert())
    assert KEY not in (tmp_path / "dead").read_text()


def test_a_dead_trigger_is_sent_again_with_the_key_of_today(server, tmp_path, monkeypatch):
    server.answers.append(Answer(403))
    ours = sink(server, effort=quick(dead_letters=tmp_path / "dead"))
    with pytest.raises(DeliveryError):
        ours.alert(alert())
    server.all()
    monkeypatch.setenv("PAGERDUTY_ROUTING_KEY", "a-new-key")  # the old one was wrong
    assert ours.delivery.redeliver().sent == 1
    body = server.next().body
    assert (body["routing_key"], body["dedup_key"]) == ("a-new-key", "run 7:blocks.3.moe:collapse")
