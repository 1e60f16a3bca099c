"""What a shortcut hides: ScMoE against a top-2 MoE of the same active FLOPs, over slow and fast links.

python -m benchmarks.scmoe_speed. Ranks in network namespaces of their own, joined by links of a capped rate: a cluster
that waits for its network for real (benchmarks/netns.py; needs root and tc). Each rank has its part of the experts;
models take turns within each round. A training step is forward and backward; the sum of the dense gradients over ranks,
the same for all models, is left out. Communication share: of the top-2 model's MoE layers, the time in which a rank
waits. Packets are large, as between machines of a cluster: each costs the cores that also compute.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.netns import cluster, run_ranks
from equipoise.bench.harness import Spread, spread
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.layer import MoE
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.parallel import ExpertParallel, ParallelConfig, apply_expert_parallel, make_ranks
from equipoise.routing import TopK

RATES: tuple[float | None, ...] = (None, 2000, 1000, 500, 200, 170, 100, 50, 20, 10)  # Mbit/s
NAMES = ("top-2", "pos1", "pos2", "pos3")
PUBLISHED = {"training": 1.49, "inference": 1.82}  # SwinV2-MoE-S, pos3, 60 % communication (arXiv 2404.05019)


@dataclass(frozen=True)
class Size:
    """batch: sequences per rank. expert: hidden size of an expert, and of the dense MLP."""

    dim: int = 512
    expert: int = 2048
    num_experts: int = 8
    pairs: int = 2
    batch: int = 4
    length: int = 128


SMOKE = Size(dim=32, expert=32, num_experts=4, pairs=1, batch=2, length=16)


def config_of(name: str, size: Size) -> DecoderConfig:
    """A dense and an MoE block in turn. top-2, or one routed and one shared expert behind a shortcut."""
    common = {"num_experts": size.num_experts, "hidden_dim": size.expert, "backend": "lean"}
    moe = MoEConfig(**common, router=TopK(k=2))  # type: ignore[arg-type]
    if name != "top-2":
        routed = TopK(k=1, renormalize=False)
        moe = MoEConfig(**common, router=routed, shared_experts=1, shortcut=name)  # type: ignore[arg-type]
    layers = 2 * size.pairs
    return DecoderConfig(
        vocab_size=256,
        dim=size.dim,
        num_layers=layers,
        num_heads=4,
        hidden_dim=size.expert,
        max_seq_len=size.length,
        moe=moe,
        moe_layers=tuple(range(1, layers, 2)),
    )


def active_flops(name: str, size: Size) -> int:
    """Of one forward. Counted, but for the routed experts: the counter can't see into a registered operator."""
    torch.manual_seed(0)
    model = Decoder(config_of(name, size))
    tokens_BS = torch.randint(0, 256, (size.batch, size.length))
    with FlopCounterMode(display=False) as counter:
        model(tokens_BS)
    k = 2 if name == "top-2" else 1
    routed = 6 * size.dim * size.expert * k * tokens_BS.numel() * size.pairs
    return int(counter.get_total_flops()) + routed


# ---------------------------------------------------------------------------------------------- on a rank


def worker(size: Size, rounds: int) -> dict[str, Any]:
    """Seconds of each round by model and kind, and what the top-2 model's MoE layers waited."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = make_ranks(ParallelConfig(expert=dist.get_world_size(), dispatcher="all_to_all"))
    models: dict[str, ExpertParallel] = {}
    for name in NAMES:
        torch.manual_seed(0)
        models[name] = apply_expert_parallel(Decoder(config_of(name, size)), ranks)
    in_moe = _moe_seconds(models["top-2"])
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens_BS = torch.randint(0, 256, (size.batch, size.length), generator=generator)
    seconds: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in NAMES} for kind in PUBLISHED}
    shares: list[float] = []
    for number in range(rounds + 1):
        for kind, step in (("training", _train), ("inference", _infer)):
            for name, parallel in models.items():
                in_moe.clear()
                took, waited = _timed(parallel, lambda s=step, p=parallel: s(p, tokens_BS))
                if number:  # the first is for warming up
                    seconds[kind][name].append(took)
                if number and name == "top-2" and kind == "inference":
                    shares.append(waited / sum(in_moe))
    dist.barrier()
    dist.destroy_process_group()
    return {"seconds": seconds, "shares": shares}


def _timed(parallel: ExpertParallel, run: Callable[[], None]) -> tuple[float, float]:
    """(seconds, of which it waited for exchanges)."""
    for meter in parallel.meters.values():
        meter.take()
    dist.barrier()
    begun = time.perf_counter()
    run()
    took = time.perf_counter() - begun
    return took, sum(meter.take()[0] for meter in parallel.meters.values())


def _train(parallel: ExpertParallel, tokens_BS: torch.Tensor) -> None:
    parallel.model.train()
    parallel.model(tokens_BS).float().logsumexp(-1).mean().backward()
    parallel.model.zero_grad(set_to_none=True)


@torch.no_grad()
def _infer(parallel: ExpertParallel, tokens_BS: torch.Tensor) -> None:
    parallel.model.eval()
    parallel.model(tokens_BS)


def _moe_seconds(parallel: ExpertParallel) -> list[float]:
    """Seconds of each forward of the model's MoE layers, as they come."""
    seconds: list[float] = []
    begun: list[float] = []

    def enter(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        begun.append(time.perf_counter())

    def leave(module: torch.nn.Module, args: tuple[Any, ...], result: object) -> None:
        seconds.append(time.perf_counter() - begun.pop())

    for layer in parallel.layers.values():
        assert isinstance(layer, MoE)
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)
    return seconds


# ---------------------------------------------------------------------------------------------- the cluster


@dataclass(frozen=True)
class Links:
    """ranks: how many, each with a link. mtu: bytes of a packet at most."""

    ranks: int
    mtu: int


@dataclass(frozen=True)
class AtRate:
    """What one rate of the links gave. share: of the top-2 model's MoE time, communication."""

    rate: float | None
    share: Spread
    top_2: dict[str, Spread]
    speedups: dict[str, dict[str, Spread]]
    sent_mb: float

    def row(self, kind: str) -> tuple[Cell, ...]:
        """For the table."""
        rate = "unlimited" if self.rate is None else f"{self.rate:g}"
        ours = (self.speedups[kind][name] for name in NAMES[1:])
        return (rate, self.share.times(100), self.top_2[kind].times(1e3), *ours)


def at_rate(rate: float | None, links: Links, size: Size, rounds: int) -> AtRate:
    """Start the ranks behind links of that rate [Mbit/s]. Raises RuntimeError with what they wrote when one fails."""
    argv = [sys.executable, "-m", "benchmarks.scmoe_speed", "--worker", json.dumps(vars(size)), "--rounds", str(rounds)]
    with cluster(links.ranks, rate, links.mtu) as where:
        results = run_ranks(where, argv, {"OMP_NUM_THREADS": "1"}, timeout_s=900)
    for result in results:
        if result.code:
            raise RuntimeError(f"a rank failed:\n{result.stderr[-2000:]}")
    told = [json.loads(result.stdout.strip().splitlines()[-1]) for result in results]
    top_2, speedups = {}, {}
    for kind in PUBLISHED:
        slowest = {name: np.max([each["seconds"][kind][name] for each in told], axis=0) for name in NAMES}
        top_2[kind] = spread(slowest["top-2"])
        speedups[kind] = {name: spread(slowest["top-2"] / slowest[name]) for name in NAMES[1:]}
    share = spread(np.mean([each["shares"] for each in told], axis=0))
    return AtRate(rate, share, top_2, speedups, results[0].wire.sent / 1e6)


def draw(results: list[AtRate], path: Path) -> None:
    """Speed against the communication share, with the published points."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, kind in zip(axes, PUBLISHED, strict=True):
        shares = [100 * result.share.median for result in results]
        for name, colour in zip(NAMES[1:], ("#3caea3", "#20639b", "#c8321e"), strict=True):
            values = [result.speedups[kind][name] for result in results]
            errors = [[v.median - v.low for v in values], [v.high - v.median for v in values]]
            axis.errorbar(shares, [v.median for v in values], errors, marker="o", ms=4, color=colour, label=name)
        axis.axhline(1, color="grey", lw=0.8)
        axis.plot(60, PUBLISHED[kind], "k*", ms=11, label=f"published, vision: {PUBLISHED[kind]}")
        axis.set_title(kind)
        axis.set_xlabel("communication in the top-2 model's MoE layers [%]")
        axis.legend(frameon=False)
    axes[0].set_ylabel("times as fast as top-2")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scmoe_speed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each rate")
    parser.add_argument("--ranks", type=int, default=2, help="each has an equal part of the experts, and one thread")
    parser.add_argument("--mtu", type=int, default=9000, help="bytes of a packet at most")
    parser.add_argument("--dim", type=int, help=f"of the model, {Size.dim} without it")
    parser.add_argument("--expert", type=int, help=f"hidden size of experts and dense MLPs, {Size.expert} without it")
    parser.add_argument("--rates", type=float, nargs="*", help="of the links [Mbit/s]; 0 is unlimited")
    parser.add_argument("--picture", type=Path, help="write a PNG of speed against communication")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_output_arguments(parser)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(Size(**json.loads(options.worker)), options.rounds)))
        return
    size, rounds = (SMOKE, 2) if options.smoke else (Size(), options.rounds)
    size = replace(size, dim=options.dim or size.dim, expert=options.expert or size.expert)
    rates = [rate or None for rate in options.rates] if options.rates else list(RATES[:1] if options.smoke else RATES)
    links, results = Links(options.ranks, options.mtu), []
    for rate in rates:
        announce(f"links of {'unlimited rate' if rate is None else f'{rate:g} Mbit/s'}")
        results.append(at_rate(rate, links, size, rounds))
    columns = ("link [Mbit/s]", "communication [%]", "top-2 [ms]", *(f"{name} / top-2" for name in NAMES[1:]))
    tables = [Table(kind, columns, tuple(result.row(kind) for result in results)) for kind in PUBLISHED]
    flops = {name: active_flops(name, size) for name in NAMES}
    note = "Active FLOPs of a forward: " + ", ".join(f"{name} {value / 1e9:.3f} G" for name, value in flops.items())
    settings: dict[str, Any] = {**vars(links), "rounds": rounds, **vars(size)}
    if options.picture:
        draw(results, options.picture)
    emit(Report(settings, tuple(tables), (note,)), options)


if __name__ == "__main__":
    main()
