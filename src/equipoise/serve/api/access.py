"""API keys: where they come from, and whether a request has one of them."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

VARIABLE = "EQUIPOISE_API_KEYS"
MIN_KEY = 16  # characters


def read_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Keys of a file, one a line, `#` for remarks, and those in EQUIPOISE_API_KEYS, with commas between.

    Empty if there are neither. Raises ValueError for a file that cannot be read or has none, and for a bad key, which
    is not shown.
    """
    keys = [key.strip() for key in environment.get(VARIABLE, "").split(",")]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"API keys: cannot read {file} ({error}); give a text file with a key per line") from error
        in_file = [line for line in lines if line and not line.startswith("#")]
        if not in_file:
            raise ValueError(f"API keys: expected at least one in {file}, got none; or do without the file")
        keys += in_file
    keys = [key for key in keys if key]
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_KEY or not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(
                f"API keys: number {number} has {len(key)} characters, expected at least {MIN_KEY}, ASCII, without "
                f"spaces; for example {secrets.token_urlsafe(24)}"
            )
    return tuple(keys)


def given_key(headers: Mapping[str, str]) -> str | None:
    """The key of a request, as `Authorization: Bearer KEY`."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def is_known(key: str | None, keys: Sequence[str]) -> bool:
    """Whether it is one of them. How long that takes does not depend on which, or on how much of one is right."""
    given = _digest(key or "")
    found = [hmac.compare_digest(given, _digest(each)) for each in keys]
    return any(found)


def client_of(key: str | None, address: str) -> str:
    """Who asks, for turns: the key's hash, or else the address."""
    return f"address {address}" if key is None else f"key {_digest(key).hex()[:16]}"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
