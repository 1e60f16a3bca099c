"""Without the extra's libraries, an error names it."""

import sys

import pytest
from tests.serve.api.serving import byte_tokenizer

from equipoise.serve.api.app import create_app
from equipoise.serve.api.served import Bounds, Served
from equipoise.serve.api.wire import uvicorn_config
from equipoise.serve.engine import Engine
from equipoise.serve.loop import EngineLoop


@pytest.mark.parametrize("library", ["starlette.applications", "pydantic_core"])
def test_the_application(model, monkeypatch, library):
    tokenizer = byte_tokenizer()
    engine = Engine(model, tokenizer, num_blocks=32)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=r"the API needs Starlette and pydantic, .*pip install 'equipoise\[serve\]'"):
        create_app(Served("tiny", EngineLoop(engine), tokenizer, 256, 0))
    engine.close()


def test_the_server(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"serving needs uvicorn, .*pip install 'equipoise\[serve\]'"):
        uvicorn_config(None, Bounds())
