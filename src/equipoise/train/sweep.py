"""Many short runs, one per cell of a grid: what balance costs, and what it buys. What `equipoise bench sweep` runs.

Each cell is an ordinary run in its own folder, with its numbers in result.json when it is done; so a sweep that was
stopped goes on where it was. It draws no conclusions: `sweep_report.py` compares.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from equipoise.disk.atomic import atomic_write
from equipoise.disk.checkpoint import CHECKPOINTS
from equipoise.host.interrupt import interruptible
from equipoise.models.run_files import CONFIG
from equipoise.monitor.store import RunStore
from equipoise.train.config import TrainConfig
from equipoise.train.data import TokenData
from equipoise.train.diagnose import DivergenceError
from equipoise.train.grid import LAST_WINDOWS, Cell, Grid, cell_config
from equipoise.train.loop import Trainer, load_config
from equipoise.train.report import Silent
from equipoise.train.run import open_data
from equipoise.train.specialisation import num_domains

RESULT = "result.json"
MAX_DIFFERENCES = 4  # named when a folder holds another configuration
SPEED_PERIOD_S = 900.0  # the time left is estimated over so long, or a cell's start and end would make it jump


@dataclass(frozen=True)
class CellResult:
    """What one run came to; averages are over the MoE layers.

    loss: nats per token of validation text. max_violation: mean of the last LAST_WINDOWS windows. specialisation:
    mutual information of domain and expert beyond chance, nats; None where the text has one domain. cosine, ratio,
    negative_share: of the balancing gradient to the task gradient, over the second half of the run (see
    `Interference`). tokens_per_s: median while training, measurements left out; None for a run too short to tell.
    """

    coef: float
    rate: float
    seed: int
    loss: float
    max_violation: float
    specialisation: float | None
    cosine: float
    ratio: float
    negative_share: float
    tokens_per_s: float | None

    @property
    def cell(self) -> Cell:
        """Where it belongs."""
        return Cell(self.coef, self.rate, self.seed)


@dataclass(frozen=True)
class SweepResult:
    """All finished cells, in the grid's order. signal: the number of the one that stopped the sweep, or None."""

    out: Path
    recipe: str
    steps: int
    grid: Grid
    cells: tuple[CellResult, ...]
    signal: int | None = None

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        cells = [asdict(cell) for cell in self.cells]
        return {"recipe": self.recipe, "steps": self.steps, "grid": self.grid.fields(), "cells": cells}


def run_sweep(base: TrainConfig, grid: Grid, out: Path, console: Console) -> SweepResult:
    """Run every cell of the grid that has no result yet; return all results.

    The first SIGINT or SIGTERM writes a checkpoint of the cell in hand and returns; the same call goes on from it.
    More coefficients, rates or seeds may be asked of the same folder: what is there is kept. Raises ValueError, before
    anything runs, when a cell's folder holds a run of another configuration; DivergenceError with the cell's name.
    """
    cells = grid.cells
    for cell in cells:
        _refuse_another_configuration(_folder(out, cell), cell_config(base, grid, cell))
    results = {cell: result for cell in cells if (result := read_result(_folder(out, cell))) is not None}
    with interruptible() as interrupted, _progress(console) as progress:
        done = len(results)
        task = progress.add_task("", total=len(cells) * base.steps, completed=done * base.steps, cells=len(cells))
        for seed in grid.seeds:
            todo = [cell for cell in cells if cell.seed == seed and cell not in results]
            if not todo or interrupted() is not None:
                continue
            progress.update(task, description=f"opening the text for seed {seed}")
            vocab, data = _open(cell_config(base, grid, todo[0]))
            for cell in todo:
                progress.update(task, description=str(cell))

                def stop(step: int, done: int = done) -> bool:
                    progress.update(task, completed=done * base.steps + step)
                    return interrupted() is not None

                began = time.monotonic()
                config = cell_config(base, grid, cell).with_vocab(vocab)
                result = run_cell(cell, config, data, _folder(out, cell), stop)
                if result is None:
                    break
                results[cell], done = result, done + 1
                progress.update(task, completed=done * base.steps)
                console.print(_line(result, done, len(cells), time.monotonic() - began), highlight=False)
        ordered = tuple(results[cell] for cell in cells if cell in results)
        return SweepResult(out, base.name, base.steps, grid, ordered, interrupted())


def run_cell(
    cell: Cell, config: TrainConfig, data: TokenData, out: Path, stop: Callable[[int], bool]
) -> CellResult | None:
    """Run one cell to its end and write its result; None when `stop(step)` ended it, with a checkpoint.

    Goes on from the folder's newest checkpoint. Checkpoints are removed with the result: a sweep must not fill a disk.
    """
    if stop(0):
        return None
    trainer = Trainer(config, data, out, Silent(), resume=(out / CONFIG).exists())
    status = "failed"
    try:
        if not trainer.run(stop=lambda: stop(trainer.step_number)):
            status = "interrupted"
            return None
        result = measure(trainer, cell)
        status = "finished"
    except DivergenceError as error:
        raise DivergenceError(f"cell {cell}: {error}") from error
    finally:
        trainer.close(status)
    with atomic_write(out / RESULT) as file:
        file.write(json.dumps(asdict(result), indent=2).encode())
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return result


def measure(trainer: Trainer, cell: Cell) -> CellResult:
    """The numbers of a run that has reached its end."""
    config, store = trainer.config, trainer.store
    layers = store.layers()
    windows = [stats.max_violation for layer in layers for stats in store.routing_history(layer)[-LAST_WINDOWS:]]
    domains = num_domains(trainer.data.val, config.batch_size, config.data.seq_len, config.eval_batches)
    beyond = [layer.beyond_chance for layer in trainer.specialisation()] if domains > 1 else []
    speeds = [speed for _, speed, _ in store.scalar_history("tokens_per_s")]
    return CellResult(
        coef=cell.coef,
        rate=cell.rate,
        seed=cell.seed,
        loss=trainer.evaluate().loss,
        max_violation=float(np.mean(windows)),
        specialisation=float(np.mean(beyond)) if beyond else None,
        cosine=_second_half(store, "interference_cosine", layers, config.steps),
        ratio=_second_half(store, "interference_ratio", layers, config.steps),
        negative_share=_second_half(store, "interference_negative_share", layers, config.steps),
        tokens_per_s=float(np.median(speeds)) if speeds else None,
    )


def _second_half(store: RunStore, name: str, layers: Sequence[str], steps: int) -> float:
    values = [
        value for layer in layers for step, value, _ in store.scalar_history(f"{name}.{layer}") if step > steps / 2
    ]
    return float(np.mean(values)) if values else 0.0


def read_result(out: Path) -> CellResult | None:
    """What result.json says, or None when there is none, or none that can be read: then the cell is run again."""
    try:
        record = json.loads((out / RESULT).read_text(encoding="utf-8"))
        return CellResult(**{each.name: record[each.name] for each in fields(CellResult)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _folder(out: Path, cell: Cell) -> Path:
    return out / "cells" / cell.name


def _open(config: TrainConfig) -> tuple[int, TokenData]:
    """(vocabulary, tokens) of a seed, which decides the split of the text; the same for all its cells."""
    opened, data = open_data(config)
    return opened.model.vocab_size, data


def _refuse_another_configuration(out: Path, wanted: TrainConfig) -> None:
    if not (out / CONFIG).exists():
        return
    there = load_config(out)
    wanted = wanted.with_vocab(there.model.vocab_size)  # the tokenizer's, known once the text is open
    if there == wanted:
        return
    before, now = _flat(json.loads(there.to_json())), _flat(json.loads(wanted.to_json()))
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    listed = ", ".join(f"{name} {before.get(name)} there, {now.get(name)} here" for name in names[:MAX_DIFFERENCES])
    more = f" and {len(names) - MAX_DIFFERENCES} more" if len(names) > MAX_DIFFERENCES else ""
    raise ValueError(
        f"sweep: {out} holds a run of another configuration ({listed}{more}); give this sweep another --out, or the "
        "options of the one that is there"
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {name: value}
    return {path: leaf for key, item in items for path, leaf in _flat(item, f"{name}.{key}" if name else key).items()}


# ---------------------------------------------------------------------------------------------------- for a person


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} steps/s")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps of {task.fields[cells]} cells"),
        _Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        speed_estimate_period=SPEED_PERIOD_S,
        transient=True,
        disable=not console.is_terminal,
    )


def _line(result: CellResult, done: int, total: int, seconds: float) -> str:
    return (
        f"{done}/{total} {result.cell}: loss {result.loss:.3f}, MaxVio {result.max_violation:.2f}, "
        f"cosine {result.cosine:+.2f} ({seconds:.0f} s)"
    )
