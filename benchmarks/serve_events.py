"""What happens to a server under load, one thing after the other, by its admin port and from outside.

Each event begins, is watched until it is over or its time is, and is then put back: faults out, the first weights in.
From the beginning until the server says that all is as it was, answers need not be those of the model as it was loaded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.serve_traffic import Span, Traffic
from equipoise.bench.report import announce
from equipoise.disk.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from equipoise.faults.files import CheckpointDamage, damage

POLL_S = 0.1
State = Mapping[str, Any]


class Operator:
    """Whoever has the admin token."""

    def __init__(self, client: httpx.AsyncClient, admin: str, token: str) -> None:
        self._client, self._admin = client, admin
        self._headers = {"authorization": f"Bearer {token}"}

    async def state(self) -> State:
        """GET /admin/state."""
        found: State = (await self._client.get(f"{self._admin}/state", headers=self._headers)).json()
        return found

    async def do(self, verb: str, **body: Any) -> tuple[int, State]:
        """POST /admin/<verb>: (status, what it says)."""
        response = await self._client.post(f"{self._admin}/{verb}", json=body, headers=self._headers)
        return response.status_code, response.json()


@dataclass(eq=False)
class Watched:
    """One event. Times are seconds of time.perf_counter, None for what did not happen.

    detected: an alert or a breaker that is not closed, which was not there before, or a refusal. acted: the first
    repair in force, or on trial. over: none of this any more, by the server's own word. ended: it was put back.
    restored: all was as it was loaded. until: the next event. repairs: kinds that were seen. lasts: see `Event`.
    """

    name: str
    began: float
    detected: float | None = None
    acted: float | None = None
    over: float | None = None
    ended: float = 0.0
    until: float = 0.0
    restored: float | None = None
    lasts: bool = False
    ills_before: frozenset[str] = frozenset()
    repairs: list[str] = field(default_factory=list)
    said: str = ""

    @property
    def span(self) -> Span:
        """While answers may be others."""
        return Span(self.began, float("inf") if self.restored is None else self.restored)


@dataclass(frozen=True, eq=False)
class Scene:
    """checkpoint: the weights that are served. layer: the fault's."""

    operator: Operator
    traffic: Traffic
    run: Path
    checkpoint: str
    layer: str


@dataclass(frozen=True)
class Event:
    """begin: makes it happen, and returns what was said if that was already all. ills: whether it should be noticed.
    lasts: nothing can be done about it until it is put back."""

    name: str
    begin: Callable[[Scene], Awaitable[str]]
    ills: bool = False
    lasts: bool = False


async def collapse(scene: Scene) -> str:
    """One layer's router sends everything to one expert."""
    return await _fault(scene, fault="collapse", layer=scene.layer, expert=2, intensity=20)


async def slow_layer(scene: Scene) -> str:
    """One layer's experts take a twentieth of a second longer whenever one of them is used."""
    return await _fault(scene, fault="slow-expert", layer=scene.layer, expert=1, seconds=0.05)


async def _fault(scene: Scene, **fault: Any) -> str:
    status, said = await scene.operator.do("faults", fault=fault)
    if status != 200:
        raise RuntimeError(f"faults: expected 200, got {status}: {said}")
    return ""


async def damaged(scene: Scene) -> str:
    """A checkpoint with a flipped bit."""
    newest = await asyncio.to_thread(_copy, scene.run, 0.0)
    injection = damage(scene.run / "checkpoints" / newest, CheckpointDamage("flip", checkpoint=newest))
    try:
        return await _refused(scene, newest)
    finally:
        injection.remove()


async def worse(scene: Scene) -> str:
    """A whole checkpoint of a model that has forgotten what it knew."""
    return await _refused(scene, await asyncio.to_thread(_copy, scene.run, 5.0))


async def _refused(scene: Scene, name: str) -> str:
    status, said = await scene.operator.do("reload", checkpoint=name)
    if status != 409:
        raise RuntimeError(f"reload of {name}: expected 409, got {status}: {said}")
    return str(said["error"]["message"])


async def good(scene: Scene) -> str:
    """An earlier checkpoint, which is a little different."""
    first = list_checkpoints(scene.run / "checkpoints")[0].name
    status, said = await scene.operator.do("reload", checkpoint=first, max_loss_increase=100.0)
    if status != 200:
        raise RuntimeError(f"reload of {first}: expected 200, got {status}: {said}")
    return f"version {said['number']}, {said['source']}"


async def leaving(scene: Scene) -> str:
    """Every client hangs up in the middle, and comes again."""
    scene.traffic.leaving = 1.0
    return ""


def _copy(run: Path, noise: float) -> str:
    """The newest checkpoint once more, with noise of so many standard deviations on every matrix."""
    root = run / "checkpoints"
    newest = load_checkpoint(list_checkpoints(root)[-1])
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and tensor.ndim > 1 and noise
        else tensor
        for name, tensor in newest.tensors["model"].items()
    }
    return save_checkpoint(root, newest.step + 1, {"model": tensors}, {"noise": noise}).name


EVENTS = (
    Event("clients hang up", leaving, lasts=True),
    Event("damaged checkpoint", damaged, ills=True),
    Event("worse checkpoint", worse, ills=True),
    Event("good reload", good),
    Event("slow layer", slow_layer, ills=True),
    Event("router collapse", collapse, ills=True),
)


# ------------------------------------------------------------------------------------------------- the schedule


async def play(scene: Scene, events: tuple[Event, ...], gap_s: float) -> list[Watched]:
    """One event at the beginning of each gap but the first; it is put back after three fifths of it."""
    await asyncio.sleep(gap_s)
    seen = []
    for event in events:
        announce(event.name)
        before = ills(await scene.operator.state())
        began = time.perf_counter()
        watched = Watched(event.name, began, lasts=event.lasts, ills_before=before)
        watched.said = await event.begin(scene)
        if watched.said:
            watched.detected = watched.over = time.perf_counter()
        while time.perf_counter() < began + 0.6 * gap_s:
            _note(watched, await scene.operator.state())
            await asyncio.sleep(POLL_S)
        watched.ended = time.perf_counter()
        await _put_back(scene, watched, began + 0.95 * gap_s)
        seen.append(watched)
        await asyncio.sleep(max(0.0, began + gap_s - time.perf_counter()))
        watched.until = time.perf_counter()
    return seen


def ills(state: State) -> frozenset[str]:
    """Critical alerts, and breakers that are not closed. Drift of the load is a remark: pieces of text differ."""
    alarms = {f"{alert['layer']}:{alert['rule']}" for alert in state["alerts"] if alert["severity"] == "critical"}
    return frozenset(
        alarms | {f"breaker {name}" for name, each in (state["breaker"] or {}).items() if each != "closed"}
    )


def _note(watched: Watched, state: State) -> None:
    """What the server knows by now, of this event."""
    now = time.perf_counter()
    trial, new = state["recovery"]["on_trial"], ills(state) - watched.ills_before
    if new:
        watched.detected = watched.detected or now
        watched.over = None
    kinds = [trial["kind"]] if trial else []
    kinds += ["breaker"] if any(name.startswith("breaker") for name in new) else []
    watched.repairs += [kind for kind in kinds if kind not in watched.repairs]
    if kinds:
        watched.acted = watched.acted or now
    if watched.detected and not new and not trial:
        watched.over = watched.over or now


async def _put_back(scene: Scene, watched: Watched, until: float) -> None:
    """Faults out, the first weights in, and wait for the server to say that all is well."""
    scene.traffic.leaving = None
    await scene.operator.do("faults/remove")
    await scene.operator.do("reload", checkpoint=scene.checkpoint, max_loss_increase=100.0)
    while time.perf_counter() < until:
        state = await scene.operator.state()
        if not (state["faults"] or state["modes"] or state["degraded"] or state["recovery"]["on_trial"]):
            watched.restored = time.perf_counter()
            return
        await asyncio.sleep(POLL_S)
