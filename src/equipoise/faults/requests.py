"""How a fault reaches a training run in another process: JSON files in a folder of the run, answered in the same way.

One who posts writes a file; the run takes it between two steps, by renaming it, and writes an answer. A request is
data: what may be done is decided by whoever takes it (desk.py). Each is taken at most once.

    requests/                         mode 0700: it belongs to the user who trains
      00017...-3fa9c2d1.json          posted, oldest first by name
      taken/  answers/                by the same names
      lock                            held while the run listens
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from equipoise.disk.atomic import DiskError, atomic_write
from equipoise.faults.catalogue import Fault, from_json, to_json

MAX_BYTES = 65_536  # of a request or an answer
_ID = re.compile(r"[0-9]{20}-[0-9a-f]{8}")
_SUFFIX = ".json"
_POLL_S = 0.02
_AHEAD_NS = 60 * 10**9  # a posted file's clock may be so far ahead of ours; what is beyond is not believed


@dataclass(frozen=True)
class Inject:
    """Put this fault in."""

    fault: Fault


@dataclass(frozen=True)
class Remove:
    """Take out all faults in place, or those of one layer."""

    layer: str | None = None


Request: TypeAlias = Inject | Remove


@dataclass(frozen=True)
class Answer:
    """What became of a request: a sentence, and whether it was done."""

    ok: bool
    text: str


# ---------------------------------------------------------------------------------------------- both sides


def open_requests(run: Path) -> Path:
    """Make the folder of a run that takes requests; what was posted before it began is still there."""
    folder = run / "requests"
    for each in (folder, folder / "taken", folder / "answers"):
        each.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def to_record(request: Request) -> dict[str, Any]:
    """The request as plain JSON."""
    if isinstance(request, Remove):
        return {"request": "remove", "layer": request.layer}
    return {"request": "inject", "fault": to_json(request.fault)}


def from_record(record: object) -> Request:
    """What `to_record` made. Raises ValueError for anything else."""
    if not isinstance(record, dict) or record.get("request") not in ("inject", "remove"):
        raise ValueError('request: expected an object with "request": "inject" or "remove"')
    inject = record["request"] == "inject"
    if unknown := set(record) - {"request", "fault" if inject else "layer"}:
        raise ValueError(f"request: unknown field {min(map(ascii, unknown))[:80]}")
    if inject:
        return Inject(from_json(record.get("fault")))
    layer = record.get("layer")
    if layer is not None and not isinstance(layer, str):
        raise ValueError(f"request.layer: expected text or null, got {type(layer).__name__}")
    return Remove(layer)


# ---------------------------------------------------------------------------------------------- who asks


def post(run: Path, request: Request) -> str:
    """Leave a request for the run; returns its id. Raises ValueError where the run takes none."""
    folder = _folder(run)
    now = time.time_ns()
    waiting = [int(id[:20]) for id in _waiting(folder)]
    number = max([now, *(other + 1 for other in waiting if other < now + _AHEAD_NS)])  # after those, whatever the clock
    id = f"{number:020d}-{secrets.token_hex(4)}"
    with atomic_write(folder / f"{id}{_SUFFIX}") as file:
        file.write(json.dumps(to_record(request)).encode())
    return id


def wait_for(
    run: Path, id: str, timeout_s: float, waiting: Callable[[float], None] = lambda left_s: None
) -> Answer | None:
    """The answer to a request, or None when there is none in time. waiting: called now and then with the time left.

    Raises ValueError for an answer that can't be read.
    """
    path = _folder(run) / "answers" / f"{_checked(id)}{_SUFFIX}"
    until = time.monotonic() + timeout_s
    while True:
        with suppress(FileNotFoundError):
            return _read_answer(path)
        left_s = until - time.monotonic()
        if left_s <= 0:
            return None
        waiting(left_s)
        time.sleep(min(_POLL_S, left_s))


def withdraw(run: Path, id: str) -> bool:
    """Take back a request, so that it is not obeyed later; False where the run has taken it already."""
    try:
        (_folder(run) / f"{_checked(id)}{_SUFFIX}").unlink()
    except FileNotFoundError:
        return False
    return True


def listening(run: Path) -> bool:
    """Whether a process takes this run's requests at the moment; false also after it was killed."""
    try:
        handle = os.open(_folder(run) / "lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


# ---------------------------------------------------------------------------------------------- who is asked


def listen(run: Path, patience_s: float = 1.0) -> int:
    """Hold the lock that says that this run is listening; closing the returned handle lets go of it.

    patience_s: others who look hold it for moments. Raises ValueError where another process holds it.
    """
    handle = os.open(open_requests(run) / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError as error:
            if time.monotonic() > until:
                os.close(handle)
                raise ValueError(
                    f"{run}: expected to be the only process that takes this run's faults, another does already; "
                    "stop it, or train into another --out"
                ) from error
            time.sleep(_POLL_S)


def take(run: Path) -> list[tuple[str, Request]]:
    """(id, request) of all that wait, in the order of posting, each once, also if this process is killed meanwhile.

    What can't be read is answered with what is wrong with it, and left out.
    """
    folder = _folder(run)
    taken = []
    for id in sorted(_waiting(folder)):
        path = folder / "taken" / f"{id}{_SUFFIX}"
        try:
            os.rename(folder / f"{id}{_SUFFIX}", path)  # first: a request that kills us must not do so again
        except FileNotFoundError:
            if path.parent.is_dir():
                continue  # withdrawn
            raise ValueError(f"{path.parent}: expected a folder for what is taken, it is gone; make it again") from None
        try:
            taken.append((id, from_record(_read(path))))
        except (ValueError, OSError, RecursionError) as error:
            with suppress(DiskError):  # its sender waits in vain; those that were taken before it must not be lost
                answer(run, id, f"the request was not understood: {error}", ok=False)
    return taken


def answer(run: Path, id: str, text: str, ok: bool) -> None:
    """Say what became of a request."""
    path = _folder(run) / "answers" / f"{_checked(id)}{_SUFFIX}"
    with atomic_write(path) as file:
        text = text[: MAX_BYTES // 16]  # JSON takes up to 12 bytes for a character
        file.write(json.dumps({"ok": ok, "text": text}).encode())


def _folder(run: Path) -> Path:
    folder = run / "requests"
    if not folder.is_dir():
        raise ValueError(f"{run}: this run takes no faults; start it with --accept-faults")
    return folder


def _waiting(folder: Path) -> list[str]:
    """The ids of what is posted, in no order; other names are not ours."""
    names = [name.removesuffix(_SUFFIX) for name in os.listdir(folder) if name.endswith(_SUFFIX)]
    return [name for name in names if _ID.fullmatch(name)]


def _checked(id: str) -> str:
    if not _ID.fullmatch(id):
        raise ValueError(f"request: expected an id that post returned, got {ascii(id)[:80]}")
    return id


def _read_answer(path: Path) -> Answer:
    try:
        record = _read(path)
    except FileNotFoundError:
        raise  # there is none yet
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: expected the answer of a run, it can't be read: {error}") from error
    if not (isinstance(record, dict) and isinstance(record.get("ok"), bool) and isinstance(record.get("text"), str)):
        raise ValueError(f'{path}: expected the answer of a run, an object with "ok" and "text", got something else')
    return Answer(record["ok"], record["text"])


def _read(path: Path) -> object:
    """The JSON of a plain file of bounded size. Raises ValueError for anything else: a link, a pipe, a large file."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe must not hold up the run
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("expected a plain file")
    with os.fdopen(handle, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"expected at most {MAX_BYTES:,} bytes, got more")
    return json.loads(data)
