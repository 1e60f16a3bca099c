"""The evidence of a running server, asked for over HTTP. It believes nothing of the answer that it has not checked."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from equipoise.monitor.evidence import Evidence
from equipoise.monitor.evidence_wire import EvidenceError, from_json

if TYPE_CHECKING:
    import httpx

PATH, KEY = "/equipoise/evidence", "EQUIPOISE_API_KEY"
MAX_BYTES, WAIT_S, WHOLE_S = 64 * 2**20, 10.0, 60.0


def is_address(text: str) -> bool:
    """Whether it is a server's address, not a folder's path."""
    return text.lower().startswith(("http://", "https://"))


def evidence_of_url(url: str, environment: Mapping[str, str] = os.environ) -> Evidence:
    """Ask the server at `url`, such as http://127.0.0.1:8000. Its API key is taken from EQUIPOISE_API_KEY.

    Raises EvidenceError where there is no server, another one, one that wants another key, or one whose answer is cut
    off, too large, too slow or not evidence; ImportError where httpx is missing.
    """
    try:
        import httpx
    except ImportError as error:
        raise ImportError(
            "asking a server needs httpx, which is not installed; pip install 'equipoise[serve]'"
        ) from error
    where = _address(url)
    key = environment.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise EvidenceError(f"{KEY}: expected printable ASCII characters, got others (the key is not shown)")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    host = urlsplit(where).hostname or ""
    try:
        with (
            httpx.Client(timeout=WAIT_S, trust_env=host not in ("127.0.0.1", "localhost", "::1")) as client,
            client.stream("GET", where + PATH, headers=headers) as response,
        ):
            _check(where, response, bool(key))
            body = _read(where, response)
    except httpx.InvalidURL as error:
        raise EvidenceError(
            f"{where}: no address of a server ({error}); give one such as http://127.0.0.1:8000"
        ) from error
    except httpx.ConnectError as error:
        raise EvidenceError(
            f"{where}: nothing answers there; start it with `equipoise serve`, or check the address"
        ) from error
    except httpx.TimeoutException as error:
        raise EvidenceError(
            f"{where}: no answer within {WAIT_S:g} s; the process hangs, or is something else"
        ) from error
    except httpx.HTTPError as error:
        raise EvidenceError(f"{where}: the answer breaks off ({type(error).__name__}); try again") from error
    return _parse(where, body)


def _address(url: str) -> str:
    """Without a slash at the end. Raises EvidenceError for one with a name and a password, which would be shown."""
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.username or parts.password or parts.query or parts.fragment or not parts.hostname:
        raise EvidenceError(
            f"address: expected one such as http://127.0.0.1:8000, got another; a key belongs into {KEY}"
        )
    return url.rstrip("/")


def _check(where: str, response: httpx.Response, with_key: bool) -> None:
    if response.status_code == 401:
        told = f"does not know the key in {KEY}" if with_key else f"asks for an API key; set {KEY} to one of them"
        raise EvidenceError(f"{where}: the server {told}")
    if response.status_code != 200:
        raise EvidenceError(
            f"{where}: expected a server of equipoise, got status {response.status_code} for {PATH}; check the address "
            "and the port (it is the public one), or the server's version; a model without experts has no evidence"
        )


def _read(where: str, response: httpx.Response) -> bytes:
    body, until = bytearray(), time.monotonic() + WHOLE_S
    for piece in response.iter_bytes():
        body += piece
        if len(body) > MAX_BYTES or time.monotonic() > until:
            raise EvidenceError(
                f"{where}: expected at most {MAX_BYTES:,} bytes in {WHOLE_S:g} s, got more; not read on"
            )
    return bytes(body)


def _parse(where: str, body: bytes) -> Evidence:
    try:
        record: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise EvidenceError(f"{where}: expected JSON from a server of equipoise, got something else") from error
    try:
        return from_json(record)
    except EvidenceError as error:
        raise EvidenceError(
            f"{where}: the answer is not evidence: {error}; is it a server of equipoise, of this version?"
        ) from error
