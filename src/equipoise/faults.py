"""Break a router on purpose, so that monitors and repairs can be tried: in tests, in demonstrations, by users.

Each fault is a frozen config; `inject` applies it to a live model and returns what undoes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from equipoise.layer import MoE


@dataclass(frozen=True)
class Collapse:
    """One layer's router comes to prefer one expert for every token.

    Written into the router's weight, as a bad update would: the row of `expert` moves along the direction whose
    product with the layer's inputs is nearest to 1 for all tokens, so that its logit rises by about `intensity`.
    layer: the layer's name in the model. expert: its index. intensity: in logits; 10 saturates a softmax.
    """

    layer: str
    expert: int
    intensity: float = 10.0


@dataclass(frozen=True, eq=False)
class Injection:
    """A fault that is in place. remove() takes out exactly what was put in, also after further training."""

    fault: Collapse
    change_D: Tensor
    router: nn.Module

    @torch.no_grad()
    def remove(self) -> None:
        """Take the fault out of the weight."""
        weight_ED = self.router.weight
        assert isinstance(weight_ED, Tensor)
        weight_ED[self.fault.expert] -= self.change_D


def inject(model: nn.Module, fault: Collapse, run: Callable[[], object]) -> Injection:
    """Apply the fault.

    run: a call that takes the model through its forward on typical data, to see the layer's inputs; its result is not
        used, and nothing is trained by it. A recorder that is attached counts it, unless it is `paused`.
    Raises ValueError for a layer or an expert that the model does not have.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    layer = layers.get(fault.layer)
    if layer is None:
        raise ValueError(f"Collapse.layer: expected one of {', '.join(layers) or 'none'}, got {fault.layer!r}")
    if not 0 <= fault.expert < layer.num_experts:
        raise ValueError(f"Collapse.expert: expected 0 to {layer.num_experts - 1}, got {fault.expert}")
    weight_ED = layer.router.weight
    if weight_ED is None:
        raise ValueError(f"Collapse.layer: the router of {fault.layer} has no weight to break; choose another layer")
    change_D = fault.intensity * constant_direction(_router_inputs(model, layer, run))
    with torch.no_grad():
        change_D = change_D.to(weight_ED.dtype)
        weight_ED[fault.expert] += change_D
    return Injection(fault, change_D, layer.router)


def constant_direction(x_TD: Tensor, ridge: float = 1e-3) -> Tensor:
    """w (D,) fp32 with x w as near to 1 as it gets for every row: ridge regression, ridge relative to mean x^2."""
    x_TD = x_TD.double()
    T, D = x_TD.shape
    gram_DD = x_TD.t() @ x_TD / T
    ridge_DD = ridge * gram_DD.diagonal().mean() * torch.eye(D, dtype=x_TD.dtype, device=x_TD.device)
    direction_D: Tensor = torch.linalg.solve(gram_DD + ridge_DD, x_TD.mean(0))
    return direction_D.float()


def _router_inputs(model: nn.Module, layer: MoE, run: Callable[[], object]) -> Tensor:
    seen: list[Tensor] = []
    handle = layer.router.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    try:
        with torch.no_grad(), _in_eval(model):
            run()
    finally:
        handle.remove()
    if not seen:
        raise ValueError("inject: run() did not reach the layer; let it call the model on a batch of tokens")
    return torch.cat(seen)


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
