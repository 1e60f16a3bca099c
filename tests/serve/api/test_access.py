"""API keys, and who is whose turn."""

import dataclasses

import httpx
import openai
import pytest
from tests.serve.api.serving import running

from equipoise.serve.api.access import VARIABLE, client_of, is_known, read_keys
from equipoise.serve.api.endpoints import ENDPOINTS

KEYS = ("sixteen-letters-1", "sixteen-letters-2")


@pytest.fixture(scope="module")
def locked(model):
    with running(model, change=lambda served: dataclasses.replace(served, keys=KEYS)) as locked:
        yield locked


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(locked, key):
    client = locked.client(api_key=key)
    client.completions.create(model="tiny", prompt="x", max_tokens=1)
    assert client.models.list().data[0].id == "tiny"


@pytest.mark.parametrize("key", ["wrong", KEYS[0] + "x", KEYS[0][:-1], KEYS[0].upper(), f"{KEYS[0]},{KEYS[1]}"])
def test_another_key_does_not(locked, key):
    with pytest.raises(openai.AuthenticationError, match="got another") as error:
        locked.client(api_key=key).completions.create(model="tiny", prompt="x")
    assert (error.value.type, error.value.code) == ("invalid_request_error", "invalid_api_key")
    assert error.value.response.headers["www-authenticate"] == "Bearer"
    assert key not in str(error.value)


@pytest.mark.parametrize("header", ["", "Bearer", f"Basic {KEYS[0]}", KEYS[0], "Bearer \xff\xfe"])
def test_nor_does_none(locked, header):
    headers = {"authorization": header.encode("latin-1")}
    assert httpx.get(f"{locked.url}/v1/models", headers=headers).status_code == 401


def test_everything_but_health_needs_a_key(locked):
    for endpoint in ENDPOINTS:
        path = endpoint.path.replace("{model}", "tiny")
        response = httpx.request(endpoint.method, locked.url + path, json={} if endpoint.body else None)
        assert response.status_code == (200 if path.startswith("/health") else 401), path


def test_without_keys_everybody_may(server):
    assert httpx.get(f"{server.url}/v1/models").status_code == 200


def test_keys_do_not_show(locked):
    assert KEYS[0] not in repr(locked.served)
    assert KEYS[0] not in httpx.get(f"{locked.url}/openapi.json", headers={"authorization": f"Bearer {KEYS[0]}"}).text


def test_is_known():
    assert is_known(KEYS[1], KEYS)
    assert not is_known(None, KEYS)
    assert not is_known("", KEYS)
    assert not is_known("\udcff", KEYS)


def test_turns_go_by_key_or_by_address():
    assert client_of(None, "10.0.0.1") == "address 10.0.0.1"
    assert client_of(KEYS[0], "10.0.0.1") == client_of(KEYS[0], "10.0.0.2") != client_of(KEYS[1], "10.0.0.1")
    assert KEYS[0] not in client_of(KEYS[0], "")


@pytest.mark.parametrize(("fields", "client"), [({"user": "ada"}, "user ada"), ({}, "address 127.0.0.1")])
def test_the_engine_learns_whose_turn_it_is(model, fields, client):
    with running(model) as own:
        seen = []
        add = own.engine.add
        own.engine.add = lambda request: seen.append(request.client) or add(request)
        own.client().completions.create(model="tiny", prompt="x", max_tokens=1, **fields)
    assert seen == [client]


def test_with_keys_it_is_the_keys_turn(model):
    with running(model, change=lambda served: dataclasses.replace(served, keys=KEYS)) as own:
        seen = []
        add = own.engine.add
        own.engine.add = lambda request: seen.append(request.client) or add(request)
        own.client(api_key=KEYS[0]).completions.create(model="tiny", prompt="x", max_tokens=1)
    assert seen == [client_of(KEYS[0], "")]


def test_keys_come_from_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEYS[0]}\n\n  {KEYS[1]}  \n")
    assert read_keys(file, {}) == KEYS
    assert read_keys(None, {VARIABLE: ", ".join(KEYS)}) == KEYS
    assert read_keys(file, {VARIABLE: "a-third-key-of-some-length"}) == ("a-third-key-of-some-length", *KEYS)
    assert read_keys(None, {}) == ()


@pytest.mark.parametrize("key", ["short", "with a space in the middle", "übergroße-schlüssel"])
def test_bad_keys_are_refused_and_not_shown(tmp_path, key):
    with pytest.raises(ValueError, match=r"API keys: number 1 has \d+ characters, expected at least 16") as error:
        read_keys(None, {VARIABLE: key})
    assert key not in str(error.value)


def test_files_without_keys_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"API keys: cannot read .*missing.*give a text file with a key per line"):
        read_keys(tmp_path / "missing", {})
    (tmp_path / "empty").write_text("# none\n")
    with pytest.raises(ValueError, match=r"API keys: expected at least one in .*empty, got none"):
        read_keys(tmp_path / "empty", {})
