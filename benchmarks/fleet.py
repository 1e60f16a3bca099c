"""Does the fleet simulation tell the truth?  python -m benchmarks.fleet

Real ranks serve queries by a schedule of arrivals, each a token that goes through MoE layers over gloo's all-to-all.
The same ranks measure their links first, with the code of `equipoise bench links`; the simulation gets these numbers,
the same arrivals and the same popularity of experts, and nothing of the run itself. What differs is its error.

--rate puts each rank into a network namespace behind a link of so many Mbit/s (root only), where links decide.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fleet_ranks import Rehearsal, Work
from benchmarks.netns import cluster, run_ranks
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.parallel.links import Effort
from equipoise.plan.fleet.calibrate import Rehearsed, calibrated
from equipoise.plan.fleet.result import WARM_UP
from equipoise.plan.fleet.scenario import Batching, Machines, ModelShape
from equipoise.plan.fleet.simulate import holders, simulate
from equipoise.plan.links import Links
from equipoise.types import Placement

ROOT = Path(__file__).parents[1]


def run_real(work: Work, rate_mbit: float | None, timeout_s: float) -> dict[str, Any]:
    """What the ranks measured and when each query was served. Raises RuntimeError where they failed."""
    with tempfile.TemporaryDirectory() as folder:
        told, out = Path(folder) / "work.json", Path(folder) / "result.json"
        told.write_text(json.dumps(asdict(work)))
        module = ["-m", "benchmarks.fleet_ranks", str(told), str(out)]
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
        if rate_mbit is not None:
            with cluster(work.ranks, rate_mbit) as where:
                results = run_ranks(where, [sys.executable, *module], paths, timeout_s)
            codes = [result.code for result in results]
            code = max(codes, key=lambda each: (each > 0, each < 0))  # the rank that failed, not those killed for it
            errors = results[codes.index(code)].stderr if code > 0 else f"killed after {timeout_s:.0f} s"
        else:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(work.ranks)]
            environment = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} | os.environ | paths
            command = [sys.executable, *launcher, *module]
            done = subprocess.run(
                command, env=environment, timeout=timeout_s, capture_output=True, text=True, check=False
            )
            code, errors = done.returncode, done.stderr
        if code:
            raise RuntimeError(f"the ranks ended with exit code {code}:\n{errors}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def machines_of(found: dict[str, Any], work: Work) -> tuple[Machines, list[Machines]]:
    """The simulation's machines: of the links alone, and for each load of the rehearsals before and after it."""
    model = work.model
    links = Machines.measured(Links.from_fields(found["links"], "the ranks"), work.ranks)
    links = replace(links, counts_first=True)
    table_ER = holders(Placement.even(model.num_experts, work.ranks))
    holder_LER = np.broadcast_to(table_ER, (model.num_layers, *table_ER.shape))
    drawn = Rehearsal(work)
    parts = [[_rehearsed(drawn, **each) for each in part] for part in found["rehearsed"]]
    shared = replace(links, cores=work.cores)
    return links, [calibrated(model, shared, holder_LER, [*a, *b]) for a, b in itertools.pairwise(parts)]


def _rehearsed(drawn: Rehearsal, tokens: int, seconds: float, expert_R: list[float]) -> Rehearsed:
    home_T, ids_LTK, _ = drawn.draw(tokens)
    return Rehearsed(ids_LTK, home_T, seconds, np.array(expert_R))


def compare(
    work: Work, qps: float, served: dict[str, Any], machines: Sequence[Machines]
) -> tuple[tuple[Cell, ...], ...]:
    """Rows of a table: what was measured, what was simulated, and how far off that is."""
    times, start, done = (np.array(served[name]) for name in ("times", "start", "done"))
    in_time, warm = done <= work.seconds, times >= WARM_UP * work.seconds
    latencies = (done - times)[in_time & warm]
    steps = len(np.unique(start[np.isfinite(start)]))
    real = {
        "latency p50 [ms]": float(np.quantile(latencies, 0.5)) * 1e3,
        "latency p99 [ms]": float(np.quantile(latencies, 0.99)) * 1e3,
        "waiting, mean [ms]": float((start - times)[in_time & warm].mean()) * 1e3,
        "served per second": float(in_time.sum()) / work.seconds,
        "queries per step": float(np.isfinite(start).sum()) / max(steps, 1),
    }
    simulated, by_links = (_simulated(work, qps, each) for each in machines)
    return tuple(
        (name, qps, value, simulated[number], *(100 * (each[number] / value - 1) for each in (simulated, by_links)))
        for number, (name, value) in enumerate(real.items())
    )


def _simulated(work: Work, qps: float, machines: Machines) -> tuple[float, ...]:
    result = simulate(work.scenario(qps, machines), seed=work.seed)
    latency = result.latency
    return latency.p50 * 1e3, latency.p99 * 1e3, result.wait_s * 1e3, result.throughput, result.tokens_per_step


def tables(work: Work, found: dict[str, Any], rate_mbit: float | None) -> tuple[Table, ...]:
    """The comparison by load, and what the simulation was calibrated with."""
    links, machines = machines_of(found, work)
    rows = [
        row
        for qps, served, each in zip(work.loads, found["loads"], machines, strict=True)
        for row in compare(work, qps, served, (each, links))
    ]
    where = "loopback" if rate_mbit is None else f"links of {rate_mbit:g} Mbit/s"
    columns = ("", "queries/s", "real", "simulated", "error [%]", "by links alone [%]")
    note = "error: simulated / real - 1. The simulation knows arrivals, popularity and the calibration below."
    parts: dict[str, Callable[[Machines], float]] = {
        "exchange, start [ms]": lambda m: m.link.start_s * 1e3,
        "exchange, rate [MB/s]": lambda m: m.link.rate / 1e6,
        "expert, start [ms]": lambda m: m.expert.start_s * 1e3,
        "expert, rate [GFLOP/s]": lambda m: m.expert.rate / 1e9,
        "step [ms]": lambda m: m.step_s * 1e3,
        "steps rehearsed": lambda m: len(m.spread),
    }
    costs = tuple((name, *(of(each) for each in (*machines, links))) for name, of in parts.items())
    names = ("part", *(f"{qps:g} queries/s" for qps in work.loads), "links alone")
    return (
        Table(f"{work.ranks} ranks over {where}", columns, tuple(rows), note),
        Table("calibration", names, costs, "Each load: of the rehearsals before and after it."),
    )


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--hidden-dim", type=int, default=1024)
    parser.add_argument("--skew", type=float, default=1.0, help="Zipf exponent of the experts' popularity")
    parser.add_argument("--window", type=float, default=5.0, metavar="MS", help="that a query waits for others")
    parser.add_argument("--max-batch", type=int, default=64, help="queries per step and rank")
    parser.add_argument("--qps", type=float, nargs="+", default=[100.0, 500.0, 2000.0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--rehearsal", type=float, default=10.0, metavar="SECONDS", help="of each rehearsal")
    parser.add_argument("--rate", type=float, metavar="MBIT", help="of each rank's link, in namespaces; needs root")
    parser.add_argument("--seed", type=int, default=0)
    add_output_arguments(parser)
    options = parser.parse_args()
    sizes = tuple(1024 * 4**n for n in range(5))  # what goes over the links in a step, and no more
    effort = Effort(sizes=sizes, dim=options.dim, hidden_dim=options.hidden_dim, rows=(1, 2, 4, 8, 16, 32))
    if options.smoke:
        options.ranks, options.dim, options.hidden_dim, options.qps, options.seconds = 2, 32, 64, [200.0], 0.5
        options.rehearsal = 0.5
        effort = Effort(sizes=(1024, 65536), rows=(1, 4), seconds=0.02, least=3, dim=32, hidden_dim=64)
    try:
        shape = {"num_experts": options.experts, "num_layers": options.layers, "dim": options.dim}
        model = ModelShape(**shape, hidden_dim=options.hidden_dim, bytes_per_element=4, capacity=None)
        batching = Batching(window_s=options.window / 1e3, max_batch=options.max_batch)
        loads, cores = tuple(options.qps), len(os.sched_getaffinity(0))
        work = Work(
            model,
            batching,
            options.ranks,
            options.skew,
            options.seconds,
            loads,
            options.seed,
            effort,
            options.rehearsal,
            cores,
        )
        for qps in loads:
            work.scenario(qps)
        if options.experts % options.ranks:
            raise ValueError(f"experts: expected a multiple of {options.ranks} ranks, got {options.experts}")
        announce(f"{options.ranks} ranks: links, then {len(loads)} loads of {options.seconds:g} s")
        found = run_real(
            work, options.rate, 120 + options.rehearsal + (options.rehearsal + 3 * options.seconds) * len(loads)
        )
    except ValueError as error:
        parser.error(str(error))
    except RuntimeError as error:
        sys.exit(f"fleet: {error}")
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "markdown")}
    emit(Report(settings, tables(work, found, options.rate)), options)


if __name__ == "__main__":
    main()
