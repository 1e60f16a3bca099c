"""One HTTP POST, with its secrets filled in at the last moment and taken out of whatever comes back.

httpx's transport is used, not its client: the client logs the whole address of each request, and Slack's address is a
secret. No redirect is followed, so that a token goes nowhere else. It doesn't try twice.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies, proxy_bypass

from equipoise.monitor.sinks.destination import Destination
from equipoise.monitor.sinks.plain import dump, one_line
from equipoise.monitor.sinks.secret import Secret, scrub

if TYPE_CHECKING:
    import httpx

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
MAX_ANSWER = 4096  # bytes read of an answer that says no
MAX_SHOWN = 200  # characters of it that are quoted


@dataclass(frozen=True)
class Answer:
    """What came back. status: None when nothing did; then `text` says why and `again` whether it may pass.

    text: of an answer that says no, its beginning. retry_after: the header, "" without one. Neither holds a secret.
    """

    status: int | None
    text: str = ""
    retry_after: str = ""
    again: bool = False


class Post:
    """Posts JSON to one destination. Proxies are taken from the environment (HTTPS_PROXY, NO_PROXY), not for loopback.

    timeout_s: for connecting, and for each wait for more of the answer. Raises ImportError where httpx is missing.
    """

    def __init__(self, destination: Destination, timeout_s: float) -> None:
        import httpx

        self._destination = destination
        self._timeout = httpx.Timeout(timeout_s).as_dict()
        self._transport: httpx.HTTPTransport | None = None
        self._transport_for: tuple[int, str | None] | None = None

    def __call__(self, body: Any) -> Answer:
        """Post the message, with the secret fields added."""
        import httpx

        try:
            secrets = [secret.read() for secret in self._destination.secrets]
        except ValueError as error:
            return Answer(None, str(error))
        try:
            request = self._request(body)
            response = self._transport_now(request.url).handle_request(request)
            try:
                text = "" if response.is_success else _beginning(response, secrets)
            finally:
                response.close()
        except (httpx.TransportError, httpx.InvalidURL) as error:
            ours = isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol | httpx.LocalProtocolError)
            said = one_line(scrub(str(error), secrets), MAX_SHOWN)
            return Answer(None, f"{type(error).__name__}{said and f': {said}'}", again=not ours)
        return Answer(response.status_code, text, response.headers.get("retry-after", ""))

    def close(self) -> None:
        """Close what is open; another call opens it again."""
        if self._transport is not None:
            self._transport.close()
            self._transport = self._transport_for = None

    def _request(self, body: Any) -> httpx.Request:
        import httpx

        to = self._destination
        headers = {**to.headers, "content-type": "application/json", "user-agent": "equipoise"}
        if to.token_env is not None:
            headers["authorization"] = f"Bearer {Secret(to.token_env).read()}"
        filled = {name: Secret(env).read() for name, env in to.body_secrets.items()}
        content = dump({**body, **filled} if filled else body)
        extensions = {"timeout": self._timeout}
        return httpx.Request("POST", to.address(), headers=headers, content=content, extensions=extensions)

    def _transport_now(self, url: httpx.URL) -> httpx.HTTPTransport:
        """The transport of this process: connections copied by a fork are the parent's."""
        import httpx

        wanted = (os.getpid(), _proxy(url.scheme, url.host))
        if self._transport is None or self._transport_for != wanted:
            # messages are rare: a connection kept open would mostly be found closed by the other side
            limits = httpx.Limits(max_keepalive_connections=0)
            self._transport = httpx.HTTPTransport(limits=limits, proxy=wanted[1])
            self._transport_for = wanted
        return self._transport


def _proxy(scheme: str, host: str) -> str | None:
    if host in LOOPBACK or proxy_bypass(host):
        return None
    return getproxies().get(scheme)


def _beginning(response: httpx.Response, secrets: list[str]) -> str:
    """What the server says, on one line and without secrets."""
    import httpx

    data = b""
    try:
        for part in response.iter_raw():
            data += part
            if len(data) >= MAX_ANSWER:
                break
    except httpx.TransportError:  # there is a status already; what was read has to do
        data += b" ..."
    return one_line(scrub(data[:MAX_ANSWER].decode("utf-8", "replace"), secrets), MAX_SHOWN)
