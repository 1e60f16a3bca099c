"""docs/serving.md says what the server does: its examples run, and its tables are complete."""

import contextlib
import dataclasses
import io
import re
from pathlib import Path

from equipoise.serve.api.bodies import ChatBody, CompletionBody, Extension
from equipoise.serve.api.endpoints import ENDPOINTS
from equipoise.serve.api.errors import ApiError
from equipoise.serve.api.plan import MAX_BIASES, MAX_N, MAX_STOP_CHARACTERS
from equipoise.serve.api.served import Bounds
from equipoise.serve.request import MAX_LOGPROBS, MAX_STOPS

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
API = PAGE[PAGE.index("## API") :]
API = API[: API.find("\n## ")] if "\n## " in API else API


def test_the_examples_run(server):
    names: dict[str, object] = {}
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        for code in re.findall(r"^```python\n(.*?)^```$", API, flags=re.MULTILINE | re.DOTALL):
            exec(code.replace("http://127.0.0.1:8000", server.url), names)
    names["client"].close()
    assert names["experts_LTK"].shape == (2, 16 + 7, 2)
    assert "{'layers.0.mlp': [" in told.getvalue()


def test_the_endpoints_are_all_there():
    assert re.findall(r"^\| `((?:GET|POST) \S+)` \|", API, flags=re.MULTILINE) == [
        f"{each.method} {each.path}" for each in ENDPOINTS
    ]


def test_all_parameters_are_named():
    for kind in (CompletionBody, ChatBody, Extension):
        for each in dataclasses.fields(kind):
            if each.name not in ("tool_choice", "function_call", "modalities", "audio"):
                assert f"`{each.name}`" in API, each.name


def test_all_statuses_have_their_types():
    table = dict(re.findall(r"^\| ([\d, ]+) \| `(\w+)` \|", API, flags=re.MULTILINE))
    told = {int(status): kind for statuses, kind in table.items() for status in statuses.split(", ")}
    declared = {status for each in ENDPOINTS for status in each.statuses} | {405}
    assert told == {status: ApiError(status, "").body["error"]["type"] for status in declared}


def test_the_numbers_are_those_of_the_code():
    bounds = Bounds()
    for said in (
        f"within {bounds.header_seconds:g} s and {bounds.max_head >> 10} KiB",
        f"its body within {bounds.body_seconds:g} s",
        f"must take what it is sent within {bounds.write_seconds:g} s",
        f"is larger than {bounds.max_body >> 20} MiB",
        f"has made no progress for {bounds.stall_seconds:g} s",
        f"which is at most {MAX_N}; prompts times `n` at most {bounds.max_choices}",
        f"at most {MAX_LOGPROBS} alternatives",
        f"at most {MAX_STOPS} texts of {MAX_STOP_CHARACTERS} characters",
        f"at most {MAX_BIASES} tokens",
    ):
        assert said in " ".join(API.split()), said
