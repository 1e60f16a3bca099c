"""Clients that mean no good: too large, too slow, too many, too strange. Others are served meanwhile."""

import dataclasses
import json
import resource
import socket
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from tests.serve.api.serving import running, wait_until
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from equipoise.serve.api.served import Bounds

HEAD = "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
HURRIED = Bounds(header_seconds=0.3, body_seconds=0.3, write_seconds=0.3, keep_alive_seconds=1)


@pytest.fixture(scope="module", params=[HttpToolsProtocol, H11Protocol])
def hurried(model, request):
    """A server that does not wait long, with either of uvicorn's parsers."""
    change = lambda served: dataclasses.replace(served, bounds=HURRIED)  # noqa: E731
    with running(model, change=change, http=request.param) as own:
        yield own


@contextmanager
def connect(server, sent: bytes):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(sent)
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes, nicely or not."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def post(server, content, path="/v1/completions") -> httpx.Response:
    return httpx.post(server.url + path, content=content, headers={"content-type": "application/json"}, timeout=30)


# ---------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_a_large_body_is_refused(server, path):
    response = post(server, b'{"prompt": "' + b"x" * 2**20 + b'"}', path)
    assert response.status_code == 413
    assert response.json()["error"]["message"] == "the body is larger than 1048576 bytes; send less at a time"
    assert response.headers["connection"] == "close"


def test_a_large_body_in_chunks_is_refused_too(server):
    response = post(server, (b"x" * 2**16 for _ in range(40)))
    assert response.status_code == 413


@pytest.mark.parametrize("length", ["1048577", "9" * 30])
def test_what_says_that_it_is_large_is_refused_before_it_is_sent(server, length):
    head = HEAD.format(path="/tokenize") + f"expect: 100-continue\r\ncontent-length: {length}\r\n\r\n"
    with connect(server, head.encode()) as connection:
        answer = connection.recv(1000)
    assert answer.startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))  # the parser itself refuses the longest


def test_who_sends_all_before_it_listens_hears_why(server):
    """If the connection were closed with a part of the body unread, the answer would be lost."""
    head = HEAD.format(path="/tokenize") + f"content-length: {4 * 2**20}\r\n\r\n"
    with connect(server, head.encode() + b"x" * 4 * 2**20) as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 413")


def test_a_body_without_end_is_cut_off(server):
    """It is read for a while, so that the answer arrives, and not for ever."""
    head = HEAD.format(path="/tokenize") + f"content-length: {10**12}\r\n\r\n"
    sent = 0
    with connect(server, head.encode()) as connection:
        try:
            while sent < 2**30:
                sent += connection.send(b"x" * 2**18)
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert sent < 2**26


def test_a_head_without_end_is_cut_off(hurried):
    with connect(hurried, b"GET /health HTTP/1.1\r\n") as connection:
        sent = 0
        try:
            while sent < 2**24:
                sent += connection.send(b"x-header: " + b"y" * 1000 + b"\r\n")
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert sent < 2**24


@pytest.mark.parametrize("depth", [100, 1000, 100_000])
@pytest.mark.parametrize("brackets", ["[]", '{"a":}'])
def test_deep_json(server, depth, brackets):
    opening, closing = brackets[:-1], brackets[-1]
    nested = opening * depth + ("1" if closing == "}" else "") + closing * depth
    response = post(server, f'{{"model": "tiny", "prompt": "x", "junk": {nested}}}')
    assert response.status_code == (200 if depth == 100 else 400)
    assert post(server, f'{{"model": "tiny", "prompt": {nested}}}').status_code == 400


def test_many_items_cost_no_more_than_their_size(server):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the most so far
    for items in ("{},", "1,", '"",', "[],"):
        content = '{"model": "tiny", "prompt": [' + items * ((2**20 - 100) // len(items)) + "{}]}"
        assert post(server, content).status_code == 400
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 200


# ---------------------------------------------------------------------------------------------- letters

TEXTS = {
    "nul": "a\x00b",
    "right to left": "\u202eabc\u202c עברית",
    "four bytes": "🌍𐍈\U0010ffff",
    "combining": "e" + "\u0301" * 60,
    "controls": "\x01\x7f\x1b[31m\r\n",
    "no characters": "\ufffe\uffff\ufeff",
    "special tokens": "<|endoftext|><|im_start|>",
    "templates": "{{ 7 * 7 }}{% raise %}",
}


@pytest.mark.parametrize("name", TEXTS)
def test_strange_letters_are_served(server, name):
    text = TEXTS[name]
    sent = {"model": "tiny", "max_tokens": 4, "echo": True, "logprobs": 1, "stop": [text], "user": text}
    response = post(server, json.dumps(sent | {"prompt": text}))
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"].startswith(text)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
    assert post(server, json.dumps(chat), "/v1/chat/completions").status_code == 200
    there = post(server, json.dumps({"prompt": text}), "/tokenize").json()
    assert post(server, json.dumps(there), "/detokenize").json() == {"prompt": text}


@pytest.mark.parametrize("name", TEXTS)
def test_strange_models_and_users_are_told_so(server, name):
    response = post(server, json.dumps({"model": TEXTS[name], "prompt": "x"}))
    assert response.status_code == 404


@pytest.mark.parametrize(
    "content",
    [
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "\\udc00\\ud800"}',
        b'{"model": "tiny", "prompt": "\xff\xfe"}',
        b'{"model": "tiny", "prompt": "\xed\xa0\x80"}',  # a surrogate as UTF-8
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
        '{"model": "tiny", "prompt": "x"}'.encode("utf-16"),
    ],
    ids=lambda content: str(content[:50]),
)
def test_what_is_no_text_is_refused(server, content):
    assert post(server, content).status_code == 400


@pytest.mark.parametrize("text", ["e" + "\u0301" * 100_000, " " * 1_000_000, "a" * 1_000_000, "\u2003" * 340_000])
def test_long_runs_are_refused_and_bring_nothing_down(server, text):
    for path, sent in {
        "/v1/completions": {"prompt": text},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
    }.items():
        raw = json.dumps({"model": "tiny"} | sent, ensure_ascii=False).encode()
        assert post(server, raw, path).status_code == 400


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_what_a_page_elsewhere_can_send_is_refused(server, kind):
    response = httpx.post(f"{server.url}/v1/completions", content="{}", headers={"content-type": kind})
    assert response.status_code == 415
    assert "expected application/json, got" in response.json()["error"]["message"]


def test_the_server_does_not_say_what_it_is(server):
    assert "server" not in httpx.get(f"{server.url}/health").headers


# ---------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /health HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /hea"],
    ids=["nothing", "half a head", "half a second one"],
)
def test_heads_that_do_not_come_are_not_waited_for(hurried, sent):
    with connect(hurried, sent) as connection:
        received = read_all(connection)
    assert received.startswith(b"HTTP/1.1 200" if b"\r\n\r\n" in sent else b"")


def test_a_second_head_that_does_not_come_is_not_waited_for(hurried):
    """uvicorn's own limit between requests ends with the first byte of the next one."""
    with connect(hurried, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n") as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /hea")
        assert read_all(connection) == b""


def test_heads_that_come_byte_by_byte_are_not_waited_for(hurried):
    """Each byte is in time, and the whole is not."""
    with connect(hurried, b"GET /health HTTP/1.1\r\n") as connection:
        connection.settimeout(0.02)

        def cut_off() -> bool:
            try:
                connection.send(b"x")
                return connection.recv(1) == b""
            except TimeoutError:
                return False
            except (ConnectionResetError, BrokenPipeError):
                return True

        assert wait_until(cut_off)


def test_bodies_that_do_not_come_are_refused(hurried):
    with connect(hurried, (HEAD.format(path="/tokenize") + "content-length: 10\r\n\r\n{").encode()) as connection:
        received = read_all(connection)
    assert received.startswith(b"HTTP/1.1 408")
    assert b"the body did not arrive within 0.3 s" in received


def test_connections_that_are_kept_open_are_closed_in_the_end(hurried):
    with connect(hurried, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n") as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_a_client_that_does_not_read_is_given_up(model):
    """Its answers are larger than what the system keeps for it."""
    with running(model, change=lambda served: dataclasses.replace(served, bounds=HURRIED)) as own:
        sent = {"model": "tiny", "prompt": ["x"] * 128, "max_tokens": 200, "logprobs": 20, "ignore_eos": True}
        raw = json.dumps(sent | {"stream": True}).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", own.port))
            head = HEAD.format(path="/v1/completions") + f"content-length: {len(raw)}\r\n\r\n"
            connection.sendall(head.encode() + raw)
            assert wait_until(lambda: own.counted, seconds=30)
        assert own.counted[0].status == 499
        assert own.idle()


# ---------------------------------------------------------------------------------------------- number


def _idle_connections(server, client, number: int) -> None:
    before = resident_kib()
    with ExitStack() as stack:
        for n in range(number):
            stack.enter_context(connect(server, b"GET /health HTTP/1.1\r\n" if n % 2 else b""))
        assert client.completions.create(model="tiny", prompt="x", max_tokens=3).usage.completion_tokens
        grown_kib = resident_kib() - before
    assert grown_kib < 30 * number + 10_000  # both ends are in this process


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def _enough_files(number: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(number, hard), hard))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= number, "both ends need a file each; raise ulimit -n"


def test_idle_connections_are_no_burden(server, client):
    _enough_files(4_500)
    _idle_connections(server, client, 2_000)


@pytest.mark.slow
def test_ten_thousand_of_them_neither(server, client):
    _enough_files(20_000)
    _idle_connections(server, client, 9_900)
