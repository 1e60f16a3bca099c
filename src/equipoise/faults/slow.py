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

from equipoise.faults.injection import Change, Run, check_positive
from equipoise.faults.targets import Target, check_expert, find, targets
from equipoise.layer import MoE
from equipoise.monitor.adapters.padding import Arguments
from equipoise.monitor.adapters.transformers_moe import INDEX_NAMES

MOST_SECONDS = 60.0  # per forward: a slip of the finger must not stop a run for a day


@dataclass(frozen=True)
class SlowExpert:
    """A layer's expert computation takes `seconds` longer whenever that expert has tokens in the batch.

    Imitates an expert on a device that is throttled or shared. On a GPU each such forward waits for the device. Taken
    out: the hook is removed.
    """

    layer: str
    expert: int
    seconds: float

    def __post_init__(self) -> None:
        check_positive("SlowExpert.seconds", self.seconds, MOST_SECONDS)

    def put_in(self, model: nn.Module, run: Run | None) -> Change:
        """Hook the experts of the layer."""
        target = find(model, "SlowExpert", self.layer)
        check_expert("SlowExpert.expert", target, self.expert)
        has_tokens = _has_tokens(target, self.expert)
        return _unhook([_slow(target, self.seconds, has_tokens)])


@dataclass(frozen=True)
class SlowRank:
    """The expert computation of every MoE layer takes `seconds` longer, in each forward.

    Imitates a straggler: a rank whose device is slower than the others. Taken out: the hooks are removed.
    """

    seconds: float

    def __post_init__(self) -> None:
        check_positive("SlowRank.seconds", self.seconds, MOST_SECONDS)

    def put_in(self, model: nn.Module, run: Run | None) -> Change:
        """Hook the experts of all layers."""
        found = targets(model).values()
        if not found:
            raise ValueError(f"SlowRank: expected a model with MoE layers, {type(model).__name__} has none")
        return _unhook([_slow(target, self.seconds, lambda args, kwargs: True) for target in found])


Test = Callable[[tuple[Any, ...], dict[str, Any]], bool]


def _slow(target: Target, seconds: float, applies: Test) -> RemovableHandle:
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def spend(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if applies(args, kwargs):
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if inputs and inputs[0].is_cuda:
                torch.cuda.synchronize(inputs[0].device)  # or the host's delay would hide behind the device's queue
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                sum(range(100))

    return target.experts.register_forward_pre_hook(spend, with_kwargs=True)


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
