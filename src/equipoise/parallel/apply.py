"""Expert parallelism, applied to a model from outside: each rank keeps its own experts, tokens travel.

`apply_expert_parallel` slices the experts of every MoE layer and gives it a dispatcher that spans ranks. The model
knows nothing of it. Which rank holds what is a `Placement` per layer, by logical experts; it can change between steps
(`equipoise.parallel.move`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from equipoise.layer import Experts, MoE, moe_layers
from equipoise.layer.dispatch import Dispatcher
from equipoise.parallel.dispatchers import AllGatherDispatcher, AllToAllDispatcher, HierarchicalDispatcher, Link
from equipoise.parallel.exchange import Meter
from equipoise.parallel.mesh import Ranks
from equipoise.parallel.payload import payloads
from equipoise.parallel.replicas import slot_table
from equipoise.types import Placement


@dataclass(frozen=True, eq=False)
class ExpertParallel:
    """A model whose experts are spread over ranks.

    layers: its MoE layers by name. placements: of each. meters: what each layer's exchanges cost on this rank.
    """

    model: nn.Module
    ranks: Ranks
    layers: Mapping[str, MoE]
    placements: Mapping[str, Placement]
    meters: Mapping[str, Meter]

    def slots(self, layer: str) -> tuple[int, ...]:
        """The logical experts that this rank holds of a layer, in the order of its parameters' first axis."""
        return self.placements[layer].slots[self.ranks.expert_rank]

    @property
    def expert_parameters(self) -> dict[str, tuple[str, nn.Parameter]]:
        """By full name, (the layer's name, the parameter): what differs from rank to rank."""
        return {
            f"{name}.experts.{part}": (name, parameter)
            for name, layer in self.layers.items()
            for part, parameter in layer.experts.named_parameters()
        }

    def placed(self, placements: Mapping[str, Placement]) -> ExpertParallel:
        """The same with other placements; the weights must have moved before."""
        for name, layer in self.layers.items():
            link = _link(self.ranks, placements[name], self.meters[name])
            layer.dispatcher = _dispatcher(self.ranks, link)
        return replace(self, placements=dict(placements))


def apply_expert_parallel(
    model: nn.Module, ranks: Ranks, placements: Mapping[str, Placement] | None = None
) -> ExpertParallel:
    """Keep this rank's experts of every MoE layer, and let tokens travel to the others'.

    model: the same on all ranks, on any device, `meta` too (then load its weights with
    `equipoise.parallel.checkpoint`). placements: by layer name; None spreads consecutive experts evenly.
    Raises ValueError for a model without MoE layers, and for placements of other layers, experts or ranks.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"model: expected at least one MoE layer to spread, found none in {type(model).__name__}")
    for name, layer in layers.items():
        if not isinstance(experts := layer.get_submodule("experts"), Experts):
            raise ValueError(
                f"{name}: expected experts that are in memory as they were trained, got {type(experts).__name__}; "
                "spread the model before it is quantised or offloaded"
            )
        if layer.zero is not None:
            raise ValueError(
                f"{name}: expected no zero_experts in a layer that is spread over ranks, got {layer.zero.config}; "
                "train it on one rank"
            )
    world = ranks.config.expert
    if placements is None:
        placements = {name: Placement.even(layer.num_experts, world) for name, layer in layers.items()}
    check_placements(placements, {name: layer.num_experts for name, layer in layers.items()}, world)
    meters = {name: Meter(name) for name in layers}
    for name, layer in layers.items():
        layer.experts = slice_experts(layer.experts, placements[name].slots[ranks.expert_rank])
    return ExpertParallel(model, ranks, layers, placements, meters).placed(placements)


def check_placements(placements: Mapping[str, Placement], num_experts: Mapping[str, int], world: int) -> None:
    """Raise ValueError for placements that are not of these layers, experts and ranks."""
    if set(placements) != set(num_experts):
        missing, foreign = sorted(set(num_experts) - set(placements)), sorted(set(placements) - set(num_experts))
        raise ValueError(f"placements: expected one for each MoE layer, missing {missing}, not in the model {foreign}")
    for name, placement in placements.items():
        if (placement.num_experts, placement.num_ranks) != (num_experts[name], world):
            raise ValueError(
                f"placements: {name} has {num_experts[name]} experts on {world} ranks, its placement is of "
                f"{placement.num_experts} on {placement.num_ranks}; plan it anew for this model and number of ranks"
            )


def slice_experts(experts: Experts, slots: tuple[int, ...]) -> Experts:
    """The same module with the experts of these slots alone; the others' memory is free when the old one is."""
    index = torch.tensor(slots, dtype=torch.int64, device=experts.down_proj.device)
    with torch.device("meta"):
        _, D, F = experts.down_proj.shape
        local = Experts(len(slots), D, F, experts.activation, bias=experts.biases is not None)
    local.backend = experts.backend
    for name, parameter in experts.named_parameters():
        sliced = nn.Parameter(parameter.detach()[index].clone(), requires_grad=parameter.requires_grad)
        setattr(local, name, sliced)
    return local.train(experts.training)


def _link(ranks: Ranks, placement: Placement, meter: Meter) -> Link:
    device = torch.device(ranks.mesh.device_type)
    own = ranks.expert_rank
    return Link(own, len(placement.slots[own]), slot_table(placement, device), meter, payloads(ranks.config.payload))


def _dispatcher(ranks: Ranks, link: Link) -> Dispatcher:
    if ranks.config.dispatcher == "all_gather":
        return AllGatherDispatcher(link, ranks.expert)
    if ranks.config.nodes > 1:
        return HierarchicalDispatcher(link, ranks.across, ranks.within)
    return AllToAllDispatcher(link, ranks.expert, ranks.config.chunks)
