"""The known-good registry: what a run can go back to, and what was normal then. Routers, not whole checkpoints.

RUN/known_good.json names the records, oldest first; RUN/known_good/SHA256.safetensors holds each one's tensors under
the hash of its bytes. A file is there before the registry names it, and goes after: killed at any moment, every record
that is named is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from equipoise.disk.atomic import atomic_write
from equipoise.disk.files import fsync, sha256_of
from equipoise.monitor.baseline import Baseline, from_json, to_json
from equipoise.recovery.swap import is_finite
from equipoise.types import Finding

FORMAT = 1
_ID = re.compile(r"[0-9a-f]{64}")
_BLOB = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMPORARY = re.compile(r"\.([0-9a-f]{64}\.safetensors|known_good\.json)\.[0-9a-f]+\.tmp")


class KnownGoodError(ValueError):
    """The registry or a record is damaged. The message names the file, what is wrong, and what to use instead."""


class RefusedError(ValueError):
    """A moment is not good enough to be a record. The message says why."""


@dataclass(frozen=True)
class Record:
    """One moment of health.

    id: sha256 of the file of tensors. step: of the optimizer. checkpoint: the name of the folder with all weights, or
    None. loss: nats per token of held-out text. baselines: by layer. recorded_at: seconds since 1970. modes: what was
    in force in a layer then, as `Mode.to_json` has it; none for layers as configured.
    """

    id: str
    step: int
    checkpoint: str | None
    loss: float
    baselines: Mapping[str, Baseline]
    recorded_at: float
    note: str = ""
    modes: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "baselines": to_json(self.baselines)}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Record:
        """What `to_json` made. Raises ValueError, KeyError or TypeError for something else."""
        made = Record(**{**record, "baselines": from_json(record["baselines"])})
        plain = (made.id, made.step, made.checkpoint or "", float(made.loss), float(made.recorded_at), made.note)
        types = [type(value) for value in (*plain, made.modes)]
        if types != [str, int, str, float, float, str, dict] or not _ID.fullmatch(made.id):
            raise ValueError(f"a record with {plain}")
        return made


class KnownGood:
    """The registry of one run folder.

    keep: the newest n records stay, and the one with the lowest loss. tolerance: how much worse than that one, in nats
    per token, a new record may be. Several processes may use one registry.
    Raises ValueError for keep below 1 or a negative tolerance.
    """

    def __init__(self, run_folder: str | Path, *, keep: int = 5, tolerance: float = 0.02) -> None:
        if keep < 1 or not tolerance >= 0:
            raise ValueError(
                f"KnownGood: expected keep of 1 or more and tolerance of 0 or more, got {keep}, {tolerance}"
            )
        self._folder, self._keep, self._tolerance = Path(run_folder), keep, tolerance

    @property
    def _index(self) -> Path:
        return self._folder / "known_good.json"

    @property
    def _blobs(self) -> Path:
        return self._folder / "known_good"

    def path(self, record: Record) -> Path:
        """The file with the record's tensors."""
        return self._blobs / f"{record.id}.safetensors"

    @property
    def records(self) -> tuple[Record, ...]:
        """Those whose file is there in full, oldest first; `load` checks its bytes too.

        Raises KnownGoodError for a damaged registry.
        """
        return tuple(record for record in self._named() if _is_whole(self.path(record)))

    def latest(self) -> Record:
        """The newest. Raises KnownGoodError when there is none."""
        records = self.records
        if not records:
            raise KnownGoodError(f"{self._folder}: there is no known-good record; let the run save a checkpoint first")
        return records[-1]

    def best(self) -> Record:
        """The one with the lowest loss. Raises KnownGoodError when there is none."""
        records = self.records
        if not records:
            return self.latest()
        return min(records, key=lambda record: record.loss)

    def checkpoints(self) -> set[str]:
        """Names of the checkpoints that records go back to, to be protected from pruning."""
        return {record.checkpoint for record in self.records if record.checkpoint is not None}

    def load(self, record: Record) -> dict[str, Tensor]:
        """The record's tensors, after its bytes were checked. Raises KnownGoodError naming a record to use instead."""
        path = self.path(record)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise KnownGoodError(f"{path}: can't be read: {error}. {self._instead(record)}") from error
        if (actual := hashlib.sha256(content).hexdigest()) != record.id:
            raise KnownGoodError(
                f"{path}: is damaged, sha256 {actual[:12]}... and not {record.id[:12]}.... {self._instead(record)}"
            )
        return load(content)

    def put(
        self,
        *,
        step: int,
        tensors: Mapping[str, Tensor],
        baselines: Mapping[str, Baseline],
        loss: float,
        checkpoint: str | None = None,
        findings: Sequence[Finding] = (),
        note: str = "",
        modes: Mapping[str, Any] | None = None,
    ) -> Record:
        """Admit a moment of health. The same step with the same content again is the record that is there.

        findings: what rules say about that moment; any but "info" refuses it. Raises RefusedError with the reason.
        """
        _gate(tensors, baselines, loss, findings)
        content = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
        id = hashlib.sha256(content).hexdigest()
        record = Record(id, step, checkpoint, loss, dict(baselines), time.time(), note, dict(modes or {}))
        with self._locked():
            named = self._named()
            for known in named:
                if (known.id, known.step, known.checkpoint) == (record.id, step, checkpoint):
                    self._write_blob(known, content)  # its file may have been damaged since
                    return known
            whole = [known for known in named if _is_whole(self.path(known))]
            best = min((known.loss for known in whole), default=math.inf)
            if loss > best + self._tolerance:
                raise RefusedError(
                    f"held-out loss is {loss:.4f}, the best record's {best:.4f}: worse by more than allowed"
                )
            self._write_blob(record, content)
            kept = self._kept([*whole, record])
            self._write_index(kept)
            self._clean({each.id for each in kept})
        return record

    def truncate_after(self, step: int) -> None:
        """Forget records of later steps: a run that is resumed from an earlier checkpoint takes another way."""
        with self._locked():
            named = self._named()
            kept = [record for record in named if record.step <= step]
            if len(kept) < len(named):
                self._write_index(kept)
                self._clean({each.id for each in kept})

    def _kept(self, records: Sequence[Record]) -> list[Record]:
        best = min(records, key=lambda record: record.loss)
        newest = records[-self._keep :]
        return [record for record in records if record in newest or record is best]

    def _named(self) -> list[Record]:
        """What the registry says. A missing one is empty, unless there are files that nobody names."""
        try:
            text = self._index.read_text(encoding="utf-8")
        except FileNotFoundError:
            if orphans := self._orphans():
                raise KnownGoodError(
                    f"{self._index}: is missing, and {self._blobs} holds {len(orphans)} records' tensors. Restore it "
                    f"from a copy, or move {self._blobs} away to begin anew"
                ) from None
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise KnownGoodError(f"{self._index}: can't be read: {error}. Restore it from a copy") from error
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}")
            return [Record.from_json(record) for record in data["records"]]
        except (ValueError, KeyError, TypeError) as error:
            raise KnownGoodError(
                f"{self._index}: expected a registry of known-good records, got something else ({error}). Restore it "
                "from a copy, or move it away together with the folder known_good to begin anew"
            ) from error

    def _orphans(self) -> list[Path]:
        return [path for path in self._blobs.glob("*") if _BLOB.fullmatch(path.name)] if self._blobs.is_dir() else []

    def _write_blob(self, record: Record, content: bytes) -> None:
        path = self.path(record)
        if _holds(path, record.id):
            return
        if not self._index.exists():  # a file before the registry would look like a lost one
            self._write_index(())
        with atomic_write(path) as file:
            file.write(content)
        fsync(self._blobs)

    def _write_index(self, records: Sequence[Record]) -> None:
        text = json.dumps({"format": FORMAT, "records": [record.to_json() for record in records]}, indent=1)
        with atomic_write(self._index) as file:
            file.write(text.encode())
        fsync(self._folder)  # a power cut must not bring back names of files that are removed after this

    def _clean(self, ids: set[str]) -> None:
        """Remove files that nobody names, and what killed writers left. Only under the lock."""
        for path in (*self._blobs.iterdir(), *self._folder.glob(f".{self._index.name}.*.tmp")):
            unnamed = _BLOB.fullmatch(path.name) and path.stem not in ids
            if unnamed or _TEMPORARY.fullmatch(path.name):
                path.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time; the system lets go of the lock when a process dies."""
        self._blobs.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._blobs, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _instead(self, record: Record) -> str:
        for other in reversed(self.records):
            if other.id != record.id and _holds(self.path(other), other.id):
                return f"Use the record of step {other.step} instead, {other.id[:12]}"
        return "There is no other whole record: go back to a checkpoint"


def _gate(
    tensors: Mapping[str, Tensor], baselines: Mapping[str, Baseline], loss: float, findings: Sequence[Finding]
) -> None:
    """Raise RefusedError unless this is a moment of health."""
    if bad := [finding for finding in findings if finding.severity != "info"]:
        raise RefusedError(f"{bad[0].rule} in {bad[0].layer}: {bad[0].message}")
    if not math.isfinite(loss):
        raise RefusedError(f"held-out loss is {loss}")
    if not tensors or not baselines:
        raise RefusedError("there are no tensors or no baselines to keep")
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise RefusedError(f"{name} is not finite")


def _is_whole(path: Path) -> bool:
    """Whether a file is there and as long as its own header says. Cheap: it reads the header alone."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _holds(path: Path, id: str) -> bool:
    """Whether a file can be read and has that hash."""
    try:
        return sha256_of(path) == id
    except OSError:
        return False
