"""What looking after a served model needs: held-out text to judge by, a record of health, stand-ins for experts.

Taken from the run folder where it has them, made from the model as it was loaded where not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as fn
from torch import Tensor

from equipoise.layer import FeedForward
from equipoise.models.decoder import Decoder
from equipoise.models.run_files import Loaded
from equipoise.monitor.baseline import Baseline
from equipoise.recovery.actions import Patient
from equipoise.recovery.canary import Canary
from equipoise.recovery.dense_path import build_dense_paths, dense_from_state
from equipoise.recovery.known_good import KnownGood, KnownGoodError, RefusedError
from equipoise.recovery.remember import remember


@dataclass(frozen=True, eq=False)
class Equipment:
    """canary: None without held-out text. known_good: None where nothing is known to be good. dense: stand-ins by
    layer. baselines: of the layers in health. notes: what is missing, in sentences."""

    canary: Canary | None
    known_good: KnownGood | None
    dense: dict[str, FeedForward]
    baselines: Mapping[str, Baseline]
    notes: tuple[str, ...]


def equip(loaded: Loaded, folder: Path) -> Equipment:
    """For a model that nothing else uses yet. folder: of the server, for records where the run has none."""
    model, layers, held_out = loaded.model, loaded.model.moe_layers, loaded.held_out_BS
    canary = None if held_out is None else Canary(model, lambda: held_out_loss(model, held_out))
    notes: list[str] = []
    registry: KnownGood | None = KnownGood(loaded.folder)
    assert registry is not None
    dense = _kept(loaded, registry, notes)
    if canary is None:
        notes.append("there is no held-out text: repairs are judged by alerts, and nothing new is known to be good")
    elif not dense:
        counts = {name: stats.counts_E for name, stats in canary.measure(0).stats.items()}
        dense = build_dense_paths(layers, counts, canary.run)
    if not registry.records:
        registry = None if canary is None else _first_record(loaded, folder, canary, dense, notes)
    baselines = registry.latest().baselines if registry is not None and registry.records else {}
    return Equipment(canary, registry, dense, baselines, tuple(notes))


def _kept(loaded: Loaded, registry: KnownGood, notes: list[str]) -> dict[str, FeedForward]:
    """The stand-ins of the newest record."""
    if not registry.records:
        return {}
    try:
        return dense_from_state(loaded.model.moe_layers, registry.load(registry.latest()))
    except KnownGoodError as error:
        notes.append(str(error))
        return {}


def _first_record(
    loaded: Loaded, folder: Path, canary: Canary, dense: dict[str, FeedForward], notes: list[str]
) -> KnownGood | None:
    """A registry of the server's own, with the model as it is now, if that is healthy."""
    registry = KnownGood(folder)
    patient = Patient(loaded.model, loaded.model.routed_layers, known_good=registry, dense=dense)
    try:
        remember(patient, canary, dense, 0, distil=False)
    except RefusedError as error:
        notes.append(f"the model as it was loaded is not kept as known-good: {error}")
    return registry


@torch.inference_mode()
def held_out_loss(model: Decoder, tokens_BS: Tensor) -> float:
    """Mean nats per token. tokens_BS: the last of each row is a target only."""
    device = next(model.parameters()).device
    nats, count = 0.0, 0
    for rows_BS in torch.split(tokens_BS.to(device), 8):
        logits_BSV = model(rows_BS[:, :-1])
        targets_T = rows_BS[:, 1:].reshape(-1)
        nats += float(fn.cross_entropy(logits_BSV.float().flatten(0, 1), targets_T, reduction="sum"))
        count += len(targets_T)
    return nats / count
