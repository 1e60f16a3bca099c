"""What commands share: the option --json, and a console that is wide enough for tables where nobody looks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, tyro.conf.arg(name="json")]
WIDE = 120  # columns of tables where there is no terminal


def wide_console() -> Console:
    """The terminal as it is; a pipe or a file as one of `WIDE` columns."""
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=WIDE)
