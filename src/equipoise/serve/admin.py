"""What an operator may do: on a port of its own, for whoever has the token.

The same conversations as the public API's, with other endpoints. Whatever changes the model is done in the
care thread, and is recorded.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from equipoise.disk.atomic import atomic_write
from equipoise.monitor.alert_names import RULES
from equipoise.recovery.policy import SERVING_RUNGS
from equipoise.serve.api.endpoints import Call, Endpoint, Reply
from equipoise.serve.api.errors import ApiError, invalid
from equipoise.serve.api.read import read
from equipoise.serve.api.served import Served
from equipoise.serve.care import Care
from equipoise.serve.operator import Operator
from equipoise.serve.weights import MOST_WORSE
from equipoise.types import Action

T = TypeVar("T")
TOKEN_FILE, VARIABLE, MIN_TOKEN = "admin_token", "EQUIPOISE_ADMIN_TOKEN", 16
_STATUSES = (400, 401, 408, 409, 413, 415, 500, 503)

Handler = Callable[[Served, Call], Awaitable[Reply]]


@dataclass(frozen=True, kw_only=True)
class NoBody:
    """An empty object."""


@dataclass(frozen=True, kw_only=True)
class ReloadBody:
    """checkpoint: its name in the run folder, none for the newest. max_loss_increase: nats per token of held-out text
    by which the new weights may be worse."""

    checkpoint: str | None = None
    max_loss_increase: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerBody:
    """layer: its name, none for all."""

    layer: str | None = None


@dataclass(frozen=True, kw_only=True)
class RecoveryBody:
    """act: whether repairs are made, or only proposed."""

    act: bool


@dataclass(frozen=True, kw_only=True)
class FaultBody:
    """fault: as `equipoise inject` names them, with its settings beside it."""

    fault: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class AlertsBody:
    """What Alertmanager posts (webhook, version 4). Of each alert the label `layer` is used, and `rule` or the name.

    One without a layer, or of a rule that no repair is for, is ignored."""

    alerts: tuple[Mapping[str, Any], ...]


def admin_token(folder: Path, environment: Mapping[str, str]) -> str:
    """That of EQUIPOISE_ADMIN_TOKEN, or a fresh one in the file admin_token of the folder, which its owner can read.

    Raises ValueError for one that is too short to be safe; it is not shown.
    """
    given = environment.get(VARIABLE, "").strip()
    if given:
        if len(given) < MIN_TOKEN or not (given.isascii() and given.isprintable()):
            raise ValueError(f"{VARIABLE}: expected at least {MIN_TOKEN} printable ASCII characters, got {len(given)}")
        return given
    token = secrets.token_urlsafe(32)
    with atomic_write(folder / TOKEN_FILE) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(token.encode())
    return token


def for_operators(served: Served, token: str) -> Served:
    """The same model, for whoever has the token and nobody else."""
    return replace(served, keys=(token,))


class Verbs:
    """What can be done, each a handler of an endpoint."""

    def __init__(self, care: Care, operator: Operator) -> None:
        self._care, self._operator = care, operator

    async def state(self, served: Served, call: Call) -> Reply:
        """All there is to know."""
        state = await _do(self._care.call(self._operator.state))
        return Reply({**state, "engine": vars(served.loop.progress()), "draining": served.loop.draining})

    async def reload(self, served: Served, call: Call) -> Reply:
        """Other weights."""
        body = _body(ReloadBody, call)
        worse = MOST_WORSE if body.max_loss_increase is None else body.max_loss_increase
        return Reply(vars(await _do(self._care.call(lambda: self._operator.reload(body.checkpoint, worse)))))

    async def undo(self, served: Served, call: Call) -> Reply:
        """Those from before."""
        return Reply(vars(await _do(self._care.call(self._operator.undo_reload))))

    async def rollback(self, served: Served, call: Call) -> Reply:
        """The router alone."""
        body = _body(LayerBody, call)
        return Reply(_actions(await _do(self._care.call(lambda: self._operator.rollback_router(body.layer)))))

    async def lift(self, served: Served, call: Call) -> Reply:
        """Repairs in force end."""
        body = _body(LayerBody, call)
        return Reply(_actions(await _do(self._care.call(lambda: self._operator.lift(body.layer)))))

    async def put_in(self, served: Served, call: Call) -> Reply:
        """A fault."""
        body = _body(FaultBody, call)
        return Reply({"fault": await _do(self._care.call(lambda: self._operator.put_in(body.fault)))})

    async def take_out(self, served: Served, call: Call) -> Reply:
        """All faults."""
        return Reply({"faults": await _do(self._care.call(self._operator.take_out))})

    async def recovery(self, served: Served, call: Call) -> Reply:
        """On or off."""
        body = _body(RecoveryBody, call)
        return Reply({"act": await _do(self._care.call(lambda: self._operator.set_act(body.act)))})

    async def alerts(self, served: Served, call: Call) -> Reply:
        """Of an alert manager."""
        done: list[Action] = []
        found, others = _firing(_body(AlertsBody, call))
        for alert in found:
            done += await _do(self._care.call(partial(self._operator.repair, *alert)))
        return Reply({**_actions(done), "ignored": others})

    async def drain(self, served: Served, call: Call) -> Reply:
        """No new requests."""
        await asyncio.to_thread(served.loop.drain, 0.0)
        return Reply({"draining": True, "open": served.loop.progress().num_open})

    async def resume(self, served: Served, call: Call) -> Reply:
        """New requests again."""
        served.loop.resume()
        return Reply({"draining": False, "open": served.loop.progress().num_open})


def endpoints(care: Care, operator: Operator) -> tuple[Endpoint, ...]:
    """The verbs by path."""
    verbs = Verbs(care, operator)
    get = Endpoint("GET", "/admin/state", "Weights, repairs, breakers", verbs.state, dict[str, Any], None, _STATUSES)
    posts: tuple[tuple[str, str, Handler, Any], ...] = (
        ("reload", "Take other weights, verified and judged", verbs.reload, ReloadBody),
        ("reload/undo", "Go back to the weights from before", verbs.undo, NoBody),
        ("router/rollback", "Take the newest known-good router", verbs.rollback, LayerBody),
        ("repairs/lift", "End the repairs that are in force", verbs.lift, LayerBody),
        ("faults", "Put a fault in, for trying this out", verbs.put_in, FaultBody),
        ("faults/remove", "Take all faults out", verbs.take_out, NoBody),
        ("recovery", "Make repairs, or only propose them", verbs.recovery, RecoveryBody),
        ("alerts", "Repair what Alertmanager says", verbs.alerts, AlertsBody),
        ("drain", "Take no new requests", verbs.drain, NoBody),
        ("resume", "Take requests again", verbs.resume, NoBody),
    )
    return (
        get,
        *(
            Endpoint("POST", f"/admin/{path}", told, do, dict[str, Any], body, _STATUSES)
            for path, told, do, body in posts
        ),
    )


def _body(kind: type[T], call: Call) -> T:
    return read(kind, call.body or b"{}")


async def _do(future: Future[T]) -> T:
    """What the care thread gives. Raises ApiError 409, with the reason, for what it refuses."""
    try:
        return await asyncio.wrap_future(future)
    except ValueError as error:
        raise ApiError(409, str(error), None, "refused") from error


def _firing(body: AlertsBody) -> tuple[list[tuple[str, str, str]], int]:
    """((layer, rule, what it says) of the alerts that a repair may help, how many others fire)."""
    found, others = [], 0
    for number, alert in enumerate(body.alerts):
        labels, notes = alert.get("labels"), alert.get("annotations") or {}
        if alert.get("status") == "resolved":
            continue
        if not isinstance(labels, Mapping) or not isinstance(notes, Mapping):
            raise invalid(f"alerts[{number}].labels", "expected an object, as Alertmanager sends it")
        layer, rule = str(labels.get("layer", "")), str(labels.get("rule", RULES.get(str(labels.get("alertname")), "")))
        if layer and rule in SERVING_RUNGS:
            found.append((layer, rule, str(notes.get("summary", "an alert manager says so"))))
        else:
            others += 1
    return found, others


def _actions(actions: list[Action]) -> dict[str, Any]:
    return {"actions": [asdict(replace(each, detail=dict(each.detail))) for each in actions]}
