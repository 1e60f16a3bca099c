"""Health is what the engine does: a flag cannot say that a thread has ended, or that a step never does."""

import dataclasses
import threading

import httpx
import pytest
from tests.serve.api.serving import byte_tokenizer, running, wait_until

from equipoise.serve.api.served import Bounds
from equipoise.serve.reference import SlowEngine


def status(server, path: str) -> tuple[int, str]:
    response = httpx.get(server.url + path)
    body = response.json()
    return response.status_code, body["status"] if "status" in body else body["error"]["message"]


def test_a_server_that_works_is_well(server, client):
    client.completions.create(model="tiny", prompt="x", max_tokens=3, extra_body={"ignore_eos": True})
    assert status(server, "/health/live") == status(server, "/health/ready") == (200, "ok")
    body = httpx.get(f"{server.url}/health").json()
    assert (body["status"], body["reasons"]) == ("ok", [])
    assert body["num_steps"] >= 3
    assert body["seconds_without_progress"] == body["num_open"] == 0


def test_before_its_start_it_is_alive_and_not_ready(model):
    with running(model, start=False) as own:
        assert status(own, "/health/live") == (200, "ok")
        assert status(own, "/health/ready") == (503, "the engine has not been started")
        assert status(own, "/health") == (503, "down")
        own.served.loop.start()
        assert status(own, "/health/ready") == (200, "ok")


def test_while_it_drains_it_is_alive_and_not_ready(model):
    with running(model) as own:
        own.served.loop.drain(5)
        assert status(own, "/health/live") == (200, "ok")
        assert status(own, "/health/ready") == (503, "the server is shutting down")
        assert httpx.get(f"{own.url}/health").json()["reasons"] == ["the server is shutting down"]


def test_a_step_that_does_not_end_is_noticed(model):
    """Without open requests there is nothing to do, and nothing wrong."""
    bounds = Bounds(stall_seconds=0.05)
    with running(model, change=lambda served: dataclasses.replace(served, bounds=bounds)) as own:
        go = threading.Event()
        own.served.loop.between_steps(go.wait)
        asking = threading.Thread(
            target=httpx.post, args=(f"{own.url}/v1/completions",), kwargs={"json": {"model": "tiny", "prompt": "x"}}
        )
        try:
            assert status(own, "/health/live") == (200, "ok")
            asking.start()
            assert wait_until(lambda: status(own, "/health/live")[0] == 503)
            assert "1 requests are open, and the engine has made no progress for" in status(own, "/health/live")[1]
            assert status(own, "/health/ready")[0] == 503
        finally:
            go.set()
        asking.join()
        assert wait_until(lambda: status(own, "/health/live") == (200, "ok"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_has_ended_is_noticed(model):
    class Broken(SlowEngine):
        """An engine with a bug of its own: not a request that fails, but the loop around them."""

        def step(self):
            raise ZeroDivisionError("a bug")

    with running(model, engine=Broken(model, byte_tokenizer())) as own:
        response = httpx.post(f"{own.url}/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert response.status_code == 500
        assert status(own, "/health/live")[0] == 503
        assert "thread has ended with an error" in status(own, "/health/live")[1]
        assert "ZeroDivisionError" not in httpx.get(f"{own.url}/health").text
        again = httpx.post(f"{own.url}/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert (again.status_code, again.json()["error"]["code"]) == (503, "stopped")


def test_a_loop_that_was_stopped_is_noticed(model):
    with running(model) as own:
        own.served.loop.stop()
        assert status(own, "/health/live") == (503, "the engine's thread has ended")


def test_degraded_answers_are_marked(model):
    reasons: list[str] = []
    with running(model, change=lambda served: dataclasses.replace(served, degraded=lambda: tuple(reasons))) as own:
        client = own.client()
        plain = client.completions.with_raw_response.create(model="tiny", prompt="x", max_tokens=1)
        assert "x-equipoise-degraded" not in plain.headers
        reasons += ["layers.3 collapsed", "a, b\r\nü"]
        for stream in (False, True):
            marked = client.completions.with_raw_response.create(model="tiny", prompt="x", max_tokens=1, stream=stream)
            assert marked.headers["x-equipoise-degraded"] == "layers.3 collapsed, a? b???"
            marked.http_response.close()
        assert wait_until(lambda: len(own.counted) == 3)
        assert [each.degraded for each in own.counted] == [()] + [("layers.3 collapsed", "a? b???")] * 2
        body = httpx.get(f"{own.url}/health")
        assert (body.status_code, body.json()["status"]) == (200, "degraded")
        assert body.json()["reasons"] == reasons
        assert status(own, "/health/ready") == (200, "ok")


def test_who_cannot_say_how_it_is_takes_no_answer_along(model, caplog):
    """Said once in the log, and again when it fails again."""
    failing = [True]

    def degraded():
        if failing[0]:
            raise OSError("the disk is full")
        return ("as it says",)

    def retry_after():
        raise ZeroDivisionError

    change = lambda served: dataclasses.replace(served, degraded=degraded, retry_after=retry_after)  # noqa: E731
    with running(model, change=change) as own:
        marks = []
        for fails in (True, True, False, True):
            failing[0] = fails
            reply = own.client().completions.with_raw_response.create(model="tiny", prompt="x", max_tokens=1)
            marks.append(reply.headers.get("x-equipoise-degraded"))
        assert marks == [None, None, "as it says", None]
        assert status(own, "/health") == (200, "ok")
        own.served.loop.drain(0.0)
        refused = httpx.post(f"{own.url}/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    told = [record for record in caplog.records if "degraded() failed" in record.message]
    assert len(told) == 2
    assert "the disk is full" in str(told[0].exc_info[1])


def test_the_slow_twin_serves_too(model):
    """Any `Backend` does; here each answer is one piece."""
    with running(model, engine=SlowEngine(model, byte_tokenizer())) as own:
        sent = {"model": "tiny", "prompt": "x", "max_tokens": 5, "seed": 3}
        whole = own.client().completions.create(**sent).choices[0]
        [chunk] = list(own.client().completions.create(**sent, stream=True))
        assert chunk.choices[0].text == whole.text
