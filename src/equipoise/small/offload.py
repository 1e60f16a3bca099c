"""Experts in a file, with as many of them in memory as there is room for, and the likely next ones read ahead.

What is computed does not depend on what is in memory: outputs have the same bits as with all experts resident.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from equipoise.layer import Experts
from equipoise.ops.packed import Full, WeightFormat
from equipoise.ops.ragged import RaggedPlan
from equipoise.small.cache import CacheCounts, ExpertCache, Policy, check_memory
from equipoise.small.expert_file import ExpertFile, made_places, make, marks_of
from equipoise.small.experts import Packed, PackedOf, StoredExperts, experts_of, packing, sizes_of
from equipoise.small.predict import Choices, Transitions
from equipoise.small.quantise import layers_of, put_in
from equipoise.small.read_ahead import ReadAhead


class Offload:
    """What the layers of one model share: file, cache, predictions. memory: bytes of experts, at most.

    Also a context, which closes it. After that the model can't compute any more.
    Raises ValueError for memory that does not hold the largest expert.
    """

    def __init__(self, file: ExpertFile, memory: int, policy: Policy = "lru", prefetch: bool = True) -> None:
        self.file = file
        self.cache = ExpertCache[Packed](file.read, file.size_of, file.keys(), memory, policy, file.recycle)
        self._ahead = ReadAhead(self.cache) if prefetch else None
        num_experts = max(place.sizes.num_experts for place in file.places)
        self._most_experts = memory // max(map(file.size_of, file.keys()))
        self._transitions = Transitions(len(file.places), num_experts)
        self._lock = threading.Lock()
        self._before = threading.local()  # forwards of other threads are no history of this one's

    @property
    def memory(self) -> int:
        """Bytes of experts, at most."""
        return self.cache.budget

    def counts(self) -> CacheCounts:
        """So far. From any thread."""
        return self.cache.counts()

    def close(self) -> None:
        """End the thread and close the file. Twice is once."""
        if self._ahead is not None:
            self._ahead.close()
        self.file.close()

    def __enter__(self) -> Offload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, layer: int, plan: RaggedPlan, num_tokens: int, busy: Sequence[int]) -> list[int]:
        """A forward of a layer's experts begins: learn from it, have the next layer's read, and say in which order."""
        keys = [(layer, expert) for expert in busy]
        if self._ahead is not None:
            following = (layer + 1) % len(self.file.places)
            room = self._most_experts - len(busy)  # what has no room beside these would go before it is used
            number = max(0, min(room, len(busy)))
            wanted = self._learn(layer, following, _choices(plan, num_tokens), number)
            coming = [(following, expert) for expert in wanted]
            self._ahead.ask(coming, {*keys, *coming})
        return [expert for _, expert in self.cache.in_memory_first(keys)]

    def _learn(self, layer: int, following: int, now: Choices, number: int) -> list[int]:
        """At most `number` experts that the following layer will want, after a look at what this one's tokens did."""
        before: tuple[int, Choices] | None = getattr(self._before, "choices", None)
        self._before.choices = layer, now
        with self._lock:
            if before is not None and (before[0] + 1) % len(self.file.places) == layer:
                self._transitions.observe(layer, before[1], now)
            return self._transitions.predict(following, now, number)


class OffloadedLayer:
    """The source of one layer's experts."""

    def __init__(self, layer: int, offload: Offload) -> None:
        self.layer, self.offload = layer, offload

    def order(self, plan: RaggedPlan, num_tokens: int, busy: Sequence[int]) -> Sequence[int]:
        """Those in memory first."""
        return self.offload.begin(self.layer, plan, num_tokens, busy)

    def take(self, expert: int) -> Packed:
        """From memory, or from the file."""
        return self.offload.cache.take((self.layer, expert))

    def all(self) -> None:
        """They are not all in memory."""

    def give_back(self, expert: int) -> None:
        """It may go."""
        self.offload.cache.give_back((self.layer, expert))

    def replaced(self, plain: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Refused: what is in the file is what there is."""
        raise ValueError(
            f"experts: they are read from {self.offload.file.path} and can't be replaced while it is in use; start "
            "again with the other checkpoint, or with all experts in memory"
        )


def offload_experts(
    model: nn.Module, path: Path, memory: int, *, policy: Policy = "lru", prefetch: bool = True
) -> Offload:
    """Move the experts of a model that is in memory to a file, quantised or not, and keep `memory` bytes of them.

    path: of the file, which is written and belongs to this model from then on; remove it after `close`. The model is
    for inference from then on. For one that does not fit into memory to begin with, see `load_small`.
    Raises ValueError for memory that does not hold one expert, DiskError where the file can't be written.

    For example: offload_experts(load("runs/demo").model, Path("experts.safetensors"), memory=8 * 2**20)
    """
    layers = layers_of(model)
    if offload_of(model) is not None:
        raise ValueError("experts: they are in a file already; load the model anew")
    format, *others = {name: _format_in(experts_of(layer)) for name, layer in layers.items()}.values()
    if any(other != format for other in others):
        raise ValueError(f"experts: expected one format in all layers, got {format} and others; quantise all alike")
    sizes = {name: sizes_of(layer) for name, layer in layers.items()}
    least = max(each.expert_bytes(format) for each in sizes.values())
    check_memory(memory, least)
    packed = {name: (sizes[name], _packed_of(experts_of(layer), format)) for name, layer in layers.items()}
    make(path, format, packed, marks_of(format, "a model in memory"))
    offload = Offload(ExpertFile(path, format, made_places(sizes, format)), memory, policy, prefetch)
    put_in(layers, stored(offload, layers, experts_of(next(iter(layers.values()))).dtype))
    model.requires_grad_(False).eval()
    return offload


def stored(offload: Offload, names: Iterable[str], dtype: torch.dtype) -> dict[str, StoredExperts]:
    """The experts modules for the layers of the offload's file. names: of them, in its order. dtype: the model's."""
    file = offload.file
    return {
        name: StoredExperts(place.sizes, file.format, OffloadedLayer(layer, offload), dtype)
        for layer, (name, place) in enumerate(zip(names, file.places, strict=True))
    }


def offload_of(model: nn.Module) -> Offload | None:
    """The offload that a model's experts are in, if they are."""
    for module in model.modules():
        if isinstance(module, StoredExperts) and isinstance(module.source, OffloadedLayer):
            return module.source.offload
    return None


def _format_in(experts: Experts | StoredExperts) -> WeightFormat:
    return experts.format if isinstance(experts, StoredExperts) else Full(experts.dtype)


def _packed_of(experts: Experts | StoredExperts, format: WeightFormat) -> PackedOf:
    """As they are: nothing is rounded twice."""
    return experts.source.take if isinstance(experts, StoredExperts) else packing(format, experts.weights_of)


def _choices(plan: RaggedPlan, num_tokens: int) -> Choices:
    expert_N = torch.repeat_interleave(plan.counts_e)
    return Choices(num_tokens, plan.token_ids_R[: len(expert_N)], expert_N)
