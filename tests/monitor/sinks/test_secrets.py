"""Secrets reach the server that they are for, and nothing else: no log, no repr, no error, no file, no field.

Every sink with a secret, in every way that a delivery can go wrong, with all loggers of all libraries at DEBUG.
"""

import logging
import traceback
from dataclasses import dataclass

import pytest
from tests.monitor.sinks.cases import Answer, Clock, Server, alert, deliver, finding, quick

from equipoise.monitor.sinks.alertmanager import Alertmanager, AlertmanagerSink
from equipoise.monitor.sinks.background import Background
from equipoise.monitor.sinks.delivery import DeliveryError
from equipoise.monitor.sinks.destination import Destination
from equipoise.monitor.sinks.labels import Naming
from equipoise.monitor.sinks.pagerduty import PagerDuty, PagerDutySink
from equipoise.monitor.sinks.secret import Secret, scrub
from equipoise.monitor.sinks.slack import Slack, SlackSink
from equipoise.monitor.sinks.webhook import Webhook, WebhookSink

KEY = 'r0ut1ng-k3y+with/odd=chars%22&"quote\\'
PATH = "services/T0SECRET/B0SECRET/x0SECRETx"
NAMING = Naming("run 7")


@dataclass(frozen=True)
class Case:
    make: object  # (server's url, effort) -> configuration
    sink: type
    env: str
    value: str  # {url} is the server's
    seen: object  # (what the server received) -> the secret


CASES = {
    "pagerduty": Case(
        lambda url, effort: PagerDuty(NAMING, "THE_SECRET", f"{url}/v2/enqueue", effort=effort),
        PagerDutySink, "THE_SECRET", KEY, lambda got: got.body["routing_key"],
    ),
    "slack": Case(
        lambda url, effort: Slack(NAMING, "THE_SECRET", effort=effort),
        SlackSink, "THE_SECRET", f"{{url}}/{PATH}", lambda got: got.path[1:],
    ),
    "webhook": Case(
        lambda url, effort: Webhook(NAMING, url=f"{url}/in", token_env="THE_SECRET", effort=effort),
        WebhookSink, "THE_SECRET", KEY, lambda got: got.headers["authorization"].removeprefix("Bearer "),
    ),
    "webhook with a secret address": Case(
        lambda url, effort: Webhook(NAMING, url_env="THE_SECRET", effort=effort),
        WebhookSink, "THE_SECRET", f"{{url}}/{PATH}", lambda got: got.path[1:],
    ),
    "alertmanager": Case(
        lambda url, effort: Alertmanager(url, NAMING, token_env="THE_SECRET", effort=effort),
        AlertmanagerSink, "THE_SECRET", KEY, lambda got: got.headers["authorization"].removeprefix("Bearer "),
    ),
}  # fmt: skip
ANSWERS = {
    "delivered": [],
    "refused, and said back": [Answer(400, echo=True)],
    "busy": [Answer(503, echo=True)] * 3,
    "redirected": [Answer(307, {"location": "http://127.0.0.1:1/"}, echo=True)],
    "hanging": None,
    "gone": None,
}


def strings(value, seen=None):
    """Every string that can be reached from an object through its attributes and containers."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, str | bytes):
        yield value if isinstance(value, str) else value.decode("utf-8", "replace")
    elif isinstance(value, dict):
        for pair in value.items():
            yield from strings(pair, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from strings(item, seen)
    elif type(value).__module__.startswith(("equipoise", "httpx", "httpcore", "tenacity")):
        for name in {*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())}:
            yield from strings(getattr(value, name, None), seen)


@pytest.mark.parametrize("way", ANSWERS)
@pytest.mark.parametrize("name", CASES)
def test_no_secret_shows(name, way, tmp_path, monkeypatch, caplog, capfd):
    case, server = CASES[name], Server()
    value = case.value.format(url=server.url)
    monkeypatch.setenv(case.env, value)
    caplog.set_level(logging.DEBUG)
    config = case.make(
        server.url, quick(attempts=2, timeout_s=0.1 if way == "hanging" else 5, dead_letters=tmp_path / "d")
    )
    sink = case.sink(config, deliver(config, Clock()))
    server.answers.extend(ANSWERS[way] or [])
    if way == "hanging":
        server.hold.set()
    if way == "gone":
        server.close()
    texts = [repr(config), str(config), repr(config.destination), repr(sink), repr(sink.delivery)]
    if way == "delivered":
        sink.alert(alert())
    else:
        with pytest.raises(DeliveryError) as caught:
            sink.alert(alert())
        texts += [repr(caught.value), *traceback.format_exception(caught.value)]
        texts += [repr(error) for error in (caught.value.__cause__, caught.value.__context__)]
        texts.append((tmp_path / "d").read_text())
        with Background(sink) as background:
            background.alert(alert("resolved"))
        texts += [repr(background), repr(background.state)]
    received = server.all()
    if way != "gone":
        assert case.seen(received[0]) == (PATH if PATH in value else KEY)  # it did travel
        server.close()
    out = capfd.readouterr()
    texts += [caplog.text, out.out, out.err, *strings(sink), *strings(config)]
    texts += [str(record.__dict__) for record in caplog.records]
    assert any("httpcore" in text for text in caplog.text.splitlines())  # the libraries did log
    for text in texts:
        for part in (KEY, "r0ut1ng", "T0SECRET", "B0SECRET", "x0SECRETx"):
            assert part not in text, text[:400]


@pytest.mark.parametrize("secret", [KEY, KEY * 10], ids=["short", "long"])
def test_a_secret_that_is_cut_in_two_is_not_shown(server, monkeypatch, secret):
    """Only the beginning of an answer is read, and a server may shorten what it quotes."""
    monkeypatch.setenv("THE_SECRET", secret)
    config = Webhook(NAMING, url=server.url, token_env="THE_SECRET", effort=quick(attempts=1))
    ours = WebhookSink(config, deliver(config))
    bodies = [b"x" * shift + secret.encode() * 200 for shift in range(0, len(KEY), 5)]
    bodies += [f"bad token {secret[:length]}...".encode() for length in range(6, len(KEY), 5)]
    for body in bodies:
        server.answers.append(Answer(400, body=body))
        with pytest.raises(DeliveryError, match="HTTP 400") as caught:
            ours.alert(alert())
        shown = str(caught.value)
        assert not any(secret[start : start + 6] in shown for start in range(len(secret) - 5))
    server.answers.append(Answer(400, body=b"bad token: r0u..."))
    with pytest.raises(DeliveryError, match="HTTP 400: bad token: r0u"):  # nothing is given away by that
        ours.alert(alert())


def test_scrub_knows_how_secrets_are_spelt():
    assert scrub('a p"q b p\\"q c p%22q', ['p"q']) == "a *** b *** c ***"
    url = "https://hooks.example/services/T0/B0/x0?k=v1"
    assert (
        scrub(f"to {url}: no /services/T0/B0/x0 with k=v1 at hooks.example", [url])
        == "to https://hooks.example***: no *** with *** at hooks.example"
    )
    assert scrub("nothing here", ["https://hooks.example/"]) == "nothing here"


@pytest.mark.parametrize("value", ["", "  ", "two words", "line\nbreak", "tab\there", "ключ", "nul\x7f"])
def test_a_secret_that_cannot_be_one_is_refused_and_not_shown(monkeypatch, value):
    monkeypatch.setenv("THE_SECRET", value)
    with pytest.raises(ValueError, match="THE_SECRET: expected a secret") as caught:
        Secret("THE_SECRET").read()
    assert not value.strip() or value not in str(caught.value)


def test_a_line_break_at_the_end_is_forgiven(monkeypatch):
    monkeypatch.setenv("THE_SECRET", "token\n")  # as files and `echo` leave it
    assert Secret("THE_SECRET").read() == "token"


@pytest.mark.parametrize(
    "address", ["hunter2", "ftp://hunter2.example/x", "https://me:hunter2@host/", "https://a:hunter2/"]
)
def test_a_bad_secret_address_is_not_shown(monkeypatch, address):
    monkeypatch.setenv("SLACK_WEBHOOK_URL", address)
    with pytest.raises(ValueError, match="SLACK_WEBHOOK_URL: expected") as caught:
        Slack(NAMING).build()
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_secret_must_be_there_from_the_start(monkeypatch):
    monkeypatch.delenv("PAGERDUTY_ROUTING_KEY", raising=False)
    with pytest.raises(
        ValueError, match="PAGERDUTY_ROUTING_KEY: expected a secret in this environment variable, found none"
    ):
        PagerDuty(NAMING).build()
    assert Destination("here", url="https://a").secrets == ()


def test_the_message_itself_may_quote_anything(server, monkeypatch, tmp_path):
    """Only secrets are taken out: an alert whose text happens to hold one is still delivered as it is."""
    monkeypatch.setenv("THE_SECRET", KEY)
    config = PagerDuty(NAMING, "THE_SECRET", server.url, effort=quick())
    PagerDutySink(config, deliver(config)).alert(alert(message="r0ut1ng of layer 3"))
    assert finding(message="r0ut1ng of layer 3").message in server.next().body["payload"]["summary"]
