"""Messages to Slack: blocks, colours, limits, and names that try to be more than names.

Blocks: https://docs.slack.dev/reference/block-kit/blocks (header 150 characters, section 3000, fields 10 x 2000);
attachments: https://docs.slack.dev/legacy/legacy-messaging/legacy-secondary-message-attachments; what is escaped:
https://docs.slack.dev/messaging/formatting-message-text.
"""

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.monitor.sinks.cases import alert, deliver, quick, stats

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
    repair = Action("quantile_bias", "blocks.3.moe", 60, "blocks.3.moe:collapse", {"max_violation": 2.98765})
    for config in (Slack(NAMING, effort=quick()), Slack(NAMING, actions=False, effort=quick())):
        SlackSink(config, deliver(config)).action(repair)
    [got] = server.all()
    assert got.body["text"] == "Repair: run 7: quantile_bias in blocks.3.moe"
    fields = got.body["attachments"][0]["blocks"][1]["fields"]
    assert [field["text"] for field in fields] == [
        "Step\n60",
        "Because of\nblocks.3.moe:collapse",
        "max_violation\n2.988",
    ]


def test_nothing_in_a_name_is_a_mention_or_a_link():
    naming = Naming(HOSTILE, runbook="https://runbook.example/{rule}")
    about = {"rule": HOSTILE, "layer": HOSTILE, "message": HOSTILE, "remedy": HOSTILE}
    repair = Action(HOSTILE, HOSTILE, 1, HOSTILE, {HOSTILE: 1.0})
    for message in (alert_message(alert(**about), naming), action_message(repair, HOSTILE)):
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
    for message in (alert_message(alert(**about), NAMING), action_message(Action(name, name, 1, name, detail), name)):
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
