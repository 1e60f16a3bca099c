"""The generic webhook sends what Alertmanager sends: version 4 of its payload, field by field.

Schema: https://prometheus.io/docs/alerting/latest/configuration/#webhook_config. test_real_alertmanager.py compares it
with what Alertmanager itself sends.
"""

from tests.monitor.sinks.cases import Clock, alert, deliver, quick, repair, stats

from equipoise.monitor.sinks.labels import Naming, fingerprint
from equipoise.monitor.sinks.webhook import Webhook, WebhookSink

NOW = 1_790_000_000.0
STARTED, ENDED = "2026-09-21T14:13:20.000Z", "2026-09-21T14:14:50.000Z"  # NOW, and 90 s later


def sink(server, clock, **changes):
    config = Webhook(Naming("run 7"), url=f"{server.url}/in", effort=quick(), **changes)
    return WebhookSink(config, deliver(config), clock=clock)


def test_firing_and_resolved(server):
    clock = Clock(NOW)
    ours = sink(server, clock, receiver="pager", external_url="https://runs.example/7")
    ours.routing([stats()])
    ours.alert(alert())
    clock.now += 90
    ours.alert(alert("resolved", expert=1))
    fired, resolved = (got.body for got in server.all())
    labels = {
        "alertname": "EquipoiseLayerCollapse",
        "rule": "collapse",
        "layer": "blocks.3.moe",
        "expert": "5",
        "severity": "critical",
        "run": "run 7",
    }
    annotations = fired["commonAnnotations"]
    assert annotations["summary"] == "run 7: collapse in blocks.3.moe, expert 5"
    assert fired == {
        "version": "4",
        "groupKey": '{}:{alertname="EquipoiseLayerCollapse", layer="blocks.3.moe", run="run 7"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "pager",
        "groupLabels": {"alertname": "EquipoiseLayerCollapse", "layer": "blocks.3.moe", "run": "run 7"},
        "commonLabels": labels,
        "commonAnnotations": annotations,
        "externalURL": "https://runs.example/7",
        "alerts": [
            {
                "status": "firing",
                "labels": labels,
                "annotations": annotations,
                "startsAt": STARTED,
                "endsAt": "0001-01-01T00:00:00Z",
                "generatorURL": "https://runs.example/7",
                "fingerprint": fingerprint(labels),
            }
        ],
    }
    assert resolved["status"] == "resolved"
    assert resolved["groupKey"] == fired["groupKey"]
    [over], [was] = resolved["alerts"], fired["alerts"]
    assert (over["status"], over["startsAt"], over["endsAt"]) == ("resolved", STARTED, ENDED)
    assert (over["labels"], over["fingerprint"]) == (was["labels"], was["fingerprint"])


def test_a_repair_sends_its_alert_again(server):
    ours = sink(server, Clock(NOW))
    ours.alert(alert())
    ours.action(repair())
    ours.action(repair(reason="blocks.9.moe:collapse"))  # no such alert
    ours.action(repair(kind="page"))  # an alert of its own says so
    fired, repaired = (got.body for got in server.all())
    assert repaired["alerts"][0]["fingerprint"] == fired["alerts"][0]["fingerprint"]
    assert repaired["alerts"][0]["annotations"]["action"] == (
        "quantile_bias on blocks.3.moe at step 120, applied, perplexity 9.974 → 10.07, MaxVio 2.99 before"
    )


def test_each_repair_is_told_as_it_stands_the_newest_first(server):
    ours = sink(server, Clock(NOW))
    ours.alert(alert())
    for change in (repair(), repair("undone", note="the loss rose"), repair(kind="spill", detail={})):
        ours.action(change)
    *_, last = (got.body for got in server.all())
    assert last["alerts"][0]["annotations"]["action"] == (
        "spill on blocks.3.moe at step 120, applied; quantile_bias on blocks.3.moe at step 120, undone at once, "
        "perplexity 9.974 → 10.07, MaxVio 2.99 before (the loss rose)"
    )


def test_a_repair_that_is_kept_when_its_alert_is_over_is_told(server):
    ours = sink(server, Clock(NOW))
    ours.alert(alert())
    ours.action(repair())
    ours.alert(alert("resolved"))
    ours.action(repair("kept", note="the alert is resolved"))
    ours.action(repair("proposed", kind="spill"))  # about nothing that fires
    over, kept = [got.body for got in server.all()][2:]
    assert (over["status"], kept["status"]) == ("resolved", "resolved")
    assert ", applied, " in over["alerts"][0]["annotations"]["action"]
    assert kept["alerts"][0]["annotations"]["action"] == (
        "quantile_bias on blocks.3.moe at step 120, kept after 20 steps, perplexity 9.974 → 9.875, MaxVio 2.99 → 0.25 "
        "(the alert is resolved)"
    )
    assert kept["alerts"][0]["endsAt"] == over["alerts"][0]["endsAt"]
    ours.alert(alert())
    assert "action" not in server.next().body["alerts"][0]["annotations"]  # another incident


def test_no_repair_left_is_an_alert_of_its_own(server):
    ours = sink(server, Clock(NOW))
    ours.alert(alert(rule="recovery_exhausted", expert=None))
    labels = server.next().body["alerts"][0]["labels"]
    assert (labels["alertname"], labels["severity"]) == ("EquipoiseRecoveryExhausted", "critical")


def test_hostile_names_stay_inside_their_quotes(server):
    layer = 'a"} evil{x="\\'
    sink(server, Clock(NOW)).alert(alert(layer=layer, expert=None))
    body = server.next().body
    assert body["groupLabels"]["layer"] == layer
    assert body["groupKey"] == '{}:{alertname="EquipoiseLayerCollapse", layer="a\\"} evil{x=\\"\\\\", run="run 7"}'
