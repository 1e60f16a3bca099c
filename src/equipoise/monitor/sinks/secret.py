"""A secret that is named in the configuration and lives in an environment variable.

It is read when it is used and kept nowhere. `scrub` takes secrets out of text that others wrote, such as the answer
of a server. It doesn't encrypt anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

SCRUBBED = "***"
WITHHELD = "(not shown: it quotes a part of a secret)"
PART = 6  # characters of a secret that give it away


@dataclass(frozen=True)
class Secret:
    """The environment variable `env`, whose value is never shown: its repr is the variable's name."""

    env: str

    def read(self) -> str:
        """The value. Raises ValueError if it is not set, or has characters that no token or URL has.

        Such a character would end up in a header and from there in other libraries' error messages.
        """
        value = os.environ.get(self.env, "").strip()
        if not value:
            raise ValueError(f"{self.env}: expected a secret in this environment variable, found none; set it")
        if not all("!" <= char <= "~" for char in value):
            raise ValueError(
                f"{self.env}: expected a secret of printable ASCII characters without spaces, got others "
                "(the value is not shown); set it again"
            )
        return value


def scrub(text: str, secrets: Iterable[str]) -> str:
    """The text with every secret, in any usual spelling, replaced by "***".

    A text that holds a part of one all the same, because it was cut in the middle, is not shown at all.
    """
    spellings = {spelling for secret in secrets for spelling in _spellings(secret)}
    for spelling in sorted(spellings, key=len, reverse=True):
        text = text.replace(spelling, SCRUBBED)
    return WITHHELD if any(part in text for spelling in spellings for part in _parts(spelling)) else text


def _spellings(secret: str) -> Iterator[str]:
    parts = [secret]
    if "://" in secret:  # of a secret URL the path and the query are secret, the host is not
        url = urlsplit(secret)
        parts = [f"{url.path}?{url.query}", url.path, url.path.strip("/"), url.query]
    for part in parts:
        if part.strip("/?"):
            yield from (part, json.dumps(part)[1:-1], quote(part, safe=""), quote(part))


def _parts(spelling: str) -> Iterator[str]:
    return (spelling[start : start + PART] for start in range(len(spelling) - PART + 1))
