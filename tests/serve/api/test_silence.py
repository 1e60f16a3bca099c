"""A stream that has nothing to say for long says so, in a way that clients ignore."""

import threading
from dataclasses import replace

import httpx
import openai
import pytest
from tests.serve.api.serving import expected, running

from equipoise.serve.api.served import Bounds


class Overhearing(httpx.HTTPTransport):
    """Keeps the bytes that come, as they come. heard: called with all so far."""

    def __init__(self, heard):
        super().__init__()
        self._heard, self.bytes = heard, b""

    def handle_request(self, request):
        response = super().handle_request(request)
        response.stream = self._Stream(self, response.stream)
        return response

    class _Stream(httpx.SyncByteStream):
        def __init__(self, owner, stream):
            self._owner, self._stream = owner, stream

        def __iter__(self):
            for piece in self._stream:
                self._owner.bytes += piece
                self._owner._heard(self._owner.bytes)
                yield piece

        def close(self):
            self._stream.close()


@pytest.fixture
def held(model):
    """A server whose engine waits for `go`; comments come all the time."""
    go = threading.Event()
    bounds = Bounds(ping_seconds=0.001)
    with running(model, change=lambda served: replace(served, bounds=bounds)) as own:
        yield own, go
        go.set()


@pytest.mark.parametrize("chat", [False, True])
def test_the_official_client_hears_nothing_of_it(held, model, chat):
    own, go = held
    transport = Overhearing(lambda so_far: so_far.count(b": still here\n\n") >= 3 and go.set())
    with openai.OpenAI(
        base_url=f"{own.url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(transport=transport)
    ) as client:
        own.served.loop.between_steps(go.wait)
        if chat:
            stream = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=4, seed=1, stream=True
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert text
        else:
            stream = client.completions.create(model="tiny", prompt="ab", seed=1, stream=True)
            assert "".join(chunk.choices[0].text for chunk in stream) == expected(model, "ab", seed=1).text
    events = transport.bytes.split(b"\n\n")
    assert events[:3] == [b": still here"] * 3
    assert {event.split(b" ")[0] for event in events if event} == {b":", b"data:"}  # no event was torn
    assert events[-2:] == [b"data: [DONE]", b""]
    assert own.idle()


def test_an_error_after_it_is_an_event(held):
    own, go = held
    own.served.loop.between_steps(go.wait)
    body = {"model": "tiny", "prompt": "x", "stream": True}
    with httpx.stream("POST", f"{own.url}/v1/completions", json=body, timeout=30) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines) == ": still here"
        stopping = threading.Thread(target=own.served.loop.stop)
        stopping.start()
        go.set()
        rest = list(lines)
        stopping.join()
    assert "event: error" in rest
    assert "data: [DONE]" not in rest


def test_whoever_leaves_a_silent_stream_is_noticed(held):
    own, go = held
    own.served.loop.between_steps(go.wait)
    body = {"model": "tiny", "prompt": "x", "stream": True}
    with httpx.stream("POST", f"{own.url}/v1/completions", json=body, timeout=30) as response:
        assert next(response.iter_lines()) == ": still here"
    go.set()
    assert own.idle()


@pytest.mark.parametrize("name", ["ping_seconds", "answer_seconds"])
def test_bounds_are_seconds(name):
    with pytest.raises(ValueError, match=rf"Bounds\.{name}: expected seconds, more than 0, got 0"):
        Bounds(**{name: 0})
