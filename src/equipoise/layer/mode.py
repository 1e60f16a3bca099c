"""How a layer departs from its configuration while a repair holds: a frozen record, replaced as a whole.

A `Mode` is plain data, so that a checkpoint, a log and an undo can keep it. `in_force` makes of it what a forward
uses. The layer reads that once per forward: a repair that comes in the middle of one takes effect with the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from equipoise.layer.admission import Admission, Capped, Diverted
from equipoise.layer.capacity import Capacity
from equipoise.layer.feed_forward import FeedForward
from equipoise.routing.round_robin import RoundRobin
from equipoise.routing.router import Router, build_on
from equipoise.routing.top_k import TopKRouter


@dataclass(frozen=True)
class Mode:
    """What differs from the layer's configuration; the default is nothing.

    bias: E numbers, added to the balancer's bias in the selection. round_robin: experts in turn, whatever the token.
    temperature: in place of the router's, in training and eval; changes weights, never who is chosen.
    capacity: in place of the layer's. dense_share: the share of tokens that bypass the experts, drawn at random; the
    stand-in computes them. shut_experts: experts that get no tokens; the stand-in computes theirs.
    boost: balancing losses and steps of a bias count so many times.
    """

    bias: tuple[float, ...] | None = None
    round_robin: bool = False
    temperature: float | None = None
    capacity: Capacity | None = None
    dense_share: float = 0.0
    shut_experts: tuple[int, ...] = ()
    boost: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.dense_share <= 1:
            raise ValueError(f"Mode.dense_share: expected a share in [0, 1], got {self.dense_share}")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"Mode.temperature: expected more than 0, got {self.temperature}")
        if not self.boost > 0:
            raise ValueError(f"Mode.boost: expected more than 0, got {self.boost}; 1 is none")

    @property
    def diverts(self) -> bool:
        """Whether it keeps tokens from their experts."""
        return self.dense_share > 0 or bool(self.shut_experts)

    @property
    def needs_stand_in(self) -> bool:
        """Whether something has to compute what experts do not."""
        return self.diverts or (self.capacity is not None and self.capacity.overflow == "shared")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, what differs from the default alone."""
        values = asdict(self)
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return {f.name: plain[f.name] for f in fields(self) if values[f.name] != f.default}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Mode:
        """What `to_json` made. Raises ValueError for something else."""
        try:
            values: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in record.items()
            }
            if values.get("capacity") is not None:
                values["capacity"] = Capacity(**values["capacity"])
            return Mode(**values)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"mode: expected what Mode.to_json wrote, got {record!r} ({error})") from error


NORMAL = Mode()


@dataclass(frozen=True, eq=False)
class Bypass:
    """What is kept from a layer's experts on top of its mode, for a while: by a breaker.

    It is no part of the mode, so that an undo, a checkpoint or a known-good record never takes it for a repair's. Of
    the two shares the larger holds, of shut experts those of both. dense: the stand-in, where the mode needs none.
    """

    dense_share: float = 0.0
    shut_experts: tuple[int, ...] = ()
    dense: FeedForward | None = None

    def on(self, mode: Mode) -> Mode:
        """Both together. Raises ValueError for a share that is none."""
        shut = tuple(sorted({*mode.shut_experts, *self.shut_experts}))
        return replace(mode, dense_share=max(mode.dense_share, self.dense_share), shut_experts=shut)


NO_BYPASS = Bypass()


@dataclass(frozen=True, eq=False)
class InForce:
    """What a mode and a bypass come to in one layer. None: as the layer is configured.

    bias_E: fp32. dense: computes what is spilled or diverted; None leaves that to the shared experts. mode_dense: of
    the mode alone.
    """

    mode: Mode = NORMAL
    bypass: Bypass = NO_BYPASS
    router: Router | None = None
    admission: Admission | None = None
    bias_E: Tensor | None = None
    dense: FeedForward | None = None
    mode_dense: FeedForward | None = None


def in_force(
    mode: Mode,
    router: Router,
    num_experts: int,
    dense: FeedForward | None,
    has_shared: bool,
    bypass: Bypass = NO_BYPASS,
) -> InForce:
    """Build it. dense: the layer's dense path, if it has one. Raises ValueError for a mode that it can't take."""
    own, mode_dense = mode, dense if mode.needs_stand_in else None
    mode, dense = bypass.on(mode), bypass.dense if mode_dense is None else mode_dense
    traits, name = router.config.traits, type(router.config).__name__
    if mode.bias is not None and (len(mode.bias) != num_experts or not traits.takes_bias):
        raise ValueError(
            f"Mode.bias: expected {num_experts} numbers and a router that a bias moves, got {len(mode.bias)} and {name}"
        )
    if wrong := [expert for expert in mode.shut_experts if not 0 <= expert < num_experts]:
        raise ValueError(f"Mode.shut_experts: expected experts in 0 to {num_experts - 1}, got {wrong}")
    if mode.temperature is not None and not isinstance(router, TopKRouter):
        raise ValueError(f"Mode.temperature: expected a TopK router, {name} has no temperature")
    if mode.capacity and mode.capacity.overflow == "next_choice" and (mode.round_robin or not traits.ranks):
        raise ValueError("Mode.capacity: next_choice needs a router in which tokens rank all experts, such as TopK")
    if mode.needs_stand_in and dense is None and not has_shared:
        raise ValueError(
            "Mode: nothing can stand in for the experts; build the layer with shared_experts=1 or more, or give it a "
            "dense path (equipoise.recovery.dense_path)"
        )
    weight = router.weight
    turn: Router | None = None
    if mode.round_robin:
        if weight is None:
            raise ValueError(f"Mode.round_robin: {name} has no linear weight to take the combine weights from")
        turn = build_on(RoundRobin(router.config.k), weight)
    admission: Admission | None = None
    if mode.diverts:
        admission = Diverted(mode.dense_share, mode.shut_experts)
    elif mode.capacity:
        admission = Capped(mode.capacity)
    device = None if weight is None else weight.device
    bias_E = None if mode.bias is None else torch.tensor(mode.bias, dtype=torch.float32, device=device)
    stand_in = dense if mode.needs_stand_in else None
    return InForce(own, bypass, turn, admission, bias_E, stand_in, mode_dense)
