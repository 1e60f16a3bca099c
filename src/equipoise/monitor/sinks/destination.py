"""Where messages go: an address, and the environment variables that hold its secrets.

A frozen description that may be printed: secrets are named in it, never held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from equipoise.monitor.sinks.secret import Secret


@dataclass(frozen=True)
class Destination:
    """One HTTP endpoint. name: in errors and in the dead-letter file.

    url: of an endpoint that is no secret. url_env: the environment variable with a URL that is one (Slack's). Give one
    of the two. token_env: the variable with a token for "Authorization: Bearer". body_secrets: fields of the message's
    top level that are filled in from variables. headers: more headers, without secrets.
    Raises ValueError for a URL that is not one or has a password in it, and for variables that are not set.
    """

    name: str
    url: str | None = None
    url_env: str | None = None
    token_env: str | None = None
    body_secrets: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.url is None) == (self.url_env is None):
            got = "neither" if self.url is None else "both"
            raise ValueError(f"{self.name}: expected one of url and url_env, got {got}; give the other up")
        if self.url is not None:
            check_url("url", self.url)
        for secret in self.secrets:
            value = secret.read()
            if secret.env == self.url_env:
                check_url(secret.env, value, shown=False)

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """All that must never be shown."""
        return tuple(Secret(env) for env in (self.url_env, self.token_env, *self.body_secrets.values()) if env)

    def address(self) -> str:
        """The URL, which may be secret. Raises ValueError when its variable is not set any more."""
        return Secret(self.url_env).read() if self.url_env is not None else str(self.url)


def check_url(name: str, url: str, *, shown: bool = True) -> None:
    """Raise ValueError unless it is an http or https URL with a host and without a password. shown: may be quoted."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        password = parts.username is not None or parts.password is not None
    except ValueError:  # a bad port or address; the error quotes it
        usable, password = False, "@" in url
    if password:
        raise ValueError(f"{name}: expected a URL without user and password, got one with; use token_env instead")
    if not usable:
        got = repr(url) if shown else "something else (not shown)"
        raise ValueError(f"{name}: expected an address such as https://host/path, got {got}")
