"""`equipoise bench`: experiments of many runs, and measurements on this machine."""

from __future__ import annotations

from typing import Annotated

import tyro

from equipoise.commands.links import links
from equipoise.commands.sweep import sweep


def bench(
    run: Annotated[
        Annotated[int, tyro.conf.subcommand(name="sweep", constructor=sweep)]
        | Annotated[int, tyro.conf.subcommand(name="links", constructor=links)],
        tyro.conf.arg(name=""),
    ],
) -> int:
    """Measurements on this machine, side by side with what others use, and experiments of many runs."""
    return run  # what the subcommand returned
