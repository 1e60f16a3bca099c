"""The comparison: what is asked for, what is measured in which order, and the tables of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from equipoise.bench.architectures.arms import ARMS, BASELINE
from equipoise.bench.architectures.count import flops_per_token
from equipoise.bench.architectures.quality import Outcome, outcome
from equipoise.bench.architectures.speed import Latency, decoding, kept_mib, long_prompts, training_steps
from equipoise.bench.harness import Effort, Seconds, ratio, spread
from equipoise.bench.report import Cell, Table
from equipoise.bench.saved import MIB
from equipoise.models.config import DecoderConfig
from equipoise.models.decoder import Decoder
from equipoise.models.parameters import parameter_counts
from equipoise.train.config import DataConfig, OptimConfig, TrainConfig
from equipoise.train.run import open_data
from equipoise.train.sweep_report import paired_difference

MARGIN = 0.02  # nats per token; a loss is "not worse" when the whole interval lies below
Tick = Callable[[str], None]  # told after each piece of work what was done


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how thoroughly.

    names: of `ARMS`; the baseline is always among them. seeds, steps: of the trainings. batches: of decoding.
    decode_tokens: steps per batch size, over which p99 is taken. contexts: lengths of long prompts.
    """

    names: tuple[str, ...] = tuple(ARMS)
    seeds: int = 3
    steps: int = 300
    batches: tuple[int, ...] = (1, 4, 16, 32)
    decode_tokens: int = 100
    contexts: tuple[int, ...] = (1024, 8192)
    rounds: int = 7

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in ARMS:
                raise ValueError(f"bench architectures: expected some of {', '.join(ARMS)}; got {name!r}")
        for name in ("seeds", "steps", "decode_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"bench architectures: expected --{name} of at least 1, got {getattr(self, name)}")

    @property
    def all_names(self) -> tuple[str, ...]:
        """The baseline first."""
        return (BASELINE, *(name for name in self.names if name != BASELINE))

    @property
    def num_pieces(self) -> int:
        """Of work, each of which is told to `Tick`."""
        return len(self.all_names) * (self.seeds + len(self.batches)) + 1 + len(self.contexts)


def base_run(steps: int) -> TrainConfig:
    """The run that all have in common but for the architecture: 4 layers of dim 96 on the embedded corpus."""
    model = DecoderConfig(
        vocab_size=1024, dim=96, num_layers=4, num_heads=4, num_kv_heads=2, hidden_dim=256, max_seq_len=8192
    )
    return TrainConfig(
        name="architectures",
        model=model,
        data=DataConfig(vocab_size=1024, seq_len=128),
        optim=OptimConfig(lr=3e-3, warmup=min(30, steps)),
        steps=steps,
        batch_size=16,
        bf16=False,
        eval_every=0,
        eval_batches=32,
        checkpoint_every=0,
        watch_every=10,
    )


@dataclass(frozen=True)
class Found:
    """Everything measured, by architecture."""

    tables: tuple[Table, ...]
    losses: Mapping[str, tuple[float, ...]]
    train_ratio: Mapping[str, float]
    decode_rate: Mapping[str, tuple[float, ...]]


def compare(wanted: Comparison, folder: Path, tick: Tick) -> Found:
    """Train, time and count. folder: where trainings that are done are kept, and found again."""
    base = base_run(wanted.steps)
    configs = {name: ARMS[name].of(base.model) for name in wanted.all_names}
    outcomes = _trained(wanted, base, configs, folder, tick)
    torch.manual_seed(0)
    models = {name: Decoder(config) for name, config in configs.items()}
    tokens_BS = torch.randint(base.model.vocab_size, (base.batch_size, base.data.seq_len + 1))
    seconds = training_steps(models, tokens_BS, Effort(wanted.rounds))
    tick("training steps timed")
    latencies: dict[str, list[Latency]] = {name: [] for name in models}
    for batch in wanted.batches:
        for name, model in models.items():
            latencies[name].append(decoding(model, batch, wanted.decode_tokens))
            tick(f"{name}, {batch} answers at once")
    tables = [
        _quality_table(wanted, outcomes),
        _size_table(models, tokens_BS[:, :-1], seconds),
        _decode_table(wanted, latencies),
    ]
    for length in wanted.contexts:
        times = long_prompts(models, length, Effort(rounds=3, warmup=1))
        tick(f"prompts of {length}")
        rows = tuple((name, spread(times[name]).times(1e3), ratio(times, name, BASELINE)) for name in configs)
        columns = ("architecture", "forward [ms]", f"/ {BASELINE}")
        tables.append(Table(f"a prompt of {length} tokens", columns, rows))
    return Found(
        tuple(tables),
        {name: tuple(each.loss for each in found) for name, found in outcomes.items()},
        {name: ratio(seconds, name, BASELINE).median for name in configs},
        {name: tuple(each.rate for each in found) for name, found in latencies.items()},
    )


def _trained(
    wanted: Comparison, base: TrainConfig, configs: Mapping[str, DecoderConfig], folder: Path, tick: Tick
) -> dict[str, list[Outcome]]:
    """Seed by seed, so that an early stop leaves whole comparisons."""
    text = lru_cache(1)(lambda seed: open_data(replace(base, seed=seed))[1])
    found: dict[str, list[Outcome]] = {name: [] for name in configs}
    for name, seed in _cells(configs, wanted.seeds):
        found[name].append(outcome(replace(base, model=configs[name], name=name, seed=seed), text, folder))
        tick(f"{name}, seed {seed}")
    return found


def _cells(names: Mapping[str, object], seeds: int) -> Iterator[tuple[str, int]]:
    return ((name, seed) for seed in range(seeds) for name in names)


def _quality_table(wanted: Comparison, outcomes: Mapping[str, Sequence[Outcome]]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    baseline = [each.loss for each in outcomes[BASELINE]]
    for name, found in outcomes.items():
        losses = [each.loss for each in found]
        violations = [each.max_violation for each in found if each.max_violation is not None]
        balance = float(np.mean(violations)) if violations else None
        row: tuple[Cell, ...] = (name, float(np.mean(losses)), balance)
        if name == BASELINE:
            rows.append((*row, None, None, None, None))
            continue
        difference = paired_difference(losses, baseline)
        ends = [1e3 * end if np.isfinite(end) else None for end in (difference.mean, difference.low, difference.high)]
        rows.append((*row, *ends, verdict(difference.low, difference.high)))
    return Table(
        "quality",
        (
            "architecture",
            "loss [nats]",
            "MaxVio",
            f"- {BASELINE} [mnat]",
            "low",
            "high",
            f"margin {1e3 * MARGIN:g} mnat",
        ),
        tuple(rows),
        f"{wanted.seeds} seeds of {wanted.steps} steps, the same batches for all. low, high: 95 % interval of the "
        "paired difference (Student's t), no correction for several comparisons.",
    )


def verdict(low: float, high: float) -> str:
    """What an interval of the difference in loss says."""
    if high < 0:
        return "better"
    if high < MARGIN:
        return "not worse"
    return "worse" if low > 0 else "open"


def _size_table(models: Mapping[str, Decoder], tokens_BS: Tensor, seconds: Seconds) -> Table:
    rows = []
    for name, model in models.items():
        counts = parameter_counts(model.config)
        flops = flops_per_token(model.config) / 1e3
        sizes = (counts.total / 1e6, counts.active / 1e6, 4 * counts.total / MIB, kept_mib(model, tokens_BS))
        rows.append((name, flops, *sizes, spread(seconds[name]).times(1e3), ratio(seconds, name, BASELINE)))
    columns = (
        "architecture",
        "forward [kFLOP/token]",
        "parameters [M]",
        "active [M]",
        "weights [MiB]",
        "kept for backward [MiB]",
        "forward + backward [ms]",
        f"/ {BASELINE}",
    )
    batch, length = tokens_BS.shape
    note = f"{batch} x {length} tokens, fp32. FLOPs of the products, `models/flops.py`."
    return Table("size and training step", columns, tuple(rows), note)


def _decode_table(wanted: Comparison, latencies: Mapping[str, Sequence[Latency]]) -> Table:
    columns = ["architecture"]
    for batch in wanted.batches:
        columns += [f"{batch}: tokens/s", "p50 [ms]", "p99 [ms]"]
    rows = []
    for name, found in latencies.items():
        row: list[Cell] = [name]
        for each in found:
            row += [each.rate, 1e3 * each.p50, 1e3 * each.p99]
        rows.append(tuple(row))
    return Table(
        "decoding by the number of answers at once",
        tuple(columns),
        tuple(rows),
        f"Greedy, with a cache, fp32; {wanted.decode_tokens} steps each. Models take turns one after another, not "
        "within a step.",
    )
