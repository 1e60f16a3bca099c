"""Messages to Slack: blocks, colours, limits, and names that try to be more than names.

Blocks: https://docs.slack.dev/reference/block-kit/blocks (header 150 characters, section 3000, fields 10 x 2000);
attachments: https://docs.slack.dev/legacy/legacy-messaging/legacy-secondary-message-attachments; what is escaped:
https://docs.slack.dev/messaging/formatting-message-text.
"""

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.monitor.sinks.cases import alert, deliver, quick, repair, stats

from equipoise.monitor.sinks.labels import Naming
from equipoise.monitor.sinks.slack import Slack, SlackSink, action_message, alert_message
from equipoise.types import Action

NAMING = Naming("run 7", runbook="https://runbook.example/{rule}?a=1&b=2")
HOSTILE = "<!channel> <@U123> <https://evil.example|click> & *bold* `code` :bomb:\n*new line*"


def texts(message):
    """Every text object in a message."""
    [attachment] = message["attachments"]
    for block in attachment["blocks"]:
        yield from (block[name] for name in ("text",) if name in block)
        yield from (*block.get("fields", []), *block.get("elements", []))


def test_an_alert_that_fires(server, monkeypatch):
    monkeypatch.setenv("SLACK_WEBHOOK_URL", f"{server.url}/services/T/B/x")
    config = Slack(NAMING, effort=quick())
    ours = SlackSink(config, deliver(config))
    ours.routing([stats()])
    ours.alert(alert())
    got = server.next()
    assert got.path == "/services/T/B/x"
    title = "Critical: run 7: collapse in blocks.3.moe, expert 5"
    plain = {"type": "plain_text", "emoji": False}
    remedy = "What to do: rebalance the layer's bias, or go back to the last known-good router"
    fields = ["Layer\nblocks.3.moe", "Expert\n5", "Value\n0.97 (limit 0.5)", "Steps\nsince 50, now 100"]
    link = "<https://runbook.example/collapse?a=1&amp;b=2|Runbook>"
    assert got.body == {
        "text": title,
        "mrkdwn": False,
        "attachments": [
            {
                "color": "#d32f2f",
                "fallback": title,
                "blocks": [
                    {"type": "header", "text": {**plain, "text": title}},
                    {"type": "section", "text": {**plain, "text": alert().finding.message}},
                    {"type": "section", "fields": [{**plain, "text": field} for field in fields]},
                    {"type": "section", "text": {**plain, "text": remedy}},
                    {"type": "context", "elements": [{"type": "mrkdwn", "text": link}]},
                ],
            }
        ],
    }


def test_colours_say_how_bad_it_is():
    colours = [
        alert_message(alert(severity=name), NAMING)["attachments"][0]["color"]
        for name in ("critical", "warning", "info")
    ]
    over = alert_message(alert("resolved"), NAMING)
    assert len({*colours, over["attachments"][0]["color"]}) == 4
    assert over["text"] == "Resolved: run 7: collapse in blocks.3.moe, expert 5"
    assert not any("What to do" in text["text"] for text in texts(over))


def test_repairs_are_posted_unless_they_are_not_wanted(server, monkeypatch):
    monkeypatch.setenv("SLACK_WEBHOOK_URL", server.url)
    for config in (Slack(NAMING, effort=quick()), Slack(NAMING, actions=False, effort=quick())):
        SlackSink(config, deliver(config)).action(repair(detail={"max_violation": 2.98765}))
    [got] = server.all()
    assert got.body["text"] == "Repair applied: run 7: quantile_bias on blocks.3.moe"
    header, fields = got.body["attachments"][0]["blocks"]
    assert header["text"]["text"] == got.body["text"]
    assert [field["text"] for field in fields["fields"]] == [
        "State\napplied",
        "Step\n120",
        "Because of\nblocks.3.moe:collapse",
        "Numbers\nmax_violation 2.988",
    ]


def test_the_end_of_a_repair_has_its_effect_and_its_reason(server, monkeypatch):
    monkeypatch.setenv("SLACK_WEBHOOK_URL", server.url)
    config = Slack(NAMING, effort=quick())
    ours = SlackSink(config, deliver(config))
    ours.action(repair())
    ours.action(repair("kept", step=140, note="the alert <is> resolved"))
    _, kept = (got.body for got in server.all())
    assert kept["text"] == "Repair kept: run 7: quantile_bias on blocks.3.moe"
    _, fields, note = kept["attachments"][0]["blocks"]
    assert [field["text"] for field in fields["fields"]] == [
        "State\nkept after 20 steps",
        "Step\n140",
        "Because of\nblocks.3.moe:collapse",
        "Effect\nperplexity 9.974 → 9.875, MaxVio 2.99 → 0.25",
    ]
    assert note["text"]["text"] == "the alert &lt;is&gt; resolved"


def test_how_a_repair_went_has_a_colour():
    states = ("proposed", "applied", "kept", "undone", "failed")
    colours = [action_message(repair(state), "run 7")["attachments"][0]["color"] for state in states]
    assert colours == ["#757575", "#1976d2", "#2e7d32", "#f9a825", "#f9a825"]


def test_a_call_for_a_human_is_posted_once_as_an_alert(server, monkeypatch):
    monkeypatch.setenv("SLACK_WEBHOOK_URL", server.url)
    config = Slack(NAMING, effort=quick())
    ours = SlackSink(config, deliver(config))
    ours.action(repair(kind="page"))
    ours.alert(alert(rule="recovery_exhausted", expert=None))
    [got] = server.all()
    assert got.body["text"] == "Critical: run 7: recovery_exhausted in blocks.3.moe"


def test_nothing_in_a_name_is_a_mention_or_a_link():
    naming = Naming(HOSTILE, runbook="https://runbook.example/{rule}")
    about = {"rule": HOSTILE, "layer": HOSTILE, "message": HOSTILE, "remedy": HOSTILE}
    hostile = Action(HOSTILE, HOSTILE, 1, HOSTILE, {HOSTILE: 1.0}, "undone", HOSTILE)
    for message in (alert_message(alert(**about), naming), action_message(hostile, HOSTILE)):
        shown = [message["text"], message["attachments"][0]["fallback"]]
        for text in texts(message):
            if text["type"] == "mrkdwn":  # only the link that is ours
                assert text["text"].startswith("<https://runbook.example/")
                assert (text["text"].count("<"), text["text"].count("|"), text["text"].count(">")) == (1, 1, 1)
            else:
                shown.append(text["text"])
        for text in shown:
            assert "<" not in text
            assert ">" not in text
            assert "&" not in text.replace("&amp;", "").replace("&lt;", "").replace("&gt;", "")
        assert HOSTILE.split("\n")[0] in html.unescape(shown[0])  # it is all there, as text


@given(
    st.text(alphabet="&<>ab\n\u202e", max_size=4000), st.dictionaries(st.text(max_size=300), st.floats(), max_size=20)
)
def test_limits_hold_with_their_escapes(name, detail):
    about = {"rule": name, "layer": name, "message": name, "remedy": name}
    repaired = action_message(Action(name, name, 1, name, detail, "kept", name), name)
    for message in (alert_message(alert(**about), NAMING), repaired):
        for block in message["attachments"][0]["blocks"]:
            assert len(block.get("fields", [])) <= 10
            limit = 150 if block["type"] == "header" else 3000
            assert 0 < len(block.get("text", {"text": "-"})["text"]) <= limit
            for field in block.get("fields", []):
                assert 0 < len(field["text"]) <= 2000
                assert field["text"].count("\n") == 1
            for text in texts(message):  # no escape is cut in two
                assert "&" not in text["text"].replace("&amp;", "").replace("&lt;", "").replace("&gt;", "")


def test_the_address_must_be_in_the_environment(monkeypatch):
    monkeypatch.delenv("SLACK_WEBHOOK_URL", raising=False)
    with pytest.raises(
        ValueError, match="SLACK_WEBHOOK_URL: expected a secret in this environment variable, found none"
    ):
        Slack(NAMING).build()
