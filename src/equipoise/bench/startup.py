"""Checkpoints against the disk's own speed, start-up of a model, and what importing the package costs.

What is read was just written, so it comes out of the system's memory: the ceiling of reading is measured alike.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from equipoise.bench.fit import power_law
from equipoise.bench.harness import Effort, Spread, Variant, ratio, spread, time_side_by_side
from equipoise.bench.report import Table
from equipoise.disk.checkpoint import load_checkpoint, save_checkpoint
from equipoise.layer import MoE
from equipoise.routing import TopK

MB = 1e6
HELP = """
from equipoise.cli import main
try:
    main(['--help'])
except SystemExit:
    pass
"""
Row: TypeAlias = tuple[str, Spread, Spread, Spread, Spread, Spread, Spread, Spread]
HEAVY = ("torch", "numpy", "transformers", "matplotlib", "tokenizers", "rich", "tyro", "sympy")


def tensors_of(megabytes: float) -> dict[str, Tensor]:
    """Random fp32, in tensors of at most a megabyte and the rest."""
    left = int(megabytes * MB / 4)
    found: dict[str, Tensor] = {}
    while left > 0:
        found[f"weight.{len(found)}"] = torch.randn(min(left, 250_000))
        left -= 250_000
    return found


def disk_tables(megabytes: Sequence[int], effort: Effort) -> Iterator[Table]:
    """Save and load beside plain writing and reading of as many bytes."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for size in megabytes:
            effort.progress.begin(f"a checkpoint of {size} MB")
            rows.append(_disk_row(Path(folder) / str(size), size, effort))
        columns = (
            "checkpoint", "save [MB/s]", "write + fsync [MB/s]", "save / write",
            "load [MB/s]", "read [MB/s]", "load / read", "model start-up [ms]",
        )  # fmt: skip
        save, load, start = (
            power_law(megabytes, [size / row[1].median for size, row in zip(megabytes, rows, strict=True)]),
            power_law(megabytes, [size / row[4].median for size, row in zip(megabytes, rows, strict=True)]),
            power_law(megabytes, [row[7].median for row in rows]),
        )
        note = (
            "A checkpoint is hashed while it is written, and checked against its hashes when it is loaded. Aim: 0.7 of "
            f"the disk's. Save grows as size^{save.shown()}, load as size^{load.shown()}, start-up as "
            f"size^{start.shown()}. start-up: the layer is built and filled from the checkpoint."
        )
        yield Table("checkpoints", columns, tuple(rows), note)


def _disk_row(folder: Path, megabytes: int, effort: Effort) -> Row:
    """(size, save, write, save / write, load, read, load / read, start-up)."""
    folder.mkdir()
    tensors = tensors_of(megabytes)
    raw = torch.randn(int(megabytes * MB / 4)).numpy().tobytes()
    kept = save_checkpoint(folder / "kept", 1, {"model": tensors}, {})
    plain = folder / "plain"
    plain.write_bytes(raw)
    layer = _layer_of(megabytes)
    started = save_checkpoint(folder / "layer", 1, {"model": dict(layer.state_dict())}, {})

    def write() -> None:
        with (folder / "new").open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())

    variants = [
        Variant("save", partial(save_checkpoint, folder / "saved", 1, {"model": tensors}, {}), partial(_clear, folder)),
        Variant("write", write, partial(_clear, folder)),
        Variant("load", partial(load_checkpoint, kept)),
        Variant("read", partial(read, plain)),
        Variant("start", partial(start_up, megabytes, started)),
    ]
    seconds = time_side_by_side(variants, effort)
    rate = {name: spread([megabytes / one for one in times]) for name, times in seconds.items()}
    return (
        f"{megabytes} MB", rate["save"], rate["write"], ratio(seconds, "write", "save"),
        rate["load"], rate["read"], ratio(seconds, "read", "load"), spread(seconds["start"]).times(1e3),
    )  # fmt: skip


def _clear(folder: Path) -> None:
    shutil.rmtree(folder / "saved", ignore_errors=True)
    (folder / "new").unlink(missing_ok=True)


def read(path: Path) -> Tensor:
    """A file's bytes, into memory of its own."""
    found = torch.empty(path.stat().st_size, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        file.readinto(found.numpy())  # type: ignore[arg-type]  # an array is a buffer
    return found


def _layer_of(megabytes: int) -> MoE:
    """Experts of about so many megabytes in fp32."""
    experts = max(2, round(megabytes * MB / 4 / (3 * 128 * 64)))
    with torch.device("meta"):
        layer = MoE(128, 64, experts, router=TopK(k=2))
    return layer.to_empty(device="cpu")


def start_up(megabytes: int, checkpoint: Path) -> MoE:
    """Build the layer, and fill it."""
    layer = _layer_of(megabytes)
    layer.load_state_dict(dict(load_checkpoint(checkpoint).tensors["model"]))
    return layer


def import_table(effort: Effort) -> Table:
    """Seconds of a new Python process, and which heavy modules it has loaded."""
    effort.progress.begin("imports")
    programs = {
        "python alone": "",
        "import equipoise": "import equipoise",
        "equipoise --help": HELP,
        "import torch": "import torch",
        "from equipoise import MoE": "from equipoise import MoE",
    }
    seconds = time_side_by_side([Variant(name, partial(_python, code)) for name, code in programs.items()], effort)
    rows = tuple(
        (
            name,
            spread(seconds[name]),
            spread([mine - bare for mine, bare in zip(seconds[name], seconds["python alone"], strict=True)]),
            _loaded(code),
        )
        for name, code in programs.items()
    )
    columns = ("a new process", "s", "s more than python", "loaded")
    return Table("imports", columns, rows, "Aim: import equipoise under 0.3 s, without torch.")


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def _loaded(code: str) -> str:
    """Of the heavy modules, those that a process has after `code`."""
    said = _python(f"{code}\nimport sys\nprint(','.join(sorted(set({HEAVY!r}) & sys.modules.keys())))")
    return said.splitlines()[-1].replace(",", ", ") or "none"
