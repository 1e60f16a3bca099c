"""Delivery over real HTTP: what is tried again, how long it waits, and what becomes of what can't be delivered."""

import json
import random
import socket
import sys
import time
from email.utils import formatdate

import pytest
from tests.monitor.sinks.cases import Answer, Clock, Server, quick

from equipoise.monitor.sinks.delivery import Delivery, DeliveryError, Effort, Redelivered, retry_after
from equipoise.monitor.sinks.destination import Destination
from equipoise.monitor.sinks.token_bucket import TokenBucket


def delivery(server, clock=None, name="here", **effort):
    clock = clock or Clock()
    return Delivery(Destination(name, url=f"{server.url}/in"), quick(**effort), clock=clock, sleep=clock.sleep)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class TestTrying:
    def test_json_with_a_bearer_token(self, server, monkeypatch):
        monkeypatch.setenv("HOOK_TOKEN", "s3cret-token")
        to = Destination("here", url=f"{server.url}/in?x=1", token_env="HOOK_TOKEN", headers={"x-team": "moe"})
        Delivery(to, quick()).send({"a": [1, float("nan")]})
        got = server.next()
        assert (got.path, got.body) == ("/in?x=1", {"a": [1, "nan"]})
        assert got.headers["content-type"] == "application/json"
        assert got.headers["authorization"] == "Bearer s3cret-token"
        assert (got.headers["x-team"], got.headers["user-agent"]) == ("moe", "equipoise")

    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
    def test_what_may_pass_is_tried_again(self, server, status):
        server.answers.extend([Answer(status), Answer(status)])
        clock = Clock()
        delivery(server, clock).send({"n": 1})
        assert [got.body for got in server.all()] == [{"n": 1}] * 3
        assert len(clock.slept) == 2

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 413, 422])
    def test_what_is_refused_is_not(self, server, status):
        server.answers.extend([Answer(status, body=b'{"message":"no such\nkey"}')] * 4)
        with pytest.raises(
            DeliveryError, match=f'here: not delivered: HTTP {status}: {{"message":"no such key"}}; it is'
        ):
            delivery(server).send({})
        assert len(server.all()) == 1

    def test_no_redirect_is_followed(self, server):
        server.answers.append(Answer(302, {"location": f"{server.url}/elsewhere"}))
        with pytest.raises(DeliveryError, match="HTTP 302"):
            delivery(server).send({})
        assert [got.path for got in server.all()] == ["/in"]

    def test_tries_come_to_an_end(self, server):
        server.answers.extend([Answer(503, body=b"busy")] * 9)
        with pytest.raises(DeliveryError, match=r"HTTP 503: busy; it is lost: no Effort\.dead_letters was given"):
            delivery(server, attempts=5).send({})
        assert len(server.all()) == 5

    def test_a_server_that_hangs_is_left(self, server):
        server.hold.set()
        with pytest.raises(DeliveryError, match="ReadTimeout"):
            delivery(server, attempts=2, timeout_s=0.1).send({})
        assert len(server.all()) == 2

    def test_nobody_there(self):
        clock = Clock()
        to = Destination("here", url=f"http://127.0.0.1:{free_port()}/")
        with pytest.raises(DeliveryError, match=r"here: not delivered: ConnectError: .*refused"):
            Delivery(to, quick(), clock=clock, sleep=clock.sleep).send({})
        assert len(clock.slept) == 3

    def test_pauses_grow_up_to_a_limit_and_are_random(self, server):
        random.seed(0)  # tenacity draws from the global generator
        runs = []
        for _ in range(4):
            clock = Clock()
            server.answers.extend([Answer(500)] * 7)
            delivery(server, clock, attempts=8, first_wait_s=1.0, longest_wait_s=16.0).send({})
            runs.append(clock.slept)
        limits = [1, 2, 4, 8, 16, 16, 16]
        assert all(0 <= wait <= limit for run in runs for wait, limit in zip(run, limits, strict=True))
        assert max(run[4] for run in runs) > 4  # beyond what the third could be: it does grow
        assert len({run[3] for run in runs}) == 4  # many who failed together do not come back together

    def test_retry_after_is_the_least_pause(self, server):
        server.answers.extend([Answer(429, {"retry-after": "7"}), Answer(503, {"retry-after": "30"})])
        clock = Clock()
        delivery(server, clock, first_wait_s=0.5).send({})
        assert clock.slept[:2] == [7.0, 30.0]

    def test_a_longer_retry_after_is_not_waited_for(self, server, tmp_path):
        server.answers.append(Answer(429, {"retry-after": "3600"}))
        clock, path = Clock(), tmp_path / "dead.jsonl"
        with pytest.raises(DeliveryError, match=r"asks to wait 3600 s, longer than longest_wait_s.* it is kept in"):
            delivery(server, clock, dead_letters=path).send({})
        assert (len(server.all()), clock.slept, len(lines(path))) == (1, [], 1)

    def test_retry_after_may_be_a_date(self):
        now = 1_790_000_000.0
        assert retry_after(formatdate(now + 90, usegmt=True), now) == 90
        assert retry_after(formatdate(now - 90, usegmt=True), now) == 0
        assert [retry_after(text, now) for text in ("12", "", "soon", "-5", "1e9")] == [12, 0, 0, 0, 0]

    def test_a_variable_that_is_gone_is_no_reason_to_try_again(self, server, monkeypatch):
        monkeypatch.setenv("HOOK_TOKEN", "s3cret-token")
        clock = Clock()
        to = Destination("here", url=server.url, token_env="HOOK_TOKEN")
        ours = Delivery(to, quick(), clock=clock, sleep=clock.sleep)
        monkeypatch.delenv("HOOK_TOKEN")
        with pytest.raises(DeliveryError, match="HOOK_TOKEN: expected a secret in this environment variable"):
            ours.send({})
        assert clock.slept == []

    def test_a_proxy_is_not_used_for_this_machine(self, server, monkeypatch):
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
        delivery(server).send({})
        assert len(server.all()) == 1

    def test_a_proxy_is_used_for_others(self, server, monkeypatch):
        monkeypatch.setenv("http_proxy", server.url)
        monkeypatch.delenv("no_proxy", raising=False)
        Delivery(Destination("far", url="http://alerts.invalid/in"), quick(attempts=1)).send({"n": 1})
        assert server.next().path == "http://alerts.invalid/in"


class TestRate:
    def test_a_burst_and_then_one_per_second(self, server):
        clock = Clock(100.0)
        ours = delivery(server, clock, per_minute=60, burst=3)
        at = []
        for n in range(6):
            ours.send({"n": n})
            at.append(clock.now)
        assert at == [100, 100, 100, 101, 102, 103]
        assert [got.body["n"] for got in server.all()] == [0, 1, 2, 3, 4, 5]

    def test_tries_count(self, server):
        clock = Clock()
        server.answers.extend([Answer(500), Answer(500)])
        delivery(server, clock, per_minute=60, burst=1, first_wait_s=0.0, longest_wait_s=1.0).send({})
        assert [wait for wait in clock.slept if wait] == [1.0, 1.0]

    def test_the_bucket_fills_while_nothing_is_sent(self):
        clock = Clock()
        bucket = TokenBucket(per_second=0.5, burst=2, clock=clock)
        assert [bucket.take() for _ in range(4)] == [0, 0, 2, 4]
        clock.now += 4  # pays the debt of two tokens
        assert bucket.take() == 2
        clock.now += 1000  # no more than the burst is saved
        assert [bucket.take() for _ in range(3)] == [0, 0, 2]

    def test_a_rate_must_be_one(self):
        with pytest.raises(ValueError, match="per_second: expected a number above 0, got 0"):
            TokenBucket(0, 1, time.monotonic)


class TestDeadLetters:
    def test_kept_and_sent_again_in_order(self, tmp_path):
        path, port = tmp_path / "letters" / "dead.jsonl", free_port()
        clock = Clock()
        effort = quick(attempts=2, dead_letters=path)
        ours = Delivery(Destination("here", url=f"http://127.0.0.1:{port}"), effort, clock=clock, sleep=clock.sleep)
        for n in range(3):
            with pytest.raises(DeliveryError, match=r"it is kept in .*dead\.jsonl, `redeliver` sends it again"):
                ours.send({"n": n})
        kept = lines(path)
        assert [(letter["destination"], letter["body"]) for letter in kept] == [("here", {"n": n}) for n in range(3)]
        assert "refused" in kept[0]["reason"]
        assert ours.redeliver() == Redelivered(sent=0, kept=3, outdated=0)  # still nobody there
        assert [letter["body"] for letter in lines(path)] == [letter["body"] for letter in kept]
        server = Server(port)
        assert ours.redeliver(path) == Redelivered(sent=3, kept=0, outdated=0)
        assert [got.body["n"] for got in server.all()] == [0, 1, 2]
        assert ours.redeliver() == Redelivered(sent=0, kept=0, outdated=0)
        assert list(path.parent.iterdir()) == []
        server.close()

    def test_one_that_is_refused_does_not_block_the_others(self, server, tmp_path):
        path = tmp_path / "dead.jsonl"
        ours = delivery(server, attempts=1, dead_letters=path)
        for n in range(3):
            server.answers.append(Answer(503))
            with pytest.raises(DeliveryError):
                ours.send({"n": n})
        server.all()
        server.answers.extend([Answer(400), Answer(200), Answer(503)])
        assert ours.redeliver() == Redelivered(sent=1, kept=2, outdated=0)
        assert [letter["body"]["n"] for letter in lines(path)] == [0, 2]
        server.all()
        server.answers.append(Answer(503))  # down again: the others are not tried
        assert ours.redeliver() == Redelivered(sent=0, kept=2, outdated=0)
        assert len(server.all()) == 1

    def test_one_that_is_out_of_date_is_not_sent(self, server, tmp_path):
        """The trigger failed, the resolve got through: sending the trigger now would open what is closed."""
        path = tmp_path / "dead.jsonl"
        server.answers.extend([Answer(503), Answer(503), Answer(200)])
        ours = delivery(server, attempts=1, dead_letters=path)
        for key in ("a", "b"):
            with pytest.raises(DeliveryError):
                ours.send({"trigger": key}, key=key)
        # another process goes on with the same file, and knows what is in it
        again = delivery(server, attempts=1, dead_letters=path)
        again.send({"resolve": "a"}, key="a")
        server.all()
        assert again.redeliver() == Redelivered(sent=1, kept=0, outdated=1)
        assert [got.body for got in server.all()] == [{"trigger": "b"}]

    def test_a_file_may_be_shared_and_damaged(self, server, tmp_path):
        path = tmp_path / "dead [1].jsonl"
        server.answers.extend([Answer(404), Answer(404)])
        for name in ("one", "two"):
            with pytest.raises(DeliveryError):
                delivery(server, name=name, dead_letters=path).send({"for": name})
        with path.open("a") as file:
            file.write('{"destination": "one", "bo')  # a crash in the middle of a line
        server.all()
        assert delivery(server, name="one", dead_letters=path).redeliver() == Redelivered(1, 0, 0)
        assert [got.body for got in server.all()] == [{"for": "one"}]
        assert delivery(server, name="two", dead_letters=path).redeliver() == Redelivered(1, 0, 0)
        assert path.read_text() == '{"destination": "one", "bo\n'

    def test_a_redelivery_that_was_killed_is_taken_up(self, server, tmp_path):
        path = tmp_path / "dead.jsonl"
        ours = delivery(server, attempts=1, dead_letters=path)
        for n in range(12):
            server.answers.append(Answer(404))
            with pytest.raises(DeliveryError):
                ours.send({"n": n})
            path.rename(tmp_path / f"dead.jsonl.{n + 1}.taken")  # what a killed one leaves, a dozen times
        server.all()
        assert ours.redeliver() == Redelivered(sent=12, kept=0, outdated=0)
        assert [got.body["n"] for got in server.all()] == list(range(12))
        assert list(tmp_path.iterdir()) == []

    def test_without_a_file(self, server):
        with pytest.raises(ValueError, match=r"path: expected a dead-letter file, got None; name it here or in Effort"):
            delivery(server).redeliver()

    def test_a_file_that_cannot_be_written_is_said(self, server, tmp_path):
        (tmp_path / "file").write_text("")
        server.answers.append(Answer(404))
        with pytest.raises(DeliveryError, match=r"HTTP 404: ok; it is lost: .*File exists"):
            delivery(server, dead_letters=tmp_path / "file" / "dead.jsonl").send({})


class TestConfiguration:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"timeout_s": 0}, "timeout_s: expected a number above 0, got 0"),
            ({"attempts": 0}, "attempts: expected a number above 0, got 0"),
            (
                {"first_wait_s": 9, "longest_wait_s": 3},
                r"first_wait_s: expected 0 to longest_wait_s = 3 seconds, got 9",
            ),
        ],
    )
    def test_an_effort_that_makes_no_sense(self, values, message):
        with pytest.raises(ValueError, match=message):
            Effort(**values)

    @pytest.mark.parametrize(
        "url", ["", "localhost:9093", "ftp://host/x", "http://", "http://host:port/", "http://host:0"]
    )
    def test_what_is_no_url(self, url):
        with pytest.raises(ValueError, match="url: expected an address such as https://host/path, got"):
            Destination("here", url=url)

    @pytest.mark.parametrize(
        "url", ["https://me:hunter2@host/x", "https://me:hunter2@host:port/x", "https://hunter2@host"]
    )
    def test_a_password_in_a_url_is_refused_and_not_shown(self, url):
        with pytest.raises(ValueError, match="expected a URL without user and password") as caught:
            Destination("here", url=url)
        assert "hunter2" not in str(caught.value)

    def test_one_url_and_not_two(self):
        for values, got in (({}, "neither"), ({"url": "https://a", "url_env": "B"}, "both")):
            with pytest.raises(ValueError, match=f"here: expected one of url and url_env, got {got}"):
                Destination("here", **values)

    @pytest.mark.parametrize("package", ["httpx", "tenacity"])
    def test_a_missing_package_names_the_extra(self, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            ImportError, match=rf"need {package}, which is not installed; pip install 'equipoise\[alerts\]'"
        ):
            Delivery(Destination("here", url="https://a"))
