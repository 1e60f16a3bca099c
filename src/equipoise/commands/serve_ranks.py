"""`equipoise serve` as one of the ranks that torchrun has started: the first serves, the others hold experts."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.commands.serve import Front, RankOptions, ServeOptions, prepare
from equipoise.monitor.sinks.options import Alerts, delivering

if TYPE_CHECKING:
    from equipoise.serve.ranks.world import World

PULSE_S = 1.0  # between two questions whether the others are there, or less with a short --parallel.timeout-s


def serve_over_ranks(run: Path, options: ServeOptions, parallel: RankOptions, alerts: Alerts) -> int:
    """What this rank has to do, to its end. Raises ValueError for what can't be served so, and CollectiveError when
    another rank is lost.
    """
    import torch

    from equipoise.serve.ranks.world import check_size, joined

    check_size(parallel.expert, os.environ)
    refuse(options)
    with joined(parallel.timeout_s) as world:
        if world.rank == 0:
            return _serve(run, options, parallel, alerts, world)
        for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends them to all; the first rank says when to end
            signal.signal(number, signal.SIG_IGN)
        torch.set_num_threads(options.threads or torch.get_num_threads())
        _hold(world)
        return 0


def refuse(options: ServeOptions) -> None:
    """Raise ValueError for what needs all experts in one process."""
    wrong = {
        "ray": (options.ray is not None, "replicas are whole servers; leave one of the two out"),
        "expert_precision": (
            options.expert_precision != "full",
            "experts are served as they were trained; leave it out",
        ),
        "expert_memory": (options.expert_memory is not None, "each rank has its experts in memory; take more ranks"),
        "device": (options.device == "cuda", "ranks compute on CPUs; leave it out"),
        "breaker_by": (options.breaker_by == "expert", "ranks compute at the same time; leave it out to time layers"),
    }
    for name, (given, why) in wrong.items():
        if given:
            raise ValueError(f"{name}: is not to be had with --parallel.expert: {why}")


def _hold(world: World) -> None:
    from equipoise.parallel import CollectiveError
    from equipoise.serve.ranks.holder import Holder
    from equipoise.serve.ranks.lines import Line

    try:
        Holder(Line(0, world)).run()
    except CollectiveError as error:
        raise CollectiveError(f"rank {world.rank}: the rank that serves has gone: {error}") from error


def _serve(run: Path, options: ServeOptions, parallel: RankOptions, alerts: Alerts, world: World) -> int:
    import torch

    from equipoise.models.run_files import Loaded
    from equipoise.parallel import CollectiveError
    from equipoise.plan.placement_file import read_placements
    from equipoise.serve.ranks.front import Ranks, SpreadConfig
    from equipoise.serve.ranks.lines import Lines
    from equipoise.serve.server import Server

    lines, made = Lines(world), list[Ranks]()

    def load(run: Path, dtype: torch.dtype | None) -> Loaded:
        placements = None if parallel.placement is None else read_placements(parallel.placement)
        made.append(Ranks(run, lines, SpreadConfig(placements, parallel.payload), dtype))
        return made[0].loaded

    try:
        loaded, config = prepare(run, options, load)
        [ranks] = made
        ranks.watch(min(PULSE_S, parallel.timeout_s / 4))
        with delivering(alerts, config.folder, partial(print, flush=True), config.name) as sinks:
            front = Front(Server(loaded, config, os.environ, sinks, ranks), options)
            lines.on_lost = front.end
            code = front.run()
    finally:
        lines.close()
    if lines.lost:
        raise CollectiveError(f"the server has ended: {lines.lost}")
    return code
