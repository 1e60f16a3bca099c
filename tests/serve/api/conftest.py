"""A tiny random model behind a real server on loopback, and official clients for it."""

from collections.abc import Iterator

import openai
import pytest
from tests.serve.api.serving import Running, running, tiny_model

from equipoise.models.decoder import Decoder


@pytest.fixture(scope="session")
def model() -> Decoder:
    return tiny_model()


@pytest.fixture(scope="module")
def server(model) -> Iterator[Running]:
    with running(model) as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.client()
