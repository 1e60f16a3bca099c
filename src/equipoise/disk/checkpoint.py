"""Checkpoints on disk: a folder that is either whole or ignored. Groups of tensors, plain JSON, and a manifest.

It writes, verifies, lists and prunes such folders. It knows nothing about models or optimizers (train/snapshot.py
turns their state into tensors and JSON), never pickles, and never changes a checkpoint once it has its name.

    step-000123/           step-000123-r1/ when step 123 was saved again with other content, after a rollback
      model.safetensors    one file per group of tensors
      optimizer.safetensors
      state.json           {"step": 123, "state": {...}}
      manifest.json        format version, and the size and sha256 of each other file; written last
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from equipoise.disk.files import fsync, sha256_of

JSON: TypeAlias = Any  # None, bool, int, float, str, and lists and str-keyed dicts of them; checked when it is saved

CHECKPOINTS = "checkpoints"  # the folder of a run that they are in
FORMAT = 1
_MANIFEST = "manifest.json"
_STATE = "state.json"
_LEFTOVER = ".tmp-"
_FOLDER = re.compile(r"step-(\d{6,})(?:-r(\d+))?")
_GROUP = re.compile(r"[A-Za-z0-9_-]+")


class CheckpointError(ValueError):
    """A checkpoint could not be written, or is not what was written. The message names the file and the remedy."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One verified checkpoint in memory: tensors (on the CPU) by group and name, and the plain state."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, JSON]
    path: Path


# ---------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, JSON]
) -> Path:
    """Write one checkpoint under `root` and return its folder. After the return it survives a power cut.

    tensors: group name -> tensor name -> dense tensor of any shape on any device. Tied tensors are stored in full,
    each under its own name. state: JSON; NaN and infinities are kept.

    A whole checkpoint is never overwritten. If `step` is already there with the same content, that one is kept and
    returned; with other content (training went on from a rollback), the new one becomes `step-N-r1`, then `-r2`.

    Raises ValueError for content that can't be stored, CheckpointError when the system refuses to write; then the
    half-written files are removed and the earlier checkpoints are as they were.
    """
    _check_content(step, tensors, state)
    root = Path(root)
    temporary = _draft_path(root, step)
    try:
        draft(root, step)
        for group, named in tensors.items():
            save_file(_own_storage(named), group_file(temporary, group))
        path = publish(temporary, root, step, state)
    except (OSError, SafetensorError) as error:
        discard(temporary)
        raise CheckpointError(not_written(root, step, _num_bytes(tensors, state), error)) from error
    except BaseException:
        discard(temporary)
        raise
    return path


def draft(root: Path, step: int) -> Path:
    """An empty folder for the files of a checkpoint that is no checkpoint before `publish`. For whoever writes its
    files in a way of their own, as several processes do.
    """
    temporary = _draft_path(root, step)
    discard(temporary)
    temporary.mkdir(parents=True)
    return temporary


def publish(temporary: Path, root: Path, step: int, state: Mapping[str, JSON]) -> Path:
    """Make a checkpoint of a draft that holds a file for each group (`group_file`); see `save_checkpoint`."""
    _seal(temporary, step, state)
    path = _rename(temporary, root, step)
    fsync(root)
    fsync(root.parent)  # the root may be new itself
    return path


def discard(temporary: Path) -> None:
    """Remove a draft."""
    shutil.rmtree(temporary, ignore_errors=True)


def group_file(folder: Path, group: str) -> Path:
    """The file of one group of tensors in a checkpoint's folder."""
    return folder / f"{group}.safetensors"


def _draft_path(root: Path, step: int) -> Path:
    return root / f"{_LEFTOVER}{_name(step, 0)}-{os.getpid()}"


def _check_content(step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, JSON]) -> None:
    """Refuse what can't come back exactly, before anything is written."""
    if step < 0:
        raise ValueError(f"step must be 0 or more, not {step}: give the number of finished optimizer steps")
    for group, named in tensors.items():
        if not _GROUP.fullmatch(group):
            raise ValueError(f"tensor group {group!r} becomes a file name: use letters, digits, '_' and '-' only")
        for name, tensor in named.items():
            if name == "__metadata__":
                raise ValueError(f"tensor {group}/{name} has a name that safetensors keeps for itself: rename it")
            if tensor.dtype == torch.complex128:
                raise ValueError(f"tensor {group}/{name} is complex128, unknown to safetensors: use view_as_real")
            if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
                raise ValueError(
                    f"tensor {group}/{name} must be dense and hold data, not {tensor.layout} on {tensor.device}: "
                    "save its dense parts under names of their own"
                )
    _check_json(dict(state), "state")


def _check_json(value: Any, where: str) -> None:
    """Raise ValueError for the first value that JSON would refuse or silently change."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}, a {type(key).__name__}: JSON keys are str, use str()")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise ValueError(
            f"{where} is a {type(value).__name__}, which is not JSON: use int(), float(), list() or .tolist(), "
            "or put tensors under `tensors`"
        )


def _seal(folder: Path, step: int, state: Mapping[str, JSON]) -> None:
    """Add the plain state and last the manifest to the tensors' files, and bring all of them down to the disk."""
    (folder / _STATE).write_text(json.dumps({"step": step, "state": dict(state)}))
    files = sorted(folder.iterdir())
    for file in files:
        fsync(file)
    described = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files}
    (folder / _MANIFEST).write_text(json.dumps({"format": FORMAT, "files": described}, indent=1))
    fsync(folder / _MANIFEST)
    fsync(folder)


def _own_storage(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two in one storage (the file format has no notion of sharing)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in named.items():
        tensor = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def _rename(temporary: Path, root: Path, step: int) -> Path:
    """Give the finished folder its name: one atomic rename, onto nothing that exists."""
    manifest = (temporary / _MANIFEST).read_bytes()
    revision = 0
    while (path := root / _name(step, revision)).exists():
        if _quick_problem(path) is None and (path / _MANIFEST).read_bytes() == manifest:
            shutil.rmtree(temporary)
            return path
        revision += 1
    os.rename(temporary, path)
    return path


def _num_bytes(tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, JSON]) -> int:
    return sum(tensor.nbytes for named in tensors.values() for tensor in named.values()) + len(json.dumps(dict(state)))


def not_written(root: Path, step: int, needed: int, error: Exception) -> str:
    """What to tell the user when the system refused to write."""
    existing = next((folder for folder in (root, *root.resolve().parents) if folder.is_dir()), Path("/"))
    free = shutil.disk_usage(existing).free
    return (
        f"the checkpoint of step {step} was not written to {root}: {error}. It needs about {needed:,} bytes, "
        f"{free:,} are free there. Earlier checkpoints are untouched; make room (prune_checkpoints), or check the "
        "permissions and limits of that folder, then save again"
    )


def _name(step: int, revision: int) -> str:
    return f"step-{step:06d}" + (f"-r{revision}" if revision else "")


# ---------------------------------------------------------------------------------------------- reading


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint, after every file has been checked against the manifest, byte for byte.

    Raises CheckpointError that names the file, what is wrong with it, and the checkpoint to load instead.
    """
    path = Path(path)
    verify(path)
    names = _manifest(path)["files"]
    tensors = {Path(name).stem: load_file(path / name) for name in names if name != _STATE}
    step, state = read_state(path)
    return Checkpoint(step, tensors, state, path)


def verify(path: Path) -> None:
    """Raise CheckpointError, as `load_checkpoint` does, unless every file is what the manifest says, byte for byte."""
    problem = _quick_problem(path) or _hash_problem(path)
    if problem is not None:
        raise CheckpointError(f"checkpoint {path} can't be loaded: {problem}. {_remedy(path)}")


def read_state(path: Path) -> tuple[int, Mapping[str, JSON]]:
    """(step, plain state) of a verified checkpoint."""
    record = json.loads((path / _STATE).read_text())
    return record["step"], record["state"]


def _manifest(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
    return manifest


def _quick_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, judged by its manifest and the sizes of its files; None if nothing is."""
    if not path.is_dir():
        return "there is no such folder"
    if not (path / _MANIFEST).is_file():
        return f"{_MANIFEST} is missing, so it was never finished, or was damaged later"
    try:
        manifest = _manifest(path)
        version, files = int(manifest["format"]), dict(manifest["files"])
        sizes = {str(name): int(entry["bytes"]) for name, entry in files.items()}
        _ = [str(entry["sha256"]) for entry in files.values()]
    except (ValueError, KeyError, TypeError) as error:
        return f"{_MANIFEST} is damaged ({error!r})"
    if version != FORMAT:
        return f"it has format {version}, this version of equipoise reads format {FORMAT}; update equipoise"
    if _STATE not in sizes or not all(_is_ours(name) for name in sizes):
        return f"{_MANIFEST} is damaged (it lists {sorted(sizes)})"
    for name, expected in sizes.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        actual = (path / name).stat().st_size
        if actual != expected:
            return f"{name} has {actual:,} bytes, expected {expected:,}" + (" (truncated)" if actual < expected else "")
    return None


def _is_ours(name: str) -> bool:
    """Whether a file name from a manifest is one that we write: no path that leads out of the folder."""
    group = name.removesuffix(".safetensors")
    return name == _STATE or (group != name and _GROUP.fullmatch(group) is not None)


def _hash_problem(path: Path) -> str | None:
    for name, entry in _manifest(path)["files"].items():
        actual = sha256_of(path / name)
        if actual != entry["sha256"]:
            return f"{name} is corrupt: sha256 {actual[:12]}..., expected {entry['sha256'][:12]}..."
    return None


def _remedy(path: Path) -> str:
    others = [other for other in list_checkpoints(path.parent) if other.name != path.name]
    match = _FOLDER.fullmatch(path.name)
    earlier = [other for other in others if match is None or _order(other) < (int(match[1]), int(match[2] or 0))]
    if earlier or others:
        other = (earlier or others)[-1]
        return f"To resume a run without it, move it away. Load another whole checkpoint instead: {other}"
    return f"There is no other whole checkpoint in {path.parent}: restore one from a copy, or start the run again"


# ---------------------------------------------------------------------------------------------- the root folder


def list_checkpoints(root: Path) -> list[Path]:
    """The whole checkpoints under `root`, oldest step first. A cheap check: manifest and sizes, no hashes."""
    root = Path(root)
    if not root.is_dir():
        return []
    folders = [folder for folder in root.iterdir() if _FOLDER.fullmatch(folder.name)]
    return sorted((folder for folder in folders if _quick_problem(folder) is None), key=_order)


def newest_folder(root: Path) -> Path | None:
    """The folder of the highest step (and revision) under `root`, whole or damaged; None without one.

    A killed save leaves no folder of that name, so one that is not whole was damaged later.
    """
    root = Path(root)
    folders = [folder for folder in root.iterdir() if _FOLDER.fullmatch(folder.name)] if root.is_dir() else []
    return max(folders, key=_order, default=None)


def latest_checkpoint(root: Path) -> Path | None:
    """The whole checkpoint with the highest step (and revision of that step) under `root`; None without one."""
    return next(reversed(list_checkpoints(root)), None)


def prune_checkpoints(root: Path, keep: int, protect: Collection[Path] = ()) -> list[Path]:
    """Remove all whole checkpoints but the newest `keep` and those in `protect`; return what was removed.

    Damaged folders are left for a human to look at. Raises ValueError if `keep` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be 1 or more, not {keep}: without a checkpoint a run can't be resumed")
    protected = {Path(path).resolve() for path in protect}
    removed = [path for path in list_checkpoints(root)[:-keep] if path.resolve() not in protected]
    for path in removed:
        doomed = path.with_name(f"{_LEFTOVER}{path.name}-{os.getpid()}")
        shutil.rmtree(doomed, ignore_errors=True)
        # A kill in the middle of the removal must not leave a half-empty folder under a checkpoint's name.
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    return removed


def clean_leftovers(root: Path) -> list[Path]:
    """Remove what killed saves left under `root`; return what was removed. Call it while nothing saves there."""
    leftovers = sorted(Path(root).glob(f"{_LEFTOVER}step-*"))
    for path in leftovers:
        shutil.rmtree(path)
    return leftovers


def _order(path: Path) -> tuple[int, int]:
    match = _FOLDER.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)
