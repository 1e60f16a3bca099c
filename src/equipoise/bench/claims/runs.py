"""The training runs behind the claims: each in its own folder, run once, found again by what defines it.

A run is known by a hash of its configuration, seed, probe and of the code that it depends on. Ctrl-C leaves a
checkpoint, from which the same command goes on. Started twice on one folder, two processes share the work.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from equipoise.bench.claims.all_probes import PROBES, sources_of
from equipoise.bench.claims.claim import Arm, Claim, NotRunError
from equipoise.bench.claims.statistics import noise_floor
from equipoise.bench.progress import Pieces
from equipoise.disk.atomic import atomic_write
from equipoise.host.interrupt import interruptible
from equipoise.train.config import TrainConfig
from equipoise.train.data import TokenData
from equipoise.train.diagnose import DivergenceError
from equipoise.train.loop import Trainer
from equipoise.train.report import Silent
from equipoise.train.run import open_data

DEPENDS_ON = ("ops", "routing", "layer", "models", "train", "bench/claims/probes.py")
EXCEPT = "ops/triton/"  # kernels for GPUs: these trainings run on the CPU
RESULT = "result.json"
SPEED_PERIOD_S = 600.0
PATIENCE_S = 1.0  # between looks at what another process is working on


@dataclass(frozen=True)
class Job:
    """An arm with a seed."""

    arm: Arm
    seed: int

    def __str__(self) -> str:
        return f"{self.arm.label}, seed {self.seed}"


@dataclass(frozen=True)
class Runs:
    """What claims ask for their training runs (see `claim.Bench`).

    noise: pairs of arms that differ in nothing that matters. trials: how often something without training is tried.
    """

    out: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    trials: int = 20
    noise: tuple[tuple[Arm, Arm], ...] = ()
    _seen: dict[str, Mapping[str, float]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.seeds or self.trials < 2:
            raise ValueError(f"seeds, trials: expected at least 1 and 2, got {len(self.seeds)} and {self.trials}")

    @cached_property
    def code(self) -> str:
        """Of the source that a result depends on; comments, docstrings and layout left out."""
        return code_version()

    def result(self, arm: Arm, seed: int) -> Mapping[str, float]:
        """The numbers of a finished run, those of the arm's part. Raises NotRunError, ValueError for an empty part."""
        key = self._key(Job(arm, seed))
        if key not in self._seen:
            numbers = read_numbers(self._folder(Job(arm, seed)) / RESULT)
            if numbers is None:
                raise NotRunError(f"the run {Job(arm, seed)} is not there")
            self._seen[key] = numbers
        return part_of(self._seen[key], arm.part)

    def floor(self, metric: str) -> float:
        """How far apart, at 95 %, runs are that differ in nothing that matters. Raises NotRunError."""
        return noise_floor(self.noise_differences(metric))

    def noise_differences(self, metric: str) -> list[float]:
        """Of all pairs and seeds. Raises NotRunError."""
        pairs = [(a, b, seed) for a, b in self.noise for seed in self.seeds]
        return [self.result(a, seed)[metric] - self.result(b, seed)[metric] for a, b, seed in pairs]

    def jobs(self, claims: Sequence[Claim]) -> list[Job]:
        """All runs that claims need, each once, the noise floor's first; seed by seed, so that a stop leaves whole
        comparisons.
        """
        arms: dict[Arm, None] = {}
        if any(claim.arms for claim in claims):
            arms = dict.fromkeys(arm for pair in self.noise for arm in pair)
        arms |= dict.fromkeys(arm for claim in claims for arm in claim.arms)
        return [Job(arm, seed) for seed in self.seeds for arm in arms if seed in arm.seeds(self.seeds)]

    def has(self, job: Job) -> bool:
        """Whether its result is there."""
        return (self._folder(job) / RESULT).exists() and read_numbers(self._folder(job) / RESULT) is not None

    def run(self, jobs: Sequence[Job], console: Console) -> int | None:
        """Run what is missing; return the number of the signal that stopped it, or None. console: for a line per run.

        Raises ValueError (DivergenceError) with the run's name when a loss is no longer finite.
        """
        with interruptible() as interrupted, _progress(console) as progress:
            total = sum(job.arm.config.steps for job in jobs)
            task = progress.add_task("", total=total)
            pending, data = list(jobs), _Data()
            missing = sum(not self.has(job) for job in jobs)
            told = Pieces(missing, lambda line: progress.console.print(line, highlight=False))
            while pending and interrupted() is None:
                left = [job for job in pending if not self._tried(job, data, progress, told, interrupted)]
                done = total - sum(job.arm.config.steps for job in left)
                progress.update(task, completed=done)
                if len(left) == len(pending):
                    time.sleep(PATIENCE_S)  # another process has the rest in hand
                pending = left
            return interrupted()

    def _tried(
        self, job: Job, data: _Data, progress: Progress, told: Pieces, interrupted: Callable[[], int | None]
    ) -> bool:
        """Whether the job is done, perhaps now."""
        task = progress.task_ids[0]
        if self.has(job):
            return True
        if interrupted() is not None:
            return False
        with _held(self._folder(job)) as mine:
            if not mine or self.has(job):
                return mine
            began, before = time.monotonic(), progress.tasks[0].completed
            progress.update(task, description=str(job))

            def stop(step: int) -> bool:
                progress.update(task, completed=before + step)
                return interrupted() is not None

            if not run_job(job, self._folder(job), data, stop):
                return False
            numbers = self.result(job.arm, job.seed)
            shown = ", ".join(f"{name} {numbers[name]:.3f}" for name in ("loss", "max_violation") if name in numbers)
            told.done(f"{job}: {shown or 'measured'}, {time.monotonic() - began:.0f} s")
            return True

    def _folder(self, job: Job) -> Path:
        return self.out / "cells" / self._key(job)

    def _key(self, job: Job) -> str:
        config = json.loads(run_config(job).to_json())
        del config["data"]["cache_dir"]
        del config["name"]
        defined = {"config": config, "probe": job.arm.probe, "code": self.code, "torch": torch.__version__}
        if own := _code_of_probe(job.arm.probe):
            defined["probe code"] = own
        return hashlib.sha256(json.dumps(defined, sort_keys=True).encode()).hexdigest()[:20]


def run_config(job: Job) -> TrainConfig:
    """The arm's with the seed. Repairs are off: they would mend what is measured."""
    return replace(job.arm.config, seed=job.seed, name=job.arm.label, recover=False, keep_checkpoints=1)


def run_job(job: Job, out: Path, data: _Data, stop: Callable[[int], bool]) -> bool:
    """Train, or go on from the folder's checkpoint, measure, and write the numbers. False when `stop` ended it."""
    config, tokens = data.open(run_config(job))
    resume = (out / "run" / "config.json").exists()
    trainer = Trainer(config, tokens, out / "run", Silent(), resume=resume)
    status = "failed"
    try:
        if not trainer.run(stop=lambda: stop(trainer.step_number)):
            status = "interrupted"
            return False
        numbers = PROBES[job.arm.probe](trainer)
        status = "finished"
    except DivergenceError as error:
        raise DivergenceError(f"{job}: {error}") from error
    finally:
        trainer.close(status)
    record = {"label": job.arm.label, "seed": job.seed, "probe": job.arm.probe, "numbers": numbers}
    with atomic_write(out / RESULT) as file:
        file.write(json.dumps(record, indent=1).encode())
    shutil.rmtree(out / "run", ignore_errors=True)
    return True


def part_of(numbers: Mapping[str, float], part: str) -> Mapping[str, float]:
    """Those whose names begin with the part and a dot, without that; all for "". Raises ValueError where none does."""
    if not part:
        return numbers
    found = {name[len(part) + 1 :]: value for name, value in numbers.items() if name.startswith(f"{part}.")}
    if not found:
        raise ValueError(f"part: expected the beginning of a number's name, got {part!r} of {', '.join(numbers)}")
    return found


def read_numbers(path: Path) -> Mapping[str, float] | None:
    """What a run came to, or None where there is nothing that can be read: then it is run again."""
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))["numbers"]
        return {str(name): float(value) for name, value in numbers.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def code_version(root: Path | None = None, parts: tuple[str, ...] = DEPENDS_ON) -> str:
    """A hash of the code in these parts, less EXCEPT. Comments, docstrings and layout do not count."""
    root = root or Path(__file__).parents[2]
    digest = hashlib.sha256()
    for part in parts:
        path = root / part
        for file in [path] if path.suffix else sorted(path.rglob("*.py")):
            name = file.relative_to(root).as_posix()
            if name.startswith(EXCEPT):
                continue
            digest.update(name.encode())
            digest.update(ast.dump(_bare(ast.parse(file.read_text(encoding="utf-8")))).encode())
    return digest.hexdigest()[:12]


@cache
def _code_of_probe(probe: str) -> str:
    """A hash of what this probe depends on beyond DEPENDS_ON; "" where that is nothing."""
    sources = sources_of(probe)
    return code_version(parts=sources) if sources else ""


def _bare(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return tree


class _Data:
    """The text of each seed, opened once."""

    def __init__(self) -> None:
        self._opened: dict[str, tuple[int, TokenData]] = {}

    def open(self, config: TrainConfig) -> tuple[TrainConfig, TokenData]:
        """The configuration with the tokenizer's vocabulary, and the tokens."""
        key = f"{config.data} {config.seed}"
        if key not in self._opened:
            opened, tokens = open_data(config)
            self._opened[key] = (opened.model.vocab_size, tokens)
        vocab, tokens = self._opened[key]
        return config.with_vocab(vocab), tokens


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Whether this process may work in the folder; it is freed when the process ends, however it does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} steps/s")


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        _Rate(),
        TimeRemainingColumn(),
    )
    return Progress(
        *columns,
        console=console,
        speed_estimate_period=SPEED_PERIOD_S,
        transient=True,
        disable=not console.is_terminal,
    )
