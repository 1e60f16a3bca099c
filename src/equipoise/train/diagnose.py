"""Where a loss stopped being a number: the first parameter or module with a value that is not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class DivergenceError(RuntimeError):
    """The loss or the gradient is no longer finite. The message names step, layer, checkpoint and remedy."""


@torch.no_grad()
def first_non_finite(
    model: nn.Module, run: Callable[[], object], first: Callable[[str | None], str | None] = lambda found: found
) -> str:
    """The first parameter, in the model's order, or the first module, in the order in which they finish, that has a
    value which is not finite; with its name and how many. run: a forward of the model. first: of what several processes
    have found, the first.
    """
    if parameter := first(non_finite_parameter(model)):
        return parameter
    found: list[str] = []

    def check(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(f"output of {name} ({_count(output)})")

        return hook

    handles = [module.register_forward_hook(check(name)) for name, module in model.named_modules() if name]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return first(found[0] if found else None) or "the gradient; the forward pass is finite"


@torch.no_grad()
def non_finite_parameter(model: nn.Module) -> str | None:
    """The first parameter, in the model's order, with a value which is not finite; None when all are finite."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"parameter {name} ({_count(parameter)})"
    return None


def _count(values: Tensor) -> str:
    return f"{int((~torch.isfinite(values)).sum()):,} of {values.numel():,} values"
