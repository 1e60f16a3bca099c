"""A probe: what a trained model drops, and what that costs, under capacities that it was not trained with.

One model, one text; factor, who is kept, and the tokens that share a capacity differ. Numbers are named
"tokens.policy.factor.number", such as "1024.position.0.75.drop_share".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from equipoise.bench.claims.probes import Numbers
from equipoise.layer import Capacity
from equipoise.layer.mode import NORMAL, Mode
from equipoise.train.evaluate import evaluate
from equipoise.train.loop import Trainer
from equipoise.types import Routed

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
POLICIES: dict[str, Callable[[float], Capacity]] = {
    "position": lambda factor: Capacity(factor, at_inference=True),
    "probability": lambda factor: Capacity(factor, policy="probability", at_inference=True),
    "random": lambda factor: Capacity(factor, policy="random", at_inference=True),
    "next_choice": lambda factor: Capacity(factor, overflow="next_choice", at_inference=True),
    "shared": lambda factor: Capacity(factor, overflow="shared", at_inference=True),
}
FORWARDS = (16, 64, 256, 1024)  # tokens that share a capacity; with "position" alone but for the last
TOKENS = 8192  # of validation text


@dataclass
class _Drops:
    """Assignments seen, and how many were dropped, moved to another expert, or left to the shared expert."""

    assignments: int = 0
    dropped: int = 0
    moved: int = 0
    spilled: int = 0

    def add(self, module: nn.Module, args: object, routed: Routed) -> None:
        """A hook of a layer's tap."""
        drops = routed.plan.drops
        self.assignments += len(routed.decision.expert_ids_N)
        self.dropped += sum(int(drops[reason]) for reason in ("capacity", "hard_cap") if reason in drops)
        self.moved += int(drops["moved"]) if "moved" in drops else 0
        self.spilled += int(drops["spilled"]) if "spilled" in drops else 0


def limits(trainer: Trainer) -> Numbers:
    """The whole grid; "shared" where there are shared experts."""
    has_shared = all(layer.shared is not None for layer in trainer.model.moe_layers.values())
    numbers: Numbers = {}
    for tokens in FORWARDS:
        free, _ = _measure(trainer, tokens, None)
        policies = [name for name in POLICIES if has_shared or name != "shared"]
        for policy in policies if tokens == FORWARDS[-1] else ("position",):
            for factor in FACTORS:
                loss, drops = _measure(trainer, tokens, POLICIES[policy](factor))
                found = {
                    "cost": loss - free,
                    "drop_share": drops.dropped / drops.assignments,
                    "elsewhere_share": (drops.moved + drops.spilled) / drops.assignments,
                }
                numbers |= {f"{part_of_grid(tokens, policy, factor)}.{name}": value for name, value in found.items()}
    return numbers


def part_of_grid(tokens: int, policy: str, factor: float) -> str:
    """The name of a point of the grid."""
    return f"{tokens}.{policy}.{factor:g}"


def _measure(trainer: Trainer, tokens: int, capacity: Capacity | None) -> tuple[float, _Drops]:
    """(validation loss, drops) in forwards of so many tokens. The draws of the random policy are the same each time."""
    config = trainer.config
    length = min(tokens, config.data.seq_len)
    torch.manual_seed(config.seed)
    with trainer.watch.recorder.paused(), _limited(trainer, capacity) as drops:
        found = evaluate(
            trainer.model, trainer.data.val, tokens // length, length, max(1, TOKENS // tokens), config.bf16
        )
    return found.loss, drops


@contextmanager
def _limited(trainer: Trainer, capacity: Capacity | None) -> Iterator[_Drops]:
    """Every layer under the capacity, what it drops counted; as before after."""
    drops = _Drops()
    layers = trainer.model.moe_layers.values()
    hooks = [layer.tap.register_forward_hook(drops.add) for layer in layers]
    try:
        for layer in layers:
            layer.set_mode(Mode(capacity=capacity))
        yield drops
    finally:
        for layer in layers:
            layer.set_mode(NORMAL)
        for hook in hooks:
            hook.remove()
