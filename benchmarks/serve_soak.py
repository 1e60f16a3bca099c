"""A long time of steady load: does anything grow, is anything left behind? python -m benchmarks.serve_soak

Clients ask, and some hang up in the middle, for an hour. Memory of the server after its warm-up must be level, in the
end all blocks of the cache must be free and no request open, and no answer wrong. The last line is the verdict, and so
is the exit code. Server and clients share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.serve_load import NAME, train_run
from benchmarks.serve_traffic import Checked, Mix, Prompts, Traffic, check, make_pool
from benchmarks.serving import Server, served
from benchmarks.serving_client import PATIENCE_S, ask, new_client
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.models.run_files import load

WARM_UP = 0.25  # of the time: allocators, caches and rolling windows fill up
MOST_MIB_PER_HOUR = 8.0
GAUGES = ("free_cache_blocks", "cache_blocks", "open_requests", "running", "waiting")


@dataclass(frozen=True)
class Sample:
    """At one moment. store_mib: of the server's own records on disk."""

    seconds: float
    rss_mib: float
    cpu_s: float
    store_mib: float
    gauges: dict[str, float]


@dataclass(frozen=True, eq=False)
class Soaked:
    """All that was seen. samples: the last one after everybody had gone."""

    samples: Sequence[Sample]
    traffic: Traffic
    checked: Checked
    exit_code: int


async def sample(client: httpx.AsyncClient, server: Server, began: float) -> Sample:
    """Now."""
    text = (await client.get(f"{server.root}/metrics")).text
    usage = server.usage()
    size = sum(file.stat().st_size for file in server.folder.rglob("*") if file.is_file())
    return Sample(
        time.perf_counter() - began,
        usage.rss_mib,
        usage.cpu_s,
        size / 2**20,
        {name: gauge(text, name) for name in GAUGES},
    )


def gauge(text: str, name: str) -> float:
    """Its value among the metrics. Raises ValueError where it is not there."""
    found = re.search(rf"^equipoise_serve_{name} (\S+)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"/metrics: expected equipoise_serve_{name}, found none; the server names it otherwise now")
    return float(found[1])


async def soak(server: Server, traffic: Traffic, seconds: float, every_s: float) -> Soaked:
    """The load, a sample now and then, and one when all is quiet."""
    began = time.perf_counter()
    clients = asyncio.create_task(traffic.run())
    samples = []
    async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False, verify=False) as client:
        while time.perf_counter() - began < seconds:
            await asyncio.sleep(every_s)
            samples.append(await sample(client, server, began))
        traffic.stopping = True
        await clients
        # The gauges are those of the newest step, and who hangs up last makes none: one more request brings one.
        async with new_client() as one:
            last = await ask(one, server.api, {"model": NAME, "prompt": "The", "max_tokens": 1, "ignore_eos": True})
        if not last.finished:
            raise RuntimeError(f"the last request: expected an answer, got {last.error}")
        samples.append(await sample(client, server, began))
    exit_code = await asyncio.to_thread(server.stop)
    return Soaked(samples, traffic, check(traffic.told, traffic.pool, traffic.prompts, []), exit_code)


# ------------------------------------------------------------------------------------------------- figures


def slope_per_hour(seconds: Sequence[float], values: Sequence[float]) -> float:
    """Of the straight line through them, by least squares."""
    return 3600 * float(np.polyfit(seconds, values, 1)[0])


def warm(soaked: Soaked) -> Sequence[Sample]:
    """Under load, after the warm-up."""
    loaded = soaked.samples[:-1]
    return loaded[int(WARM_UP * len(loaded)) :]


def growth(soaked: Soaked) -> float:
    """Of the server's memory, MiB per hour."""
    samples = warm(soaked)
    return slope_per_hour([each.seconds for each in samples], [each.rss_mib for each in samples])


def figures(soaked: Soaked) -> Table:
    """In numbers."""
    told, samples, last = soaked.traffic.told, warm(soaked), soaked.samples[-1]
    stored = slope_per_hour([each.seconds for each in samples], [each.store_mib for each in samples])
    spent = (samples[-1].cpu_s - samples[0].cpu_s) / max(1e-9, samples[-1].seconds - samples[0].seconds)
    rows: tuple[tuple[Cell, ...], ...] = (
        ("minutes", last.seconds / 60),
        ("requests sent", soaked.traffic.num_sent),
        ("finished", sum(each.finished for each in told)),
        ("left by their client", sum(each.left for each in told)),
        ("answers compared with the slow twin", soaked.checked.num_twin),
        ("memory after the warm-up [MiB]", samples[0].rss_mib),
        ("memory at the end [MiB]", samples[-1].rss_mib),
        ("memory at its highest [MiB]", max(each.rss_mib for each in soaked.samples)),
        ("growth of memory [MiB/hour]", growth(soaked)),
        ("records on disk at the end [MiB]", last.store_mib),
        ("growth of the records [MiB/hour]", stored),
        ("cores taken by the server", spent),
    )
    return Table("Steady load", ("", "number"), rows, f"Growth: of the straight line after {WARM_UP:.0%} of the time.")


def verdict(soaked: Soaked, judges_memory: bool) -> list[tuple[str, bool, str]]:
    """(what must hold, whether it does, figures)."""
    told, gauges, wrong = soaked.traffic.told, soaked.samples[-1].gauges, soaked.checked.wrong
    bad = [each for each in told if not each.finished and not each.left]
    claims = [
        ("every request ends", len(told) == soaked.traffic.num_sent, f"{len(told)} of {soaked.traffic.num_sent}"),
        ("no request fails", not bad, f"{len(bad)}" + (f": {bad[0].error}" if bad else "")),
        ("no answer is wrong", not wrong, f"{len(wrong)}" + (f": {wrong[0]}" if wrong else "")),
        (
            "all blocks are free at the end",
            gauges["free_cache_blocks"] == gauges["cache_blocks"] > 0,
            f"{gauges['free_cache_blocks']:.0f} of {gauges['cache_blocks']:.0f}",
        ),
        ("no request is open at the end", gauges["open_requests"] == 0, f"{gauges['open_requests']:.0f}"),
        ("SIGTERM ends it well", soaked.exit_code == 0, f"exit code {soaked.exit_code}"),
    ]
    if judges_memory:
        claims.append(("memory is level", growth(soaked) <= MOST_MIB_PER_HOUR, f"{growth(soaked):.2f} MiB/hour"))
    return claims


def picture(path: Path, soaked: Soaked) -> None:
    """Memory, records, blocks and requests over time. Needs matplotlib: the extra `plot`."""
    from matplotlib.figure import Figure

    minutes = [each.seconds / 60 for each in soaked.samples]
    lines = {
        "memory [MiB]": [each.rss_mib for each in soaked.samples],
        "records on disk [MiB]": [each.store_mib for each in soaked.samples],
        "free blocks": [each.gauges["free_cache_blocks"] for each in soaked.samples],
        "open requests": [each.gauges["open_requests"] for each in soaked.samples],
    }
    figure = Figure(figsize=(10, 8), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(len(lines), sharex=True), lines.items(), strict=True):
        axes.plot(minutes, values)
        axes.set_ylabel(name)
    figure.axes[-1].set_xlabel("minutes")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run, print, and exit with 1 unless everything holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--run", type=Path, help="a run folder to serve, copied first; else a tiny model is trained")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--cache-gb", type=float, default=0.125, help="small, so that it is soon full of old prompts")
    parser.add_argument("--picture", type=Path, help="write a PNG of memory, records, blocks and requests")
    add_output_arguments(parser)
    options = parser.parse_args()
    mix, every_s, seconds = Mix(options.clients, leaving=0.1), 5.0, 60 * options.minutes
    if options.smoke:
        mix, every_s, seconds = Mix(4, answers=(2, 8), num_known=4, leaving=0.2), 0.3, 3.0
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        announce("making the run folder")
        shutil.copytree(options.run, run) if options.run else train_run(run, 40 if options.smoke else 120)
        loaded = load(run)
        prompts = Prompts(loaded)
        announce("asking the slow twin")
        pool = make_pool(loaded, prompts, mix, NAME)
        announce(f"{mix.num_clients} clients for {seconds / 60:.1f} minutes")
        arguments = ("--name", NAME, "--cache-gb", str(options.cache_gb))
        with served(run, Path(folder) / "records", *arguments, log=Path(folder) / "serve.log") as server:
            soaked = asyncio.run(soak(server, Traffic(server.api, NAME, mix, prompts, pool), seconds, every_s))
    claims = verdict(soaked, judges_memory=not options.smoke)
    rows = tuple((claim, "yes" if holds else "NO", text) for claim, holds, text in claims)
    must = Table("What must hold", ("claim", "holds", "figures"), rows)
    settings: dict[str, Any] = {"run": str(options.run or "tiny"), "clients": mix.num_clients}
    emit(Report(settings, (must, figures(soaked))), options)
    if options.picture:
        picture(options.picture, soaked)
    holding = sum(holds for _, holds, _ in claims)
    summary = f"serve_soak: {holding} of {len(claims)} claims hold"
    print(summary, file=sys.stderr if options.json == "-" else sys.stdout)
    sys.exit(holding < len(claims))


if __name__ == "__main__":
    main()
