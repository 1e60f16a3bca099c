"""What goes wrong, and how the client hears of it: always OpenAI's form, with the field's name."""

import dataclasses
import logging
import threading

import httpx
import openai
import pytest
from tests.serve.api.serving import MAX_TOKENS, byte_tokenizer, running, tiny_model, wait_until

from equipoise.serve.engine import Engine
from equipoise.serve.scheduler import Limits

WRONG = [
    ({"prompt": None}, "prompt", "expected a text or a list of texts or a list of whole numbers or a list of lists"),
    ({"prompt": [1, "a"]}, "prompt", "expected a text or a list of texts"),
    ({"prompt": []}, "prompt", "expected at least one, got an empty list"),
    ({"prompt": [[]]}, "prompt", "expected at least one token id, got none"),
    ({"prompt": [257]}, "prompt", "expected token ids from 0 to 256, got 257"),
    ({"prompt": [-1]}, "prompt", "expected token ids from 0 to 256, got -1"),
    ({"prompt": "x" * MAX_TOKENS}, "prompt", f"{MAX_TOKENS} tokens leave no room for an answer"),
    ({"prompt": ["x"] * 129}, "prompt", "expected at most 128 prompts, got 129"),
    ({"prompt": ["x"] * 9, "n": 16}, "prompt", "expected at most 128 answers, got 9 prompts with n=16"),
    ({"prompt": " " * 100_001}, "prompt", "expected at most 100000 white-space characters in a row, got 100001"),
    ({"max_tokens": "5"}, "max_tokens", "expected a whole number, got a text"),
    ({"max_tokens": 5.0}, "max_tokens", "expected a whole number, got a number"),
    ({"max_tokens": True}, "max_tokens", "expected a whole number, got true or false"),
    ({"max_tokens": -1}, "max_tokens", "expected at least 1, got -1"),
    ({"max_tokens": 0}, "max_tokens", "expected at least 1, got 0"),
    ({"max_tokens": 10**30}, "max_tokens", "expected at most 255, got 1000000000000000000000000000000"),
    ({"n": 0}, "n", "expected 1 to 16 choices, got 0"),
    ({"n": 10**9}, "n", "expected 1 to 16 choices"),
    ({"best_of": 2}, "best_of", "expected n = 1, or none, got 2"),
    ({"suffix": "end"}, "suffix", "does not fill gaps"),
    ({"temperature": -1}, "temperature", "expected a number from 0 to 100, got -1"),
    ({"temperature": 10**400}, "temperature", "is too large a number"),
    ({"top_p": 0}, "top_p", r"expected a probability in \(0, 1\], got 0"),
    ({"top_k": -2}, "top_k", "expected at least 1"),
    ({"min_p": 2}, "min_p", "expected a number from 0 to 1, got 2"),
    ({"presence_penalty": 3}, "presence_penalty", "expected a number from -2 to 2, got 3"),
    ({"frequency_penalty": -3}, "frequency_penalty", "expected a number from -2 to 2, got -3"),
    ({"repetition_penalty": 0}, "repetition_penalty", "expected a factor"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "expected token ids as keys, such as '42', got 'a'"),
    ({"logit_bias": {"": 1}}, "logit_bias", "expected token ids as keys, such as '42', got ''"),
    ({"logit_bias": {"300": 1}}, "logit_bias", "expected token ids from 0 to 256, got 300"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "expected a number from -100 to 100, got 101"),
    ({"logit_bias": {"5": None}}, "logit_bias.5", "expected a number, got null"),
    ({"logit_bias": {str(n): 0 for n in range(301)}}, "logit_bias", "expected at most 300 tokens, got 301"),
    ({"stop": ["a"] * 17}, "stop", "expected at most 16 texts of 1 to 256 characters"),
    ({"stop": ""}, "stop", "expected at most 16 texts of 1 to 256 characters"),
    ({"stop": "x" * 257}, "stop", "expected at most 16 texts of 1 to 256 characters"),
    ({"stop": ["a"] * 100_000}, "stop", "expected at most 16 texts"),
    ({"stop_token_ids": [1] * 257}, "stop_token_ids", "expected at most 256 ids, got 257"),
    ({"stop_token_ids": [999]}, "stop_token_ids", "expected token ids from 0 to 256, got 999"),
    ({"logprobs": 21}, "logprobs", "expected 0 to 20, got 21"),
    ({"logprobs": True}, "logprobs", "expected a whole number, got true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only means something with stream=true"),
    ({"stream": "yes"}, "stream", "expected true or false, got a text"),
    ({"seed": 1.5}, "seed", "expected a whole number, got a number"),
    ({"user": 7}, "user", "expected a text, got a whole number"),
    ({"equipoise": {"deadline_ms": 0}}, "equipoise.deadline_ms", "expected more than 0 milliseconds, got 0"),
    ({"equipoise": {"deadline_ms": "1"}}, "equipoise.deadline_ms", "expected a number, got a text"),
    ({"equipoise": []}, "equipoise", "expected an object, got a list"),
    ({"model": None}, "model", "expected a text, got null"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "says"), WRONG, ids=lambda each: str(each)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_field_is_named(client, fields, param, says, stream):
    body = {"model": "tiny", "prompt": "x", "stream": stream} | fields
    if stream and "stream_options" in fields:
        body["stream"] = False
    with pytest.raises(openai.BadRequestError, match=says) as error:
        client.post("/completions", body=body, cast_to=object)
    assert error.value.param == param
    assert error.value.type == "invalid_request_error"
    assert str(error.value.body["message"]).startswith(f"{param}: ")


def test_unknown_fields_and_nulls_are_ignored(client):
    body = {"model": "tiny", "prompt": "x", "max_tokens": None, "n": None, "stop": None, "colour": "blue"}
    client.post("/completions", body=body, cast_to=object)


@pytest.mark.parametrize(
    ("body", "says"), [(b"{", "not valid JSON"), (b"[]", "expected an object, got a list"), (b"", "not")]
)
def test_a_body_that_is_no_object(server, body, says):
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


def test_a_missing_field_is_named(client):
    with pytest.raises(openai.BadRequestError, match="model: is missing; expected a text") as error:
        client.post("/completions", body={"prompt": "x"}, cast_to=object)
    assert (error.value.param, error.value.code) == ("model", "missing")


@pytest.mark.parametrize("name", ["other", "../../etc/passwd", "tiny\x00", "TINY", ""])
def test_another_model_is_not_found(client, name):
    for path, fields in {"/completions": {"prompt": "x"}, "/chat/completions": {"messages": []}}.items():
        with pytest.raises(openai.NotFoundError, match=r"there is no .* here; expected 'tiny'") as error:
            client.post(path, body={"model": name, **fields}, cast_to=object)
        assert (error.value.param, error.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/v1", 404), ("GET", "/v1/completions/", 404), ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404), ("GET", "/v1/models/%00", 404), ("GET", "/docs", 404),
        ("GET", "/v1/completions", 405), ("DELETE", "/v1/models/tiny", 405), ("POST", "/health", 405),
        ("TRACE", "/", 404), ("OPTIONS", "/v1/completions", 405),
    ],
)  # fmt: skip
def test_other_paths_and_methods(server, method, path, status):
    server.counted.clear()
    response = httpx.request(method, server.url + path)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert response.headers["x-request-id"]
    assert "access-control-allow-origin" not in response.headers
    assert wait_until(lambda: server.counted)
    assert server.counted[0].status == status


def test_ids_of_requests_come_back(server):
    def id_of(given: str) -> str:
        return httpx.get(f"{server.url}/health", headers={"x-request-id": given}).headers["x-request-id"]

    assert id_of("my-request.1") == "my-request.1"
    assert id_of("a b") != "a b"
    assert id_of("x" * 65) != "x" * 65


# ---------------------------------------------------------------------------------------------- the engine says no


def test_too_many_requests_are_told_when_to_come_back(model):
    engine = Engine(model, byte_tokenizer(), limits=Limits(max_waiting=2), num_blocks=64, block_size=8)
    retry = dict(retry_after=lambda: 6.2)  # noqa: C408
    with running(model, engine=engine, change=lambda served: dataclasses.replace(served, **retry)) as own:
        with pytest.raises(openai.RateLimitError, match="2 requests wait already; try again later") as error:
            own.client().completions.create(model="tiny", prompt=["x"] * 9, max_tokens=2)
        assert error.value.response.headers["retry-after"] == "7"
        assert (error.value.type, error.value.code) == ("rate_limit_error", "rate_limit_exceeded")
        with pytest.raises(openai.RateLimitError):  # also before a stream begins
            own.client().completions.create(model="tiny", prompt=["x"] * 9, max_tokens=2, stream=True)
        assert own.idle()  # the others of the same request were cancelled
        own.client().completions.create(model="tiny", prompt="x", max_tokens=2)


def test_a_server_on_its_way_out_takes_no_requests(model):
    with running(model) as own:
        assert own.served.loop.drain(5)
        with pytest.raises(openai.InternalServerError, match="shutting down") as error:
            own.client().completions.create(model="tiny", prompt="x")
        assert error.value.status_code == 503
        assert (error.value.type, error.value.code) == ("service_unavailable_error", "draining")
        assert error.value.response.headers["retry-after"] == "1"
        own.served.loop.resume()
        own.client().completions.create(model="tiny", prompt="x")


def test_who_comes_after_a_shut_down_is_told_of_it_and_of_no_failure(model):
    with running(model) as own:
        assert own.served.loop.drain(5)
        own.served.loop.stop()
        with pytest.raises(openai.InternalServerError, match="shutting down") as error:
            own.client().completions.create(model="tiny", prompt="x")
        assert (error.value.status_code, error.value.code) == (503, "draining")


@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_are_open_when_the_engine_stops_are_told(model, stream, caplog):
    caplog.set_level(logging.CRITICAL, "equipoise.serve")
    with running(model) as own:
        stopper = threading.Timer(0.1, own.served.loop.stop)
        stopper.start()
        with pytest.raises(openai.APIError, match="the engine has stopped"):
            _ask_for_ever(own.client(), stream)
        stopper.join()
        with pytest.raises(openai.InternalServerError, match="the engine has stopped") as error:
            own.client().completions.create(model="tiny", prompt="x")
        assert (error.value.status_code, error.value.code) == (503, "stopped")


def _ask_for_ever(client, stream):
    while True:
        sent = {"model": "tiny", "prompt": "x", "max_tokens": 250, "extra_body": {"ignore_eos": True}}
        response = client.completions.create(stream=stream, **sent)
        if stream:
            list(response)


def test_a_request_that_fails_in_the_engine_is_an_error_of_ours(caplog):
    """A weight that is not a number makes outputs that are none."""
    caplog.set_level(logging.CRITICAL, "equipoise.serve")
    model = tiny_model()
    model.norm.weight.data[0] = float("nan")
    with running(model) as own:
        with pytest.raises(openai.InternalServerError, match="the engine could not compute this") as error:
            own.client().completions.create(model="tiny", prompt="x")
        assert (error.value.status_code, error.value.type, error.value.code) == (500, "server_error", "failed")
        with pytest.raises(openai.InternalServerError):  # nothing of the stream was sent yet
            own.client().completions.create(model="tiny", prompt="x", stream=True)
        assert wait_until(lambda: len(own.counted) == 2)
        assert [(counted.status, counted.finishes) for counted in own.counted] == [(500, ("failed",))] * 2


def test_a_stream_that_breaks_ends_with_an_error_event(caplog):
    caplog.set_level(logging.CRITICAL, "equipoise.serve")
    model = tiny_model()
    with running(model) as own:
        stream = own.client().completions.create(
            model="tiny", prompt="x", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        own.served.loop.between_steps(lambda: model.norm.weight.data.fill_(float("nan"))).result(5)
        with pytest.raises(openai.APIError, match="the engine could not compute this"):
            list(stream)
        assert wait_until(lambda: own.counted)
        assert own.counted[0].status == 500
        assert own.counted[0].answer_tokens > 0


def test_what_nobody_expected_is_an_error_without_details(server, caplog):
    """A tokenizer that is none: the log says so, and the response does not."""
    with running(server.engine.model, change=lambda served: dataclasses.replace(served, tokenizer=None)) as own:
        response = httpx.post(f"{own.url}/tokenize", json={"prompt": "x"}, headers={"x-request-id": "abc"})
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "something went wrong here; the server's log has it as request abc",
        "type": "server_error", "param": None, "code": "internal",
    }  # fmt: skip
    assert "NoneType" not in response.text
    assert "NoneType" in caplog.text


def test_a_counter_that_fails_takes_nothing_down(model, caplog):
    def count(counted):
        raise RuntimeError("no disk")

    with running(model, change=lambda served: dataclasses.replace(served, count=count)) as own:
        for _ in range(2):
            own.client().completions.create(model="tiny", prompt="x")
        assert wait_until(lambda: "no disk" in caplog.text)


def test_tokens_there_and_back(server):
    text = "Grüße, \x00 and 🌍"
    there = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()
    assert there == {"tokens": list(text.encode()), "count": len(text.encode()), "max_model_len": MAX_TOKENS}
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": there["tokens"], "model": "tiny"})
    assert back.json() == {"prompt": text}
    wrong = httpx.post(f"{server.url}/detokenize", json={"tokens": [1, 500]})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "tokens"
    assert httpx.post(f"{server.url}/tokenize", json={"prompt": "x", "model": "y"}).status_code == 404
