"""Faults that cost time: an expert, or all layers, take longer. Outputs stay bit-identical.

The time is spent by a hook on the layer's experts, before they compute, on the processor and not asleep.
A model that torch.compile has compiled already does not see new hooks: inject before it is compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise.faults.injection import Change, Run, check_positive, team_of
from equipoise.faults.targets import Target, check_expert, find, targets
from equipoise.layer import MoE
from equipoise.layer.choice import Choice
from equipoise.layer.experts import Experts
from equipoise.monitor.adapters.padding import Arguments
from equipoise.monitor.adapters.transformers_moe import INDEX_NAMES

MOST_SECONDS = 60.0  # per forward: a slip of the finger must not stop a run for a day


@dataclass(frozen=True)
class SlowExpert:
    """A layer's expert computation takes `seconds` longer whenever that expert has tokens in the batch.

    Where a layer's experts are timed one by one, it is that expert's own computation that does. Imitates an expert on a
    device that is throttled or shared. On a GPU each such forward waits for the device. Taken out: the hook is removed.
    """

    layer: str
    expert: int
    seconds: float

    def __post_init__(self) -> None:
        check_positive("SlowExpert.seconds", self.seconds, MOST_SECONDS)

    def put_in(self, model: nn.Module, run: Run | None) -> Change:
        """Hook the experts of the layer."""
        target = find(model, "SlowExpert", self.layer)
        if isinstance(target.block, Choice):
            raise ValueError(
                f"SlowExpert.layer: expected an MoE layer, {self.layer} chooses attention experts, which are computed "
                "inside the attention and not one by one; choose another layer"
            )
        check_expert("SlowExpert.expert", target, self.expert)
        places = target.places(self.expert, team_of(run))
        if not places:
            return Change()  # another process holds it
        has_tokens = _has_tokens(target, places[0])
        if not isinstance(target.block, MoE):
            return _unhook([_slow(target, self.seconds, has_tokens)])
        delay = _Delay(target.block.experts, places[0], self.seconds)
        hooked = _unhook(
            [_slow(target, self.seconds, lambda args, kwargs: not delay.in_it() and has_tokens(args, kwargs))]
        )

        def remove() -> None:
            hooked.undo()
            delay.remove()

        return Change(remove)


@dataclass(frozen=True)
class SlowRank:
    """The expert computation of every MoE layer takes `seconds` longer, in each forward.

    Imitates a straggler: a rank whose device is slower than the others; over ranks, the main one. Taken out: the hooks
    are removed.
    """

    seconds: float

    def __post_init__(self) -> None:
        check_positive("SlowRank.seconds", self.seconds, MOST_SECONDS)

    def put_in(self, model: nn.Module, run: Run | None) -> Change:
        """Hook the experts of all layers."""
        found = [target for target in targets(model).values() if not isinstance(target.block, Choice)]
        if not found:
            raise ValueError(f"SlowRank: expected a model with MoE layers, {type(model).__name__} has none")
        if not team_of(run).is_main:
            return Change()
        return _unhook([_slow(target, self.seconds, lambda args, kwargs: True) for target in found])


class _Delay:
    """Burns the time inside one expert's computation while others time experts singly, and is not there while nobody
    does: probes make a layer compute its experts one by one."""

    def __init__(self, experts: Experts, expert: int, seconds: float) -> None:
        self._experts, self._expert, self._seconds = experts, expert, seconds

    def in_it(self) -> bool:
        """Before a forward: whether it burns there. It comes and goes with the others."""
        probes = self._experts.probes
        wanted = any(not isinstance(probe, _Delay) for probe in probes)
        if wanted and self not in probes:
            self._experts.probes = (*probes, self)  # innermost: within what the others time
        elif not wanted:
            self.remove()
        return wanted

    def begin(self, expert: int, num_rows: int) -> None:
        if expert == self._expert:
            _spend(self._seconds, self._experts.device)

    def end(self, expert: int) -> None:
        """Nothing is left to do."""

    def remove(self) -> None:
        self._experts.probes = tuple(probe for probe in self._experts.probes if probe is not self)


Test = Callable[[tuple[Any, ...], dict[str, Any]], bool]


def _slow(target: Target, seconds: float, applies: Test) -> RemovableHandle:
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def spend(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if applies(args, kwargs):
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            _spend(seconds, inputs[0].device if inputs else torch.device("cpu"))

    return target.experts.register_forward_pre_hook(spend, with_kwargs=True)


def _spend(seconds: float, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # or the host's delay would hide behind the device's queue
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        sum(range(100))


def _has_tokens(target: Target, expert: int) -> Test:
    """Whether the expert has tokens in a call of the experts: (x, plan), or transformers' (x, ids, weights)."""
    if isinstance(target.block, MoE):
        return lambda args, kwargs: int([*args, *kwargs.values()][1].counts_e[expert]) > 0
    arguments = Arguments(target.experts)
    name = next(name for name in INDEX_NAMES if name in arguments.names)
    return lambda args, kwargs: bool((arguments.value(name, args, kwargs) == expert).any())


def _unhook(handles: Sequence[RemovableHandle]) -> Change:
    def remove() -> None:
        for handle in handles:
            handle.remove()

    return Change(remove)
