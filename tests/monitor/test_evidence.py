"""Evidence on its way from a server: nothing is lost, and what is not evidence is refused."""

import json
import math
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from tests.monitor.test_triage import APPLIED, COLLAPSED, FAIR, UNDONE, alert, flush, run_of

from equipoise.monitor.evidence import Serving, evidence_of
from equipoise.monitor.evidence_http import KEY, PATH, evidence_of_url
from equipoise.monitor.evidence_wire import FORMAT, EvidenceError, from_json, to_json
from equipoise.monitor.store import RunStore
from equipoise.monitor.triage import triage

LIVE = Serving("/srv/serving", 8001, "step-000120", 1, True, "", ("b: collapse",), (), 2, 256)


def whole():
    """Evidence with everything in it, NaN and infinity too."""
    scalars = {"queue_depth": ((1, 0.0), (2, math.nan)), "tokens_per_s": ((2, math.inf),)}
    return run_of(COLLAPSED, actions=(APPLIED, UNDONE), alerts=(alert(),), kind="server", serving=LIVE, scalars=scalars)


def sent():
    return json.loads(json.dumps(to_json(whole()), allow_nan=False))


def test_there_and_back():
    before, after = whole(), from_json(sent())
    assert triage(after) == triage(before)
    assert (after.serving, after.alerts, after.actions, after.times) == (
        LIVE,
        before.alerts,
        before.actions,
        before.times,
    )
    assert after.scalars["tokens_per_s"] == ((2, math.inf),)
    assert math.isnan(after.scalars["queue_depth"][1][1])
    for old, new in zip(before.routing["b"], after.routing["b"], strict=True):
        np.testing.assert_array_equal(new.counts_E, old.counts_E)
        np.testing.assert_equal(vars(new) | {"counts_E": 0}, vars(old) | {"counts_E": 0})


def broken(change):
    record = sent()
    change(record)
    return record


HOSTILE = {
    "another format": lambda r: r.update(format="x"),
    "a field is missing": lambda r: r.pop("alerts"),
    "no serving": lambda r: r.pop("serving"),
    "routing is a list": lambda r: r.update(routing=[]),
    "negative counts": lambda r: r["routing"]["b"][0].update(counts_E=[-1] * 8),
    "huge counts": lambda r: r["routing"]["b"][0].update(counts_E=[10**30] * 8),
    "no counts": lambda r: r["routing"]["b"][0].update(counts_E=[]),
    "counts that are text": lambda r: r["routing"]["b"][0].update(counts_E="12345678"),
    "other experts in between": lambda r: r["routing"]["b"][0].update(counts_E=[1, 2]),
    "steps that fall": lambda r: r["routing"]["b"].reverse(),
    "a step that is none": lambda r: r["routing"]["b"][0].update(step="1"),
    "a share that is text": lambda r: r["routing"]["b"][0].update(max_token_share="much"),
    "drops that are a list": lambda r: r["routing"]["b"][0].update(dropped=[1]),
    "an alert in no state": lambda r: r["alerts"][0].update(state="maybe"),
    "an alert that is severe": lambda r: r["alerts"][0]["finding"].update(severity="[red]"),
    "an alert whose message is none": lambda r: r["alerts"][0]["finding"].update(message=["x"]),
    "an action in no state": lambda r: r["actions"][0].update(state="maybe"),
    "an action's text as a number": lambda r: r["actions"][0].update(detail={"loss_before": "x"}),
    "a port that is a command": lambda r: r["serving"].update(admin_port="1; rm"),
    "a folder that is none": lambda r: r["serving"].update(folder=None),
    "a time beyond all": lambda r: r.update(times=[[1, "inf"]]),
    "a point too short": lambda r: r["scalars"].update(queue_depth=[[1]]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_not_evidence_is_refused(change):
    with pytest.raises(EvidenceError):
        from_json(broken(change))


@pytest.mark.parametrize("record", [None, [], "x", {}, {"format": FORMAT}])
def test_what_is_nothing_like_it(record):
    with pytest.raises(EvidenceError):
        from_json(record)


def test_text_is_made_printable_and_cut():
    found = from_json(broken(lambda r: r["alerts"][0]["finding"].update(message="\x1b[2Jgone\n" + "x" * 10_000)))
    message = found.alerts[0].finding.message
    assert message.isprintable()
    assert len(message) == 2000


class TestThinned:
    @pytest.fixture
    def store(self, tmp_path):
        with RunStore(tmp_path / "run") as store:
            store.set_meta(kind="server", name="it")
            for step in range(400):
                store.routing([flush("a", step, FAIR if step != 2 else COLLAPSED)])
                store.scalars(step, {"queue_depth": float(step), "loss": 1.0})
            yield store

    def test_what_is_new_is_whole_and_of_what_is_old_there_is_less(self, store):
        steps = [stats.step for stats in evidence_of(store, most_bytes=200_000).routing["a"]]
        assert steps[0] == 0
        assert steps[-40:] == list(range(360, 400))
        assert len(steps) < 130  # half of the bytes, at 956 a record: 104, and one more old one
        assert len(json.dumps(to_json(evidence_of(store, most_bytes=200_000)))) < 200_000

    def test_without_a_limit_all_of_it(self, store):
        found = evidence_of(store)
        assert len(found.routing["a"]) == len(found.scalars["queue_depth"]) == 400
        assert found.is_server
        assert "loss" not in found.scalars


# ------------------------------------------------------------------------------------------------------ over HTTP


@contextmanager
def answering(status=200, body=b"", length=None, headers=()):
    """A server that always gives this answer; yields its address and the requests it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            got.append((self.path, self.headers.get("authorization")))
            self.send_response(status)
            self.send_header("content-length", str(len(body) if length is None else length))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_asked_with_its_key():
    with answering(body=json.dumps(to_json(whole())).encode()) as (url, got):
        assert triage(evidence_of_url(f"{url}/", {})) == triage(whole())
        evidence_of_url(url, {KEY: "a-key-of-the-server"})
    assert got == [(PATH, None), (PATH, "Bearer a-key-of-the-server")]


@pytest.mark.parametrize(
    ("answer", "environment", "message"),
    [
        ({"status": 401}, {}, f"asks for an API key; set {KEY}"),
        ({"status": 401}, {KEY: "secret-key-of-another"}, f"does not know the key in {KEY}"),
        ({"status": 404}, {}, "expected a server of equipoise, got status 404"),
        ({"status": 302, "headers": [("location", "http://127.0.0.1:1/")]}, {}, "got status 302"),
        ({"body": b"<html>"}, {}, "expected JSON from a server of equipoise"),
        ({"body": b"[" * 100_000}, {}, "expected JSON from a server of equipoise"),
        ({"body": b'{"status": "ok"}'}, {}, "the answer is not evidence: expected the format"),
        ({"body": b'{"form', "length": 100}, {}, "the answer breaks off"),
        ({"body": b"{}", "headers": [("content-encoding", "gzip")]}, {}, "the answer breaks off"),
    ],
)
def test_answers_that_are_none(answer, environment, message):
    with answering(**answer) as (url, _), pytest.raises(EvidenceError) as caught:
        evidence_of_url(url, environment)
    assert message in str(caught.value)
    assert url in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_answer_without_end(monkeypatch):
    monkeypatch.setattr("equipoise.monitor.evidence_http.MAX_BYTES", 1000)
    with answering(body=b" " * 2000) as (url, _), pytest.raises(EvidenceError, match="expected at most 1,000 bytes"):
        evidence_of_url(url, {})


@pytest.mark.parametrize(
    "url", ["http://name:secret@127.0.0.1:1", "http://", "http://[", "http://127.0.0.1:1/?key=secret"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(EvidenceError, match=f"expected one such as http://127.0.0.1:8000.*{KEY}") as caught:
        evidence_of_url(url, {})
    assert "secret" not in str(caught.value)


def test_nobody_there_and_a_port_that_is_none():
    with pytest.raises(EvidenceError, match="nothing answers there"):
        evidence_of_url("http://127.0.0.1:1", {})
    with pytest.raises(EvidenceError, match="no address of a server"):
        evidence_of_url("http://127.0.0.1:x", {})


def test_one_that_never_answers(monkeypatch):
    monkeypatch.setattr("equipoise.monitor.evidence_http.WAIT_S", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(EvidenceError, match=r"no answer within 0.2 s"),
    ):
        evidence_of_url(f"http://127.0.0.1:{silent.getsockname()[1]}", {})


def test_a_key_that_no_header_can_carry_is_not_shown():
    with pytest.raises(EvidenceError, match=KEY) as caught:
        evidence_of_url("http://127.0.0.1:1", {KEY: "secret\nx"})
    assert "secret" not in str(caught.value)
