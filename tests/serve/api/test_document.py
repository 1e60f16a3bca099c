"""The OpenAPI document is true: whatever fits it is answered as it says, and so is what doesn't."""

import copy
import json
import os
from collections import defaultdict

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from pydantic import TypeAdapter
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient
from tests.serve.api.serving import byte_tokenizer, tiny_model

from equipoise.serve.api.app import create_app
from equipoise.serve.api.document import document
from equipoise.serve.api.endpoints import ENDPOINTS
from equipoise.serve.api.served import Served
from equipoise.serve.engine import Engine
from equipoise.serve.loop import EngineLoop

MODEL = "tiny"
EXAMPLES = {
    "/v1/completions": {"model": MODEL, "prompt": ["a", "b"], "logprobs": 1, "echo": True},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "logprobs": True},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [97]},
}
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]


def _served() -> Served:
    tokenizer = byte_tokenizer()
    loop = EngineLoop(Engine(tiny_model(), tokenizer, num_blocks=64, block_size=8))
    return Served(MODEL, loop, tokenizer, 64, 0)


def _for_this_model() -> dict:
    """The document, with the one name that is not answered with 404, few choices, and a good example each."""
    changed = copy.deepcopy(document())
    for name in ("CompletionBody", "ChatBody", "TokenizeBody", "DetokenizeBody"):
        properties = changed["components"]["schemas"][name]["properties"]
        properties["model"] = {"const": MODEL}
        if "n" in properties:
            properties["n"] = {"type": "integer", "minimum": 0, "maximum": 3}
    for path, example in EXAMPLES.items():
        changed["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"] = example
    return changed


SERVED = _served()
SEEN: dict[str, set[int]] = defaultdict(set)
schema = schemathesis.openapi.from_dict(_for_this_model())
schema.app = create_app(SERVED)


@pytest.fixture(scope="session", autouse=True)  # a loop starts once, also where tests of other files come between
def engine():
    SERVED.loop.start()
    yield
    SERVED.loop.stop()
    SERVED.loop.engine.close()
    for path in EXAMPLES if len(SEEN) == len(ENDPOINTS) else ():  # when all tests have run; they may run in any order
        assert {200, 400} <= SEEN[path], f"{path}: only {SEEN[path]} was seen, so the tests show little"


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="Schemathesis makes no cases in workers of pytest-xdist"
)
@schema.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_answers_are_as_declared(case):
    response = case.call()
    SEEN[case.path].add(response.status_code)
    case.validate_response(response, checks=CHECKS)
    assert response.status_code < 500


@pytest.mark.parametrize("endpoint", [each for each in ENDPOINTS if each.chunk], ids=lambda each: each.path)
def test_chunks_are_as_declared(endpoint):
    """Of all kinds: roles, texts, ends, usage and what this server adds."""
    sent = {"model": MODEL, "prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "n": 2}
    extra = {"stream_options": {"include_usage": True}, "equipoise": {"return_routed_experts": True}}
    chunk = TypeAdapter(endpoint.chunk)
    for more in ({}, {"logprobs": True, "top_logprobs": 2} if "chat" in endpoint.path else {"logprobs": 2}, extra):
        with TestClient(schema.app) as client:
            response = client.post(endpoint.path, json=sent | {"stream": True} | more)
        *events, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        for event in events:
            chunk.validate_python(json.loads(event.removeprefix("data: ")), strict=True, extra="forbid")


def test_it_says_all_of_the_table():
    for endpoint in ENDPOINTS:
        operation = document()["paths"][endpoint.path][endpoint.method.lower()]
        assert {int(status) for status in operation["responses"]} == {200, *endpoint.statuses}
        assert ("requestBody" in operation) == (endpoint.body is not None)
        assert ("security" in operation) != endpoint.open
