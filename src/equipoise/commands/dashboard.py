"""`equipoise dashboard`: runs in the browser. What it serves is in dashboard/server.py."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import tyro


def dashboard(
    runs: Annotated[list[Path], tyro.conf.Positional],
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    token_file: Path | None = None,
) -> int:
    """Show runs in the browser: load of every expert, alerts, repairs, comparisons, while they train and after.

    For example: equipoise dashboard runs

    Args:
        runs: Run folders, or folders of run folders. New runs in them appear by themselves.
        host: Address to listen on. One that other machines can reach needs a token.
        port: 0 takes any that is free.
        token_file: A file whose first line is the token that browsers must bring, at least 8 characters.
    """
    from equipoise.dashboard.access import read_token
    from equipoise.dashboard.server import serve

    token = None if token_file is None else read_token(token_file)
    with contextlib.suppress(KeyboardInterrupt):  # the usual way to end it
        serve(list(runs), host, port, token, ready=announce)
    return 0


def announce(address: str) -> None:
    """Print where the dashboard is."""
    print(f"dashboard at {address}  (Ctrl-C ends it)", flush=True)
