"""`equipoise simulate`: a fleet under traffic, flat routing beside two-tier routing."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from equipoise.commands.shown import Json, wide_console
from equipoise.plan.fleet.scenario import Batching, Demand, Design, Machines, ModelShape, Scenario
from equipoise.plan.links import Cost, Links
from equipoise.plan.placement_file import read_placements

if TYPE_CHECKING:
    from equipoise.plan.fleet.result import FleetResult
    from equipoise.plan.fleet.simulate import Trace


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The ranks, and what links and products take where --links doesn't say."""

    ranks: int = 16
    """Each with a link to all others, and its share of the experts."""
    link_us: float = 10.0
    """Latency of an exchange between all ranks."""
    link_gb_s: float = 43.0
    """1e9 bytes per second, of each rank, one way."""
    expert_us: float = 4.0
    """To start an expert: its weights are read."""
    tflops: float = 400.0
    """Of an expert's products."""
    rest_us: float = 0.0
    """Per layer, of all that is neither link nor expert."""

    def machines(self, links: Links | None) -> Machines:
        """With measured links, ranks also tell each other how much will come, as they do over gloo."""
        if links is not None:
            return replace(Machines.measured(links, self.ranks), rest_s=self.rest_us * 1e-6, counts_first=True)
        link, expert = (self.link_us * 1e-6, self.link_gb_s * 1e9), (self.expert_us * 1e-6, self.tflops * 1e12)
        return Machines(ranks=self.ranks, link=Cost(*link), expert=Cost(*expert), rest_s=self.rest_us * 1e-6)


@dataclass(frozen=True, kw_only=True)
class Tiers:
    """The two-tier designs that are put beside flat routing."""

    groups: int | None = None
    """Of ranks. Default: as many as there can be, so that a group is a rank."""
    first: Literal["hash", "learned"] = "hash"
    """How the group is chosen."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """What is read and written."""

    links: Path | None = None
    """Measured links, which `equipoise bench links --out` writes."""
    trace: Path | None = None
    """Recorded routing to replay, of the kinds that `equipoise diagnose` reads; flat routing only."""
    placement: Path | None = None
    """Where experts are, as `equipoise place --out` writes it, to be put beside consecutive ones on each rank; flat
    routing only."""
    picture: Path | None = None
    """A PNG of latencies, queues and links. Needs the extra `plot`."""


def simulate(
    *,
    traffic: Annotated[Demand, tyro.conf.OmitArgPrefixes] = Demand(),  # noqa: B008 - frozen
    model: Annotated[ModelShape, tyro.conf.OmitArgPrefixes] = ModelShape(),  # noqa: B008 - frozen
    hardware: Annotated[Hardware, tyro.conf.OmitArgPrefixes] = Hardware(),
    batching: Annotated[Batching, tyro.conf.OmitArgPrefixes] = Batching(),  # noqa: B008 - frozen
    tiers: Annotated[Tiers, tyro.conf.OmitArgPrefixes] = Tiers(),
    files: Annotated[Files, tyro.conf.OmitArgPrefixes] = Files(),
    seed: int = 0,
    json_: Json = False,
) -> int:
    """Simulate a fleet that serves an MoE model: latency, queues, load of each link, what finds its expert full.

    The default is 100 000 queries per second on 64 experts, 4 on each of 16 GPUs, capacity factor 1.1 with a shared
    expert for what doesn't fit: flat routing, two-tier routing that chooses a GPU for each token, and two-tier routing
    that chooses a GPU for each query. A simulated second takes some seconds. docs/fleet.md says what is assumed.

    Ctrl-C shows what there is.

    For example: equipoise simulate --seconds 2 --links links.json --picture fleet.png

    Args:
        traffic: What arrives.
        model: What it goes through.
        hardware: What it runs on.
        batching: When a step begins.
        tiers: What flat routing is compared with.
        files: What is read and written.
        seed: Of arrivals, popularity and choices; a seed has one result.
        json_: Print the results as one JSON object, and nothing else.
    """
    from equipoise.host.extras import require
    from equipoise.plan.fleet.report import designs_table, draw_designs

    if files.picture:
        require("matplotlib", "plot")  # before the simulation, not after
    links = _links(files.links) if files.links else None
    trace = _trace(files.trace) if files.trace else None
    if trace is not None:
        layers, _, top_k = trace.ids_LTK.shape
        model = replace(model, num_layers=layers, top_k=top_k)
    plain = Scenario(model=model, machines=hardware.machines(links), batching=batching, traffic=traffic)
    scenarios = [replace(plain, design=design) for design in _designs(plain, tiers, files)]
    results, signal = _run(scenarios, seed, trace, json_)
    if files.picture:
        draw_designs(results, files.picture)
    if json_:
        print(json.dumps({"seed": seed, "designs": [result.fields() for result in results], "signal": signal}))
    else:
        console = wide_console()
        console.print(designs_table(results))
        for note in _notes(plain, links, results, signal):
            console.print(note, highlight=False)
        if files.picture:
            console.print(f"picture  {files.picture}", highlight=False)
    return 0 if signal is None else 128 + signal


def _designs(plain: Scenario, tiers: Tiers, files: Files) -> list[Design]:
    """Flat routing first; then its tiers, or another placement of its experts."""
    if files.placement:
        return [Design(), Design(name="placed", placements=tuple(read_placements(files.placement).values()))]
    if files.trace:  # what another router would have chosen was not recorded
        return [Design()]
    ranks, experts = plain.machines.ranks, plain.model.num_experts
    possible = [g for g in range(1, ranks + 1) if ranks % g == experts % g == 0 and plain.model.top_k <= experts // g]
    groups = tiers.groups or max(possible)
    if groups == 1:
        return [Design()]
    where = "rank" if groups == ranks else f"{ranks // groups} ranks"
    two = Design(name=f"{where} per token", groups=groups, first=tiers.first)
    return [Design(), two, replace(two, name=f"{where} per query", scope="query")]


def _run(
    scenarios: list[Scenario], seed: int, trace: Trace | None, quiet: bool
) -> tuple[list[FleetResult], int | None]:
    """The results of the designs until the first signal, and its number."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from equipoise.host.interrupt import interruptible
    from equipoise.plan.fleet.simulate import simulate as run

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console, results = Console(stderr=True), []
    shown = console.is_terminal and not quiet
    with interruptible() as interrupted, Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        for scenario in scenarios:
            task = bar.add_task(scenario.design.name, total=scenario.traffic.seconds)

            def stop(now: float, task: object = task) -> bool:
                bar.update(task, completed=now)  # type: ignore[arg-type]
                return interrupted() is not None

            results.append(run(scenario, seed=seed, trace=trace, stop=stop))
            if interrupted() is not None:
                break
        return results, interrupted()


def _notes(plain: Scenario, links: Links | None, results: list[FleetResult], signal: int | None) -> list[str]:
    """What a reader has to know about these numbers."""
    notes = []
    if links is not None and (links.dim, links.hidden_dim) != (plain.model.dim, plain.model.hidden_dim):
        notes.append(
            f"--links measured an expert of {links.dim} x {links.hidden_dim}, the model's is {plain.model.dim} x "
            f"{plain.model.hidden_dim}: its start is taken to be the same; measure with --dim and --hidden-dim"
        )
    if any(result.in_flight > 0.05 * result.arrived for result in results):
        notes.append("where many are still in flight, the queue grows, and latency with the time that is simulated")
    if signal is not None:
        notes.append(f"stopped at {results[-1].seconds:.3g} s of {results[-1].design}; what there is, is shown")
    return notes


# ---------------------------------------------------------------------------------------------- files


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file; check the path") from error
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, but it cannot be read: {error}") from error


def _links(path: Path) -> Links:
    return Links.from_fields(_json(path), str(path))


def _trace(path: Path) -> Trace:
    """Expert ids of all layers, of the tokens that are there in each of them."""
    import numpy as np

    from equipoise.monitor.recorded_files import Counts, Layout, read
    from equipoise.plan.fleet.simulate import Trace

    found = read(path, Layout())
    if isinstance(found, Counts):
        raise ValueError(f"{path}: expected the expert ids of tokens, got counts, which don't say who went where")
    layers: dict[int, list[np.ndarray]] = {}
    for number, ids_TK, present_TK in found:
        layers.setdefault(number, []).append(ids_TK[present_TK.all(axis=1)])
    each = [np.concatenate(parts) for _, parts in sorted(layers.items())]
    shapes = {ids_TK.shape for ids_TK in each}
    if len(shapes) != 1:
        raise ValueError(f"{path}: expected the same tokens in all layers, got (tokens, k) of {sorted(shapes)}")
    return Trace(np.stack(each))
