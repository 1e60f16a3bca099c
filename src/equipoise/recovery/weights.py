"""Repairs that change weights: a router, an expert, everything, or how fast they learn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from equipoise.disk.checkpoint import load_checkpoint
from equipoise.layer import MoE
from equipoise.layer.mode import Mode
from equipoise.recovery.actions import Change, Patient
from equipoise.recovery.held import finite_experts, row_of
from equipoise.recovery.known_good import KnownGood, Record
from equipoise.recovery.router_state import of_layer
from equipoise.recovery.swap import swap
from equipoise.types import Finding

T = TypeVar("T")
EXPERT_NOISE, ROUTER_NOISE = 0.02, 0.1  # relative to the standard deviation of what is copied
RATE_CUT = 0.5


def _records(patient: Patient, kind: str) -> tuple[KnownGood, tuple[Record, ...]]:
    """The registry, and what is in it, the same for all processes."""
    known_good = patient.known_good
    if known_good is None:
        raise ValueError(f"{kind}: there is no known-good record to go back to yet")
    records, problem = _together(patient, lambda: known_good.records, _ids)
    if not records:
        raise ValueError(problem or f"{kind}: there is no known-good record to go back to yet")
    return known_good, records


def _ids(records: Sequence[Record]) -> str:
    return " ".join(record.id for record in records)


def _together(
    patient: Patient, read: Callable[[], T], same: Callable[[T], str] = lambda made: ""
) -> tuple[T, str] | tuple[None, str]:
    """Read something in all processes or in none: then all go on with it, or all without."""
    return patient.team.together(read, lambda made: None, same)


def _modes_of(record: Record, patient: Patient, names: Collection[str]) -> Callable[[], None]:
    """Put the layers into the modes that they had when the record was made; returns what puts the present ones back."""
    before = {name: (patient.layers[name].mode, patient.layers[name].dense) for name in names}

    def undo() -> None:
        for name, (mode, dense) in before.items():
            patient.layers[name].set_mode(mode, dense)

    try:
        for name in names:
            patient.set_mode(name, Mode.from_json(record.modes.get(name, {})))
    except ValueError:
        undo()
        raise
    return undo


def apply_router_rollback(patient: Patient, finding: Finding) -> Change:
    """The layer's router and balancer go back to the newest whole known-good record, exactly; experts stay."""
    record, state, problems = _newest_router(patient, finding.layer)
    undo_modes = _modes_of(record, patient, [name for name in patient.layers if name == finding.layer])
    try:
        done = swap(patient.model, state)
    except BaseException:
        undo_modes()
        raise

    def undo() -> None:
        done.undo()
        undo_modes()

    note = f"router of step {record.step}, {record.id[:12]}" + _passed_over(problems)
    return Change(undo, {"record_step": float(record.step)}, note)


def _newest_router(patient: Patient, layer: str) -> tuple[Record, dict[str, Tensor], list[str]]:
    """(the newest record that is whole, its tensors of the layer, what is wrong with newer ones)."""
    problems = []
    known_good, records = _records(patient, "router_rollback")
    for record in reversed(records):
        tensors, problem = _together(patient, partial(known_good.load, record))
        if tensors is None:  # damaged since: an older one will do
            problems.append(problem)
            continue
        state = of_layer(tensors, layer)
        if not state:
            raise ValueError(f"router_rollback: the record of step {record.step} has no router of {layer}")
        return record, state, problems
    raise ValueError(f"router_rollback: no known-good record can be loaded. {'; '.join(problems)}")


def _passed_over(problems: Sequence[str]) -> str:
    """The end of a note: the records that could not be used."""
    return f"; passed over: {'; '.join(problems)}" if problems else ""


def apply_full_rollback(patient: Patient, finding: Finding) -> Change:
    """Every weight, and every mode, goes back to the newest known-good checkpoint that is whole."""
    _, records = _records(patient, "full_rollback")
    if patient.reload is None:
        raise ValueError("full_rollback: nothing can load a checkpoint here; pass reload=")
    problems = []
    for record in reversed(records):
        if record.checkpoint is None:
            continue
        try:
            undo_weights = patient.reload(record.checkpoint)
        except ValueError as error:  # damaged or gone: an older one will do
            problems.append(str(error))
            continue
        try:
            undo_modes = _modes_of(record, patient, patient.layers)
        except BaseException:
            undo_weights()
            raise

        def undo(weights: Callable[[], None] = undo_weights, modes: Callable[[], None] = undo_modes) -> None:
            weights()
            modes()

        note = f"checkpoint {record.checkpoint}" + _passed_over(problems)
        return Change(undo, {"record_step": float(record.step)}, note)
    raise ValueError(f"full_rollback: no known-good checkpoint can be loaded. {'; '.join(problems)}".rstrip())


def reload_weights(model: nn.Module, checkpoints: Path) -> Callable[[str], Callable[[], None]]:
    """`Patient.reload` for a model that is served: the weights of a checkpoint, verified before any is used."""

    def reload(name: str) -> Callable[[], None]:
        tensors = load_checkpoint(checkpoints / name).tensors
        if "model" not in tensors:
            raise ValueError(f"{checkpoints / name}: expected a group of tensors called model, got {sorted(tensors)}")
        return swap(model, tensors["model"], whole=True).undo

    return reload


@torch.no_grad()
def apply_reseed(patient: Patient, finding: Finding) -> Change:
    """Dead experts, or the one that is not finite, become noisy copies of the busiest one; so do their router rows.

    Their moments in the optimizer start anew. For training: a copy has to become different again.
    """
    if patient.training is None:
        raise ValueError("reseed: a copy of an expert only helps where it is trained further")
    layer = patient.layer(finding.layer)
    if not isinstance(layer, MoE):
        raise ValueError(
            f"reseed: expected an MoE layer, {finding.layer} chooses attention experts, whose projections belong to "
            "the attention; go back to a good router"
        )
    hot, dead = _hot_and_dead(patient, layer, finding)
    generator = torch.Generator().manual_seed(patient.seed)
    names = {id(tensor): name for name, tensor in patient.model.named_parameters()}
    new: dict[str, Tensor] = {}
    moments: list[tuple[Tensor, list[int]]] = []
    team, held = patient.team, patient.team.held(finding.layer, layer.experts.num_experts)
    for parameter in layer.experts.parameters():
        source = row_of(team, finding.layer, parameter, hot)
        copies = _noisy(source, EXPERT_NOISE, dead, generator)
        here = [place for place, expert in enumerate(held.ids) if expert in copies]
        new[names[id(parameter)]] = _with_rows(parameter, {place: copies[held.ids[place]] for place in here})
        moments.append((parameter, here))
    if (router := layer.router.weight) is not None:
        new[names[id(router)]] = _with_rows(router, _noisy(router.detach()[hot], ROUTER_NOISE, dead, generator))
        moments.append((router, dead))
    done = swap(patient.model, new)
    optimizer = patient.training.optimizer
    forgotten = [each for trained, rows in moments for each in _forget_moments(optimizer, trained, rows)]

    def undo() -> None:
        done.undo()
        with torch.no_grad():
            for tensor, rows, values in forgotten:
                tensor[rows] = values

    return Change(undo, {"num_experts": float(len(dead)), "source": float(hot)}, f"experts {dead} from {hot}")


def _noisy(source: Tensor, noise: float, dead: list[int], generator: torch.Generator) -> dict[int, Tensor]:
    """A copy of the row for each dead expert, with noise relative to its own standard deviation."""
    scale = noise * source.float().std().to(source)
    return {expert: source + scale * torch.randn(source.shape, generator=generator).to(source) for expert in dead}


def _with_rows(parameter: Tensor, rows: Mapping[int, Tensor]) -> Tensor:
    values = parameter.detach().clone()
    for place, row in rows.items():
        values[place] = row
    return values


def _hot_and_dead(patient: Patient, layer: MoE, finding: Finding) -> tuple[int, list[int]]:
    finite_E = finite_experts(layer, finding.layer, patient.team)
    num_experts = len(finite_E)  # those that have weights
    dead = (~finite_E).nonzero()[:, 0].tolist()
    stats = patient.health.stats.get(finding.layer) if patient.health else None
    if stats is not None:
        dead = sorted({*dead, *(expert for expert in stats.dead_experts if expert < num_experts)})
    if not dead:
        raise ValueError(f"reseed: {finding.layer} has no dead expert on held-out text, and none that is not finite")
    if len(dead) == num_experts:
        raise ValueError(f"reseed: no expert of {finding.layer} is left to copy; go back to a checkpoint")
    counts = stats.counts_E.tolist() if stats is not None else [0] * num_experts
    return max(set(range(num_experts)) - set(dead), key=lambda expert: counts[expert]), dead


def _forget_moments(
    optimizer: torch.optim.Optimizer, parameter: Tensor, rows: list[int]
) -> list[tuple[Tensor, list[int], Tensor]]:
    """Moments of these rows start anew. Returns (moments, rows, what they were)."""
    state = optimizer.state.get(parameter, {}).values()
    moments = [each for each in state if isinstance(each, Tensor) and each.shape == parameter.shape]
    before = [(each, rows, each[rows].clone()) for each in moments]
    for each in moments:
        each[rows] = 0.0
    return before


def apply_lr_cut(patient: Patient, finding: Finding) -> Change:
    """Every learning rate is halved from now on."""
    training = patient.training
    if training is None:
        raise ValueError("lr_cut: nothing is being trained")
    before = training.rate_scale()
    training.set_rate_scale(before * RATE_CUT)
    return Change(lambda: training.set_rate_scale(before), {"rate_scale": before * RATE_CUT})
