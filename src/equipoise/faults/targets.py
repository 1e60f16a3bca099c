"""What routes in a model, as faults need it: router, its weight, the selection bias, the stacked experts.

It finds equipoise's MoE layers and what chooses its attention experts, and the MoE layers of transformers as the
monitor finds them. It changes nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from equipoise.layer import MoE
from equipoise.layer.choice import Choice, routed_layers
from equipoise.layer.experts import Experts
from equipoise.monitor.adapters.padding import Arguments
from equipoise.monitor.adapters.transformers_moe import INDEX_NAMES, ROUTER_NAMES, WEIGHT_NAMES, experts_layers
from equipoise.types import Team

CORRECTION_BIAS = "e_score_correction_bias"  # what transformers calls the bias of loss-free balancing


@dataclass(frozen=True, eq=False)
class Target:
    """One MoE layer, or one choice of attention experts. block: the module with everything in it. router: None where
    none was found. experts: without any weights where they are the attention's.
    """

    name: str
    num_experts: int
    block: nn.Module
    router: nn.Module | None
    experts: nn.Module

    def router_weight(self) -> tuple[nn.Module, str] | None:
        """(router, path in it) of the weight (E, D) that makes the logits; None where there is none."""
        if self.router is None:
            return None
        paths = ["weight", *(path for path, _ in self.router.named_parameters())]
        return next(((self.router, path) for path in paths if self._is_weight(self.router, path)), None)

    def selection_bias(self) -> tuple[nn.Module, str] | None:
        """(block, path in it) of the bias (E,) that is added for the selection only; None where there is none."""
        if isinstance(self.block, MoE | Choice):
            return None if self.block.balancer is None else (self.block, "balancer.bias_E")
        named = [*self.block.named_buffers(), *self.block.named_parameters()]
        paths = [path for path, x in named if path.endswith(CORRECTION_BIAS) and x.shape == (self.num_experts,)]
        return (self.block, paths[0]) if paths else None

    def stacked_weights(self) -> list[str]:
        """The paths of the experts' weights [E, ., .] in `experts`, [e, ., .] where some of them are here."""
        return [
            path
            for path, x in self.experts.named_parameters()
            if x.ndim == 3 and x.shape[0] == self._here and x.is_floating_point()
        ]

    def places(self, expert: int, team: Team) -> list[int]:
        """Where an expert is among those whose weights are here; copies of it may be elsewhere too."""
        return [place for place, each in enumerate(team.held(self.name, self._here).ids) if each == expert]

    @property
    def _here(self) -> int:
        """Experts whose weights this process holds."""
        return self.experts.num_experts if isinstance(self.experts, Experts) else self.num_experts

    def _is_weight(self, router: nn.Module, path: str) -> bool:
        value = getattr(router, path, None) if "." not in path else tensor_at(router, path)
        return isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == self.num_experts


def tensor_at(module: nn.Module, path: str) -> Tensor:
    """The tensor of that path in the module now: a step or a reload may replace it between two looks."""
    value: object = module
    for name in path.split("."):
        value = getattr(value, name)
    assert isinstance(value, Tensor)
    return value


def targets(model: nn.Module) -> dict[str, Target]:
    """What routes by name, in the model's order: equipoise's layers, then those of transformers."""
    found = {
        name: Target(name, module.num_experts, module, module.router, _experts_of(module))
        for name, module in routed_layers(model).items()
    }
    for name, layer in experts_layers(model).items():
        block = model.get_submodule(name)
        routers = [getattr(block, child, None) for child in ROUTER_NAMES]
        router = next((module for module in routers if isinstance(module, nn.Module)), None)
        experts = next(module for module in block.modules() if takes_selection(module))
        found[name] = Target(name, layer.num_experts, block, router, experts)
    return found


def _experts_of(layer: MoE | Choice) -> nn.Module:
    return layer.experts if isinstance(layer, MoE) else nn.Identity()


def takes_selection(module: nn.Module) -> bool:
    """Whether the module is called with indices and weights of chosen experts, as those of transformers are."""
    names = Arguments(module).names
    return bool({*names} & {*INDEX_NAMES}) and bool({*names} & {*WEIGHT_NAMES})


def routers_digest(model: nn.Module) -> str:
    """sha256 of the bytes of all routers' weights and selection biases: what all processes have the same of."""
    total = hashlib.sha256()
    for target in targets(model).values():
        for place in (target.router_weight(), target.selection_bias()):
            if place is not None:
                total.update(
                    tensor_at(*place).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                )
    return total.hexdigest()


def find(model: nn.Module, owner: str, layer: str) -> Target:
    """The layer of that name. Raises ValueError that names those there are; owner: the fault, for the message."""
    known = targets(model)
    if layer not in known:
        raise ValueError(f"{owner}.layer: expected one of {', '.join(known) or 'none'}, got {layer!r}")
    return known[layer]


def check_expert(owner: str, target: Target, expert: int) -> None:
    """Raise ValueError unless the layer has the expert."""
    if not 0 <= expert < target.num_experts:
        raise ValueError(f"{owner}: expected 0 to {target.num_experts - 1}, got {expert}")
