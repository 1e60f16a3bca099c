"""A fault of the disk: one file of a checkpoint folder is damaged, and can be put back, also by another process.

The original files are moved, not copied, into a hidden folder beside the checkpoint; putting back is moving them home.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from equipoise.disk.atomic import atomic_write
from equipoise.disk.checkpoint import CHECKPOINTS, list_checkpoints, newest_folder
from equipoise.disk.files import sha256_of
from equipoise.faults.injection import Change, Injection, check_seed

KINDS = ("flip", "truncate", "missing", "wrong_size")
_NAME = re.compile(r"step-[0-9]{6,18}(?:-r[0-9]{1,9})?")
_BACKUP = ".damaged-"
_LEFT = "left.json"  # in the backup: the sha256 of each file as it was left, null for one that is missing
_MANIFEST, _STATE = "manifest.json", "state.json"


@dataclass(frozen=True)
class CheckpointDamage:
    """One file of a checkpoint is damaged, as by a bad disk.

    Imitates a disk that fails, and a copy that was cut off or is of something else. kind: "flip" (one bit), "truncate",
    "missing" (the file), or "wrong_size" (a valid file with a manifest that matches it, whose tensors have other
    shapes, as if the checkpoint were of another model). seed: which file, and where in it. checkpoint: its name, such
    as step-000200; empty for the newest. Taken out: the files get their bytes back.
    """

    kind: Literal["flip", "truncate", "missing", "wrong_size"] = "flip"
    seed: int = 0
    checkpoint: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"CheckpointDamage.kind: expected {', '.join(KINDS)}, got {self.kind!r}")
        if self.checkpoint and not _NAME.fullmatch(self.checkpoint):
            raise ValueError(
                f"CheckpointDamage.checkpoint: expected a name such as step-000200, got {self.checkpoint[:80]!r}"
            )
        check_seed("CheckpointDamage", self.seed)


def checkpoint_of(run: Path, name: str = "") -> Path:
    """The folder of a run's own checkpoint; name: such as step-000200, empty for the newest.

    Raises ValueError for one that is not there, and for a name that leads elsewhere.
    """
    root = run / CHECKPOINTS
    folder = root / name if name else newest_folder(root)
    if folder is None:
        raise ValueError(f"{run}: expected a run with checkpoints, found none in {root}; wait until it has saved one")
    if not _NAME.fullmatch(folder.name) or folder.is_symlink() or folder.parent != root or not folder.is_dir():
        there = sorted(path.name for path in root.glob("step-*") if _NAME.fullmatch(path.name))
        raise ValueError(
            f"checkpoint: expected one of {', '.join(there) or 'none'} in {root}, got {name[:80] or folder.name!r}"
        )
    return folder


def damage(folder: Path, fault: CheckpointDamage) -> Injection:
    """Damage one file of the checkpoint folder. `remove` puts it back; so does `put_back`, in any process.

    Raises ValueError where it is damaged already, or has no file to damage.
    """
    backup = _backup_of(folder)
    if backup.exists():
        raise ValueError(f"{folder.name}: expected a checkpoint without damage, it has some already; remove it first")
    rng = random.Random(fault.seed)
    name = _choose(folder, fault.kind, rng)
    backup.mkdir()
    try:
        made = _damaged(folder, name, fault.kind, rng, backup)
        left = {damaged: None if new is None else sha256_of(new) for damaged, new in made.items()}
        with atomic_write(backup / _LEFT) as file:
            file.write(json.dumps(left).encode())
    except BaseException:
        shutil.rmtree(backup)
        raise
    for damaged, new in made.items():  # killed in between, the original is in the backup: put_back finds it
        (folder / damaged).rename(backup / damaged)
        if new is not None:
            new.rename(folder / damaged)
    return Injection(fault, Change(lambda: put_back(folder)))


def put_back(folder: Path) -> None:
    """Give a damaged checkpoint its files back. Nothing to do where there is no damage.

    Raises ValueError, and moves nothing, when other files have taken their place since.
    """
    backup = _backup_of(folder)
    if not backup.is_dir():
        return
    left: dict[str, str | None] = json.loads((backup / _LEFT).read_text()) if (backup / _LEFT).is_file() else {}
    moved = [file for file in left if (backup / file).is_file()]
    if not folder.is_dir() or any(_now(folder / file) not in (left[file], None) for file in moved):
        raise ValueError(
            f"{folder.name}: expected the checkpoint as it was damaged, it was moved, pruned or saved again; its "
            f"original files are in {backup}: move them where they belong, or delete that folder"
        )
    for file in moved:
        os.replace(backup / file, folder / file)
    shutil.rmtree(backup)


def put_all_back(run: Path) -> list[str]:
    """Give all damaged checkpoints of a run their files back; the names of those.

    Raises ValueError as `put_back`, after it has put back all that it can.
    """
    root = run / CHECKPOINTS
    names = sorted(path.name.removeprefix(_BACKUP) for path in root.glob(f"{_BACKUP}*") if path.is_dir())
    errors = []
    for name in names:
        try:
            put_back(root / name)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("; ".join(errors))
    return names


def _backup_of(folder: Path) -> Path:
    return folder.with_name(f"{_BACKUP}{folder.name}")


def _choose(folder: Path, kind: str, rng: random.Random) -> str:
    """The file to damage."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.is_symlink()]
    if kind == "wrong_size":
        if folder not in list_checkpoints(folder.parent):
            raise ValueError(f"{folder.name}: expected a whole checkpoint to make of it one of another model")
        files = [file for file in files if file.suffix == ".safetensors" and _has_shapes(file)]
        files = [file for file in files if file.name == "model.safetensors"] or files
    elif kind != "missing":
        files = [file for file in files if file.stat().st_size]
    if not files:
        what = "tensors of one or more dimensions" if kind == "wrong_size" else "files"
        raise ValueError(f"{folder.name}: expected a checkpoint with {what}, found none; choose another")
    return rng.choice(files).name


def _has_shapes(file: Path) -> bool:
    with safe_open(file, framework="pt") as tensors:
        return any(tensors.get_slice(key).get_shape() for key in tensors.keys())  # noqa: SIM118 - no mapping


def _damaged(folder: Path, name: str, kind: str, rng: random.Random, where: Path) -> dict[str, Path | None]:
    """By name what is to replace files of the folder, written into `where`; None: the file goes away."""
    old, new = folder / name, where / f"new-{name}"
    if kind == "missing":
        return {name: None}
    if kind == "wrong_size":
        save_file({key: _other_shape(tensor) for key, tensor in load_file(old).items()}, new)
        manifest = where / f"new-{_MANIFEST}"
        record: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
        record["files"][name] = {"bytes": new.stat().st_size, "sha256": sha256_of(new)}
        manifest.write_text(json.dumps(record, indent=1))
        return {name: new, _MANIFEST: manifest}
    shutil.copyfile(old, new)
    place = rng.randrange(old.stat().st_size)
    if kind == "truncate":
        os.truncate(new, place)
        return {name: new}
    with new.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0] ^ (1 << rng.randrange(8))
        file.seek(place)
        file.write(bytes([byte]))
    return {name: new}


def _other_shape(tensor: Tensor) -> Tensor:
    """One more row of zeros."""
    if not tensor.ndim:
        return tensor
    return tensor.new_zeros(tensor.shape[0] + 1, *tensor.shape[1:]).contiguous()


def _now(file: Path) -> str | None:
    return sha256_of(file) if file.is_file() else None
