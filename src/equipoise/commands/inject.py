"""The command that breaks a run on purpose, in another process, and mends it again."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from equipoise.commands.shown import Json

if TYPE_CHECKING:
    from equipoise.faults import Fault


@dataclass(frozen=True, kw_only=True)
class FaultOptions:
    """The fields of the faults; each takes some of them, see --list."""

    layer: str | None = None
    """The layer's name in the model, such as layers.1.mlp."""
    expert: int | None = None
    """Its number in the layer."""
    also: tuple[int, ...] | None = None
    """More experts that a collapse goes to."""
    intensity: float | None = None
    """In logits, or relative to what is there."""
    steps: int | None = None
    """Over which a drift is spread."""
    seconds: float | None = None
    """That a slow expert or rank takes longer."""
    domain: int | None = None
    """The number of the domain that floods the input."""
    mode: str | None = None
    """Of stale-counters: stale or reset."""
    kind: str | None = None
    """Of checkpoint-damage: flip, truncate, missing or wrong_size."""
    checkpoint: str | None = None
    """Which checkpoint is damaged, such as step-000200; the newest if none is named."""
    seed: int | None = None
    """Of what is drawn."""

    def given(self) -> dict[str, Any]:
        """Those that are set, as JSON has them."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values if v is not None}


def inject(
    run: Annotated[Path | None, tyro.conf.Positional] = None,
    fault: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    *,
    options: Annotated[FaultOptions, tyro.conf.OmitArgPrefixes] = FaultOptions(),
    remove: bool = False,
    list_: Annotated[bool, tyro.conf.arg(name="list")] = False,
    timeout_s: float = 60.0,
    json_: Json = False,
) -> int:
    """Break a run on purpose, to see the monitor notice and the ladder repair it. Take it out again with --remove.

    The run must have been started with --accept-faults: equipoise train demo --recover --accept-faults

    Then, from another terminal: equipoise inject runs/demo collapse --layer layers.1.mlp --expert 5 --intensity 40

    checkpoint-damage also works on a run that has ended. The exit code is 0 when it was done, 1 when it was refused.

    Args:
        run: The run folder.
        fault: Which; --list has all, with what they imitate.
        options: What the fault is to be.
        remove: Take out all faults that are in place, or those of --layer.
        list_: Print all faults, and do nothing.
        timeout_s: Seconds to wait for the run's answer.
        json_: The answer as one JSON object.
    """
    from equipoise.faults import CheckpointDamage, requests

    if list_:
        return _list(json_)
    if run is None or (fault is None) is not remove:
        raise ValueError("inject: name a run folder and a fault, or a run folder with --remove; --list has all faults")
    given = options.given()
    request: requests.Request
    if fault is None:
        if wrong := set(given) - {"layer"}:
            raise ValueError(f"inject: --remove takes --layer alone, got --{min(wrong)}")
        request = requests.Remove(options.layer)
    else:
        made = _fault(fault, given)
        if isinstance(made, CheckpointDamage) and not _listens(run):
            return _tell(True, _damage(run, made), json_)
        request = requests.Inject(made)
    return _ask(run, request, timeout_s, json_)


def _fault(name: str, given: dict[str, Any]) -> Fault:
    """The fault, with what was given. Raises ValueError that names the options it takes."""
    from equipoise.faults import FAULTS, from_json

    known = {field.name for field in fields(FAULTS[name])} if name in FAULTS else set(given)
    if wrong := set(given) - known:
        takes = ", ".join(f"--{field.name}" for field in fields(FAULTS[name]))
        raise ValueError(f"inject: {name} takes {takes}; got --{min(wrong)}")
    return from_json({"fault": name} | given)


def _listens(run: Path) -> bool:
    from equipoise.faults import requests

    return (run / "requests").is_dir() and requests.listening(run)


def _damage(run: Path, fault: Any) -> str:
    from equipoise.faults import checkpoint_of, damage

    folder = checkpoint_of(run, fault.checkpoint)
    damage(folder, fault)
    return f"{folder.name} is damaged ({fault.kind}); equipoise inject {run} --remove puts it back"


def _ask(run: Path, request: Any, timeout_s: float, json_: bool) -> int:
    """Leave the request for the run, and wait for what it says."""
    from equipoise.faults import requests
    from equipoise.faults.files import put_all_back

    if not _listens(run):
        mended = put_all_back(run) if isinstance(request, requests.Remove) and run.is_dir() else []
        if mended:
            return _tell(True, f"taken out: damage to {', '.join(mended)}", json_)
        raise ValueError(f"{run}: no run takes faults there now; start it with --accept-faults")
    id = requests.post(run, request)
    shown = sys.stderr.isatty() and not json_

    def waiting(left_s: float) -> None:
        if shown:
            print(f"\rwaiting for the run's next step, {left_s:4.0f} s left ", end="", file=sys.stderr, flush=True)

    try:
        answer = requests.wait_for(run, id, timeout_s, waiting)
    except BaseException:
        requests.withdraw(run, id)
        raise
    finally:
        if shown:
            print("\r" + " " * 50 + "\r", end="", file=sys.stderr)
    if answer is None:
        taken = not requests.withdraw(run, id)
        what = "it was taken, and may have been done" if taken else "it was taken back"
        return _tell(
            False, f"no answer from {run} within {timeout_s:g} s; {what}. Steps may be slow: try --timeout-s", json_
        )
    return _tell(answer.ok, answer.text, json_)


def _tell(ok: bool, text: str, json_: bool) -> int:
    print(json.dumps({"ok": ok, "text": text}) if json_ else text)
    return 0 if ok else 1


def _list(json_: bool) -> int:
    from rich.console import Console
    from rich.table import Table

    from equipoise.faults import FAULTS
    from equipoise.faults.catalogue import summary

    rows = [(name, summary(name), [f"--{field.name}" for field in fields(kind)]) for name, kind in FAULTS.items()]
    if json_:
        print(json.dumps([{"fault": name, "summary": text, "options": options} for name, text, options in rows]))
        return 0
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("fault", "what happens", "options"):
        table.add_column(column)
    for name, text, options in rows:
        table.add_row(name, text, " ".join(options))
    Console().print(table)
    return 0
