"""Load with faults: a real server, many clients, and everything that can go wrong. python -m benchmarks.serve_load

A router collapses, a layer becomes slow, checkpoints are damaged, worse or good, clients hang up, and in the end the
server gets SIGTERM with requests open. No request may be lost, no answer may be another's, latency must come back.
Server and clients share the machine's cores. The last line is the verdict, and so is the exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.serve_events import EVENTS, Event, Operator, Scene, Watched, play
from benchmarks.serve_traffic import Checked, Known, Mix, Prompts, Traffic, check, make_pool
from benchmarks.serving import Server, served
from benchmarks.serving_client import PATIENCE_S, Told
from equipoise.bench.harness import Spread
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.models.run_files import Loaded, load
from equipoise.train.loop import Trainer
from equipoise.train.recipes import recipe
from equipoise.train.report import Silent
from equipoise.train.run import open_data

SLOWER, WITHIN_S = 1.2, 30.0
GONE = ("ClientConnectorError", "ServerDisconnectedError", "ClientOSError")  # nobody listens any more
LATE_S = 0.2  # clients go on asking for so long after SIGTERM
NAME = "bench"


@dataclass(frozen=True)
class Size:
    """seconds: of the whole load. window_s: that percentiles are taken over, before and after an event."""

    seconds: float
    flush_s: float
    window_s: float
    mix: Mix
    events: tuple[Event, ...] = EVENTS
    steps: int = 120
    judges_latency: bool = True


FULL = Size(600.0, 2.0, 10.0, Mix(64))
QUICK = replace(FULL, seconds=90.0, flush_s=0.5, window_s=3.0)
SMOKE = Size(
    10.0, 0.2, 0.5, Mix(4, answers=(2, 8), num_known=4), tuple(e for e in EVENTS if e.name != "slow layer"), 40, False
)


@dataclass(frozen=True, eq=False)
class Observed:
    """All that was seen. Times of the clients and of the events are by the same clock. num_open: at SIGTERM."""

    told: Sequence[Told]
    num_sent: int
    events: Sequence[Watched]
    checked: Checked
    began: float
    ended: float
    terminated: float
    exit_code: int
    num_open: int
    server_cores: float
    client_cores: float
    lags: Sequence[float]


def train_run(folder: Path, steps: int) -> Path:
    """A tiny model with a shared expert, which stands in for the others where a breaker is open."""
    config = recipe("tiny")
    moe = config.model.moe
    assert moe is not None
    model = replace(config.model, moe=replace(moe, shared_experts=1))
    config, data = open_data(replace(config, model=model, steps=steps, checkpoint_every=steps // 2))
    trainer = Trainer(config, data, folder, Silent())
    trainer.run()
    trainer.close("finished")
    return folder


async def drive(
    server: Server, run: Path, loaded: Loaded, pool: Sequence[Known], prompts: Prompts, size: Size
) -> Observed:
    """The load, the events, and the end."""
    traffic = Traffic(server.api, NAME, size.mix, prompts, pool)
    clients = asyncio.create_task(traffic.run())
    began, cpu = time.perf_counter(), (server.usage().cpu_s, time.process_time())
    async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False, verify=False) as client:
        operator = Operator(client, server.admin, server.token)
        scene = Scene(operator, traffic, run, loaded.checkpoint.name, list(loaded.model.moe_layers)[-1])
        events = await play(scene, size.events, size.seconds / (len(size.events) + 1))
        seconds = time.perf_counter() - began
        server_cores = (server.usage().cpu_s - cpu[0]) / seconds
        client_cores = (time.process_time() - cpu[1]) / seconds
        num_open = int((await operator.state())["engine"]["num_open"])
    announce(f"SIGTERM with {num_open} requests open")
    terminated = time.perf_counter()
    stopped = asyncio.create_task(asyncio.to_thread(server.stop))
    await asyncio.sleep(LATE_S)
    traffic.stopping = True
    exit_code = await stopped
    await clients
    checked = check(traffic.told, pool, prompts, [event.span for event in events])
    return Observed(
        traffic.told,
        traffic.num_sent,
        events,
        checked,
        began,
        time.perf_counter(),
        terminated,
        exit_code,
        num_open,
        server_cores,
        client_cores,
        traffic.lags,
    )


# ------------------------------------------------------------------------------------------------- figures


def latencies(told: Sequence[Told]) -> tuple[np.ndarray, np.ndarray]:
    """(when, seconds) of the gaps between pieces, by the later one, and of first pieces: two arrays of pairs."""
    between = [(at, gap) for each in told for at, gap in zip(each.pieces[1:], each.between_s, strict=True)]
    first = [(each.pieces[0], each.first_s) for each in told if each.pieces]
    return np.array(first or np.empty((0, 2))), np.array(between or np.empty((0, 2)))


def percentiles(pairs: np.ndarray, begin: float, end: float) -> tuple[float | None, float | None]:
    """(p50, p99) in milliseconds of what came between the two times; None where nothing did."""
    inside = pairs[(pairs[:, 0] >= begin) & (pairs[:, 0] < end), 1]
    if not len(inside):
        return None, None
    half, most = np.percentile(inside, (50, 99))
    return 1e3 * float(half), 1e3 * float(most)


def as_before(pairs: np.ndarray, event: Watched, window_s: float) -> float | None:
    """Seconds from the detection until the p99 of a window is at most 1.2 times that of the one before the event; None
    where that was not seen. From the beginning where there is nothing to detect, from the end of what lasts until it is
    put back."""
    _, before = percentiles(pairs, event.began - window_s, event.began)
    since = event.ended if event.lasts else event.detected or event.began
    for begin in np.arange(since, event.until - window_s, window_s / 4):
        _, after = percentiles(pairs, begin, begin + window_s)
        if before is not None and after is not None and after <= SLOWER * before:
            return float(begin + window_s - since)
    return None


def event_tables(observed: Observed, window_s: float) -> list[Table]:
    """What each event did to latency, and when the server noticed and mended it."""
    first, between = latencies(observed.told)
    rows: list[tuple[Cell, ...]] = []
    times: list[tuple[Cell, ...]] = []
    for event in observed.events:
        until = max(event.over or event.ended, event.began + window_s)
        spans = {
            "before": (event.began - window_s, event.began),
            "during": (event.began, until),
            "after": (event.ended - window_s, event.ended),
        }
        for when, span in spans.items():
            rows.append((event.name, when, *percentiles(first, *span), *percentiles(between, *span)))
        told = [each for each in observed.told if event.span.begin <= each.began < event.ended]
        marked = 100 * sum(bool(each.degraded) for each in told) / max(1, len(told))
        since = [None if at is None else at - event.began for at in (event.detected, event.acted, event.over)]
        repairs = ", ".join(event.repairs) or "-"
        times.append((event.name, *since, as_before(between, event, window_s), marked, repairs, event.said or "-"))
    note = (
        f"Milliseconds. Before: the last {window_s:g} s; during: until the server says that nothing is wrong; after: "
        f"the last {window_s:g} s before the fault is taken out again. Gaps are those between chunks of text."
    )
    columns = ("event", "when", "first token p50", "p99", "between p50", "p99 ")
    named = ("event", "noticed [s]", "acted [s]", "over [s]", "as before [s]", "marked [%]", "tried", "said")
    second = (
        "Seconds from the event; as before: from when it was noticed until the p99 between chunks is at most "
        f"{SLOWER:g} times that of before. Marked: answers begun meanwhile that were marked as degraded."
    )
    return [
        Table("Latency around each event", columns, tuple(rows), note),
        Table("Noticed and mended", named, tuple(times), second),
    ]


def sums_table(observed: Observed, size: Size) -> Table:
    """What became of all requests."""
    told = observed.told
    seconds = observed.terminated - observed.began
    tokens = sum(int(each.usage.get("completion_tokens", 0)) for each in told)
    refused = refused_at_end(observed)
    rows: list[tuple[Cell, ...]] = [
        ("requests sent", observed.num_sent),
        ("finished", sum(each.finished for each in told)),
        ("left by their client", sum(each.left for each in told)),
        ("refused after SIGTERM", len(refused)),
        ("failed", len(failed(observed))),
        ("lost", observed.num_sent - len(told)),
        ("open at SIGTERM", observed.num_open),
        ("answers checked for their own marks", observed.checked.num_own),
        ("compared with the slow twin", observed.checked.num_twin),
        ("of the pool and different while something was in force", observed.checked.num_other),
        ("wrong", len(observed.checked.wrong)),
        ("marked as degraded [%]", 100 * sum(bool(each.degraded) for each in told) / max(1, len(told))),
        ("answer tokens/s", tokens / seconds),
        ("cores taken by the server", observed.server_cores),
        ("cores taken by the clients", observed.client_cores),
        ("clients late to wake up, p50 and p99 [ms]", _lag(observed.lags)),
    ]
    title = f"{size.mix.num_clients} clients for {seconds:.0f} s"
    return Table(title, ("", "number"), tuple(rows), "Server and clients share the cores of this machine.")


def _lag(lags: Sequence[float]) -> Spread:
    half, most = np.percentile(lags, (50, 99))
    return Spread(1e3 * float(half), 1e3 * float(half), 1e3 * float(most))


def refused_at_end(observed: Observed) -> list[Told]:
    """Reached the server on its way out and were told so; or sent after SIGTERM, when nobody listened any more."""
    return [
        each
        for each in observed.told
        if each.error
        and not each.pieces
        and each.ended >= observed.terminated
        and ('"draining"' in each.error or (each.error.startswith(GONE) and each.began >= observed.terminated))
    ]


def failed(observed: Observed) -> list[Told]:
    """Ended otherwise than they should."""
    late = {id(each) for each in refused_at_end(observed)}
    return [each for each in observed.told if not each.finished and not each.left and id(each) not in late]


# ------------------------------------------------------------------------------------------------- the verdict


def verdict(observed: Observed, size: Size) -> list[tuple[str, bool, str]]:
    """(what must hold, whether it does, figures)."""
    lost, bad, wrong = observed.num_sent - len(observed.told), failed(observed), observed.checked.wrong
    claims = [
        ("no request is lost", lost == 0, f"{lost} of {observed.num_sent}"),
        ("no request fails", not bad, f"{len(bad)}" + (f": {bad[0].error}" if bad else "")),
        ("no answer is wrong", not wrong, f"{len(wrong)}" + (f": {wrong[0]}" if wrong else "")),
        ("the slow twin was asked", observed.checked.num_twin > 0, f"{observed.checked.num_twin} answers"),
        ("SIGTERM ends it well", observed.exit_code == 0, f"exit code {observed.exit_code}"),
    ]
    _, between = latencies(observed.told)
    for event, watched in zip(size.events, observed.events, strict=True):
        if event.ills and size.judges_latency:
            claims.append((f"{watched.name}: is noticed", watched.detected is not None, _after(watched)))
        if size.judges_latency:
            took = as_before(between, watched, size.window_s)
            figure = "not seen" if took is None else f"after {took:.1f} s"
            claims.append((f"{watched.name}: latency comes back", took is not None and took <= WITHIN_S, figure))
    return claims


def _after(event: Watched) -> str:
    return "never" if event.detected is None else f"after {event.detected - event.began:.1f} s"


def picture(path: Path, observed: Observed, window_s: float) -> None:
    """Latency and throughput over time, the events marked. Needs matplotlib: the extra `plot`."""
    from matplotlib.figure import Figure

    first, between = latencies(observed.told)
    edges = np.arange(observed.began, max(each.ended for each in observed.told), window_s / 4)
    middles = edges[:-1] - observed.began
    figure = Figure(figsize=(11, 7), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    for name, pairs in (("first token", first), ("between chunks", between)):
        spans = [percentiles(pairs, *span) for span in pairwise(edges)]
        for number, label in enumerate(("p50", "p99")):
            values = [np.nan if each[number] is None else each[number] for each in spans]
            upper.plot(middles, values, label=f"{name}, {label}", linestyle="--" if number else "-")
    pieces = np.array([at for each in observed.told for at in each.pieces])
    counts, _ = np.histogram(pieces, edges)
    lower.plot(middles, counts / (edges[1] - edges[0]), color="black")
    for event in observed.events:
        for axes in (upper, lower):
            axes.axvspan(event.began - observed.began, event.ended - observed.began, alpha=0.12)
        lower.text(event.began - observed.began, 0, f" {event.name}", rotation=90, va="bottom", fontsize=8)
        if event.detected:
            upper.axvline(event.detected - observed.began, color="red", linewidth=0.8)
    upper.set(yscale="log", ylabel="milliseconds")
    upper.legend(ncols=2, fontsize=8)
    lower.set(xlabel="seconds; shaded: from an event until it is taken back; red: noticed", ylabel="chunks per second")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run, print, and exit with 1 unless everything holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_load", description=__doc__)
    parser.add_argument("--run", type=Path, help="a run folder to serve, copied first; else a tiny model is trained")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="90 s in place of ten minutes")
    parser.add_argument("--picture", type=Path, help="write a PNG of latency and throughput")
    add_output_arguments(parser)
    options = parser.parse_args()
    size = SMOKE if options.smoke else replace(FULL if not options.quick else QUICK, mix=Mix(options.clients))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        announce("making the run folder")
        shutil.copytree(options.run, run) if options.run else train_run(run, size.steps)
        loaded = load(run)
        prompts = Prompts(loaded)
        announce("asking the slow twin")
        pool = make_pool(loaded, prompts, size.mix, NAME)
        log = Path(folder) / "serve.log"
        arguments = ("--recover", "--flush-s", str(size.flush_s), "--name", NAME)
        with served(run, Path(folder) / "records", *arguments, log=log) as server:
            observed = asyncio.run(drive(server, run, loaded, pool, prompts, size))
        notes = [line for line in log.read_text().splitlines() if line.startswith("note: ")]
    claims = verdict(observed, size)
    must = Table(
        "What must hold", ("claim", "holds", "figures"), tuple((c, "yes" if h else "NO", f) for c, h, f in claims)
    )
    tables = (must, sums_table(observed, size), *event_tables(observed, size.window_s))
    settings: dict[str, Any] = {
        "run": str(options.run or "tiny"),
        "flush_s": size.flush_s,
        "clients": size.mix.num_clients,
    }
    emit(Report(settings, tables, tuple(notes)), options)
    if options.picture:
        picture(options.picture, observed, size.window_s)
    holding = sum(holds for _, holds, _ in claims)
    summary = f"serve_load: {holding} of {len(claims)} claims hold, {observed.num_sent} requests"
    print(summary, file=sys.stderr if options.json == "-" else sys.stdout)
    sys.exit(holding < len(claims))


if __name__ == "__main__":
    main()
