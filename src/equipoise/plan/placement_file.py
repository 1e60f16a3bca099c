"""placement.json: which rank holds which experts, by the layer's name. Written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from equipoise.types import Placement

FORMAT = "equipoise placement"
VERSION = 1


@dataclass(frozen=True)
class PlacementFile:
    """What a file says. num_nodes: ranks 0..R/nodes-1 are on the first node, and so on; all layers have the same R."""

    num_nodes: int
    layers: Mapping[str, Placement]


def write_placements(path: str | Path, layers: Mapping[str, Placement], num_nodes: int = 1) -> None:
    """Write the layers' placements to `path`, under another name first, so that a reader never sees half of it.

    Raises ValueError for no layers, for layers on different numbers of ranks, and for ranks that nodes do not divide.
    """
    path = Path(path)
    _check(str(path), layers, num_nodes)
    found = {
        "format": FORMAT,
        "version": VERSION,
        "num_ranks": next(iter(layers.values())).num_ranks,
        "num_nodes": num_nodes,
        "layers": {name: {"num_experts": each.num_experts, "slots": each.slots} for name, each in layers.items()},
    }
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(json.dumps(found) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_placements(path: str | Path) -> dict[str, Placement]:
    """The placements that `write_placements` wrote, by the layer's name in the model, in its order.

    Raises ValueError for a file that is missing, damaged, foreign or of a later version, with what is wrong in it.
    """
    return dict(read_placement_file(path).layers)


def read_placement_file(path: str | Path) -> PlacementFile:
    """The same, with the number of nodes."""
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file; `equipoise place --out {path}` writes one") from error
    except ValueError as error:
        raise ValueError(
            f"{path}: expected JSON, as `equipoise place --out` writes it, but it cannot be read: {error}; plan again"
        ) from error
    if not isinstance(found, Mapping) or found.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected a file with format {FORMAT!r}, got {_kind(found)}; `equipoise place --out` writes one"
        )
    if found.get("version") != VERSION:
        raise ValueError(
            f"{path}: expected version {VERSION}, got {found.get('version')!r}; read it with the equipoise that wrote "
            "it, or plan again"
        )
    layers, num_nodes, num_ranks = found.get("layers"), found.get("num_nodes"), found.get("num_ranks")
    if not isinstance(layers, Mapping) or not _is_count(num_nodes) or not _is_count(num_ranks):
        raise ValueError(
            f"{path}: expected layers, num_ranks and num_nodes, got {', '.join(found)} with num_ranks {num_ranks!r} "
            f"and num_nodes {num_nodes!r}; the file is damaged, plan again"
        )
    placements = {name: _placement(f"{path}: layer {name}", each) for name, each in layers.items()}
    _check(str(path), placements, num_nodes, num_ranks)
    return PlacementFile(num_nodes, placements)


def _placement(name: str, found: Any) -> Placement:
    slots = found.get("slots") if isinstance(found, Mapping) else None
    whole = isinstance(slots, list) and all(
        isinstance(rank, list) and all(_is_number(expert) for expert in rank) for rank in slots
    )
    if not isinstance(slots, list) or not whole:
        raise ValueError(f"{name}: expected a list of expert numbers for each rank, got {slots!r:.80}; plan again")
    try:
        placement = Placement(tuple(tuple(rank) for rank in slots))
    except ValueError as error:
        raise ValueError(f"{name}: {error}; the file is damaged, plan again") from error
    if placement.num_experts != found.get("num_experts"):
        raise ValueError(
            f"{name}: expected slots for num_experts = {found.get('num_experts')!r}, got {placement.num_experts}; "
            "the file is damaged, plan again"
        )
    return placement


def _check(name: str, layers: Mapping[str, Placement], num_nodes: int, num_ranks: int | None = None) -> None:
    if not layers:
        raise ValueError(f"{name}: expected at least one layer, got none; plan for a model with MoE layers")
    expected = num_ranks or next(iter(layers.values())).num_ranks
    for layer, placement in layers.items():
        if placement.num_ranks != expected:
            raise ValueError(
                f"{name}: layer {layer}: expected slots for {expected} ranks, got {placement.num_ranks}; "
                "plan all layers together"
            )
    if num_nodes < 1 or expected % num_nodes:
        raise ValueError(f"{name}: expected a number of nodes that divides {expected} ranks, got {num_nodes}")


def _kind(found: Any) -> str:
    return f"format {found.get('format')!r}" if isinstance(found, Mapping) else f"a {type(found).__name__}"


def _is_number(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> TypeGuard[int]:
    return _is_number(value) and value >= 1
