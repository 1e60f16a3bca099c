"""Diagnose routing that something else recorded: vLLM's and SGLang's files, or plain arrays. No model, no pickle.

`diagnose` reads counts or expert ids, and gives the monitor's own statistics and findings. Logits and probabilities are
in no such file: what follows from them is NaN. Which file says what is in `recorded_files.py`; this file counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from equipoise.monitor.detectors import CollapseDetector, layers_without_opinion
from equipoise.monitor.recorded_files import Counts, Ids, Layout, read
from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.types import Detector, Finding, RoutingStats


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What a recorded file says.

    stats: one record per layer, named layers.0, layers.1, ... by the numbers in the file; step is 0.
    findings: of the detectors. without_opinion: layers with too few assignments to be judged: no finding says nothing.
    num_ignored: slots left out because of `ignore_ids`, by id. num_repeated: tokens (per layer) left out because they
    name an expert twice. skipped_layers: as asked for.
    """

    stats: tuple[RoutingStats, ...]
    findings: tuple[Finding, ...]
    without_opinion: frozenset[str]
    num_ignored: Mapping[int, int] = field(default_factory=dict)
    num_repeated: int = 0
    skipped_layers: tuple[int, ...] = ()


def diagnose(
    path: str | Path,
    *,
    num_experts: int | None = None,
    top_k: int | None = None,
    num_layers: int | None = None,
    ignore_ids: Sequence[int] = (),
    drop_repeated: bool = False,
    skip_layers: Sequence[int] = (),
    detectors: Sequence[Detector] = (CollapseDetector(),),
) -> Diagnosis:
    """Statistics and findings of a file of recorded routing; its ending says what it is, see `recorded_files.read`.

    num_experts: E, routed experts of each layer. Required for expert ids: an expert that nobody chose is in no file of
    ids, and dead experts are what to look for. Counts have it.
    top_k: K. Required for counts without numbers of tokens, and with num_layers for ids without a shape.
    ignore_ids: ids that mark slots without a routed expert, such as -1 or 255 for padding and for fused shared experts
    (`sgl-project/sglang#9499`). Left out and counted. Any other id outside [0, E) is refused.
    drop_repeated: leave out (and count) tokens that name an expert twice, which no top-k router does: rows of zeros
    stand for tokens that were not routed, such as the last one generated. Otherwise they are refused. With top_k = 1
    nothing tells them from tokens of expert 0.
    skip_layers: numbers of layers to leave out, for dense layers that the file has rows for.
    A server that returns the routing of a cached prompt with every answer counts its tokens in every answer.
    Raises ValueError for a file that is not what its ending says, or that does not fit the arguments.
    """
    for name, number in (("num_experts", num_experts), ("top_k", top_k), ("num_layers", num_layers)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    recorded = read(Path(path), Layout(num_layers, top_k))
    found = (
        _layers_of_counts(recorded, num_experts, top_k, skip_layers)
        if isinstance(recorded, Counts)
        else _layers_of_ids(recorded, num_experts, ignore_ids, skip_layers)
    )
    unknown = sorted(set(skip_layers) - found.keys())
    if unknown:
        raise ValueError(f"skip_layers: the file has layers {_list(sorted(found))}, but not {_list(unknown)}")
    layers = [layer for _, layer in sorted(found.items()) if layer is not None]
    _refuse_what_no_router_does(layers, drop_repeated)
    stats = tuple(routing_stats(f"layers.{layer.number}", 0, _sums(layer)) for layer in layers)
    return Diagnosis(
        stats=stats,
        findings=tuple(finding for detector in detectors for finding in detector(stats)),
        without_opinion=frozenset(layers_without_opinion(stats)),
        num_ignored=dict(sum((layer.ignored for layer in layers), Counter())),
        num_repeated=sum(layer.num_repeated for layer in layers),
        skipped_layers=tuple(skip_layers),
    )


# ----------------------------------------------------------------------------------------------------- counting


@dataclass(frozen=True, eq=False)
class _Layer:
    """num_tokens, counts_E: without what was left out. ignored: slots, by id. num_repeated: tokens."""

    number: int
    num_tokens: int
    counts_E: np.ndarray
    ignored: Counter[int] = field(default_factory=Counter)
    num_repeated: int = 0


def _layers_of_ids(
    recorded: Ids, num_experts: int | None, ignore_ids: Sequence[int], skip_layers: Sequence[int]
) -> dict[int, _Layer | None]:
    """By number; None for those to skip, which may hold anything."""
    if num_experts is None:
        raise ValueError(
            "num_experts: needed with recorded expert ids, got None; experts that nobody chose are not among them. "
            "Pass the model's number of routed experts"
        )
    real = [i for i in ignore_ids if 0 <= i < num_experts]
    if real:
        raise ValueError(
            f"ignore_ids: {_list(real)} would hide real experts, there are {num_experts}; "
            "cut the slots of shared experts off the array instead"
        )
    layers: dict[int, _Layer | None] = {}
    for number, ids_TK, present_TK in recorded:
        if number in skip_layers:
            layers[number] = None
            continue
        layer, before = _count(number, ids_TK, present_TK, num_experts, ignore_ids), layers.get(number)
        layers[number] = layer if before is None else _add(before, layer)
    return layers


def _count(
    number: int, ids_TK: np.ndarray, present_TK: np.ndarray, num_experts: int, ignore_ids: Sequence[int]
) -> _Layer:
    """One layer. present_TK: which entries are there at all: padding of the batch and of short rows is not."""
    ignored_TK = present_TK & np.isin(ids_TK, ignore_ids)
    kept_TK = present_TK & ~ignored_TK
    outside = ids_TK[kept_TK & ((ids_TK < 0) | (ids_TK >= num_experts))]
    if len(outside):
        found = Counter(outside.tolist()).most_common(5)
        raise ValueError(
            f"expert ids of layer {number}: expected values in [0, {num_experts}), got "
            + ", ".join(f"{i} ({n} times)" for i, n in found)
            + "; if they mark padding or shared experts, pass them as ignore_ids; if experts, raise num_experts"
        )
    # entries that do not count become different negative numbers: they repeat nobody
    distinct_TK = np.where(kept_TK, ids_TK, -1 - np.arange(ids_TK.shape[1]))
    repeated_T = (np.diff(np.sort(distinct_TK, axis=1), axis=1) == 0).any(axis=1)
    kept_TK = kept_TK & ~repeated_T[:, None]
    return _Layer(
        number=number,
        num_tokens=int(kept_TK.any(axis=1).sum()),
        counts_E=np.bincount(ids_TK[kept_TK], minlength=num_experts),
        ignored=Counter(ids_TK[ignored_TK].tolist()),
        num_repeated=int(repeated_T.sum()),
    )


def _add(a: _Layer, b: _Layer) -> _Layer:
    return _Layer(
        number=a.number,
        num_tokens=a.num_tokens + b.num_tokens,
        counts_E=a.counts_E + b.counts_E,
        ignored=a.ignored + b.ignored,
        num_repeated=a.num_repeated + b.num_repeated,
    )


def _layers_of_counts(
    recorded: Counts, num_experts: int | None, top_k: int | None, skip_layers: Sequence[int]
) -> dict[int, _Layer | None]:
    """By number; None for those to skip."""
    counts_LE, num_tokens_L = recorded.counts_LE, recorded.num_tokens_L
    if num_experts not in (None, counts_LE.shape[1]):
        raise ValueError(f"num_experts: the file counts {counts_LE.shape[1]} experts, got {num_experts}")
    if num_tokens_L is None and top_k is None:
        raise ValueError("top_k: needed with recorded counts, got None; they do not say how many tokens they are of")
    layers: dict[int, _Layer | None] = {}
    for number, counts_E in enumerate(counts_LE):
        if number in skip_layers:
            layers[number] = None
            continue
        num_tokens = _tokens_of(number, counts_E, top_k) if num_tokens_L is None else int(num_tokens_L[number])
        if counts_E.max() > num_tokens:
            raise ValueError(
                f"layer {number}: expert {counts_E.argmax()} has {counts_E.max()} assignments, but there are only "
                f"{num_tokens} tokens and each takes an expert once; check top_k or num_tokens"
            )
        layers[number] = _Layer(number, num_tokens, counts_E)
    return layers


def _tokens_of(number: int, counts_E: np.ndarray, top_k: int | None) -> int:
    num_tokens, rest = divmod(int(counts_E.sum()), top_k or 1)
    if rest:
        raise ValueError(
            f"top_k: expected a divisor of the assignments of every layer, got {top_k}, but layer {number} has "
            f"{counts_E.sum()}; check top_k, and that the counts are complete"
        )
    return num_tokens


def _refuse_what_no_router_does(layers: Sequence[_Layer], drop_repeated: bool) -> None:
    empty = [layer.number for layer in layers if not layer.num_tokens]
    if empty:
        raise ValueError(
            f"layers {_list(empty)}: no token names K different experts, so they were not recorded (dense layers?); "
            "leave them out with skip_layers"
        )
    if not layers:
        raise ValueError("skip_layers: no layer is left to diagnose; the file has none, or all of them are skipped")
    repeated = {layer.number: layer.num_repeated for layer in layers if layer.num_repeated}
    if repeated and not drop_repeated:
        number, count = next(iter(repeated.items()))
        raise ValueError(
            f"layer {number}: {count} tokens name an expert twice, and so it is in {len(repeated)} of {len(layers)} "
            "layers; top-k never does. If rows of zeros stand for tokens that were not routed, pass drop_repeated=True"
        )


def _sums(layer: _Layer) -> RoutingSums:
    """What a recorder would have summed up, with NaN for what nobody recorded."""
    nan = math.nan
    unknown_E = np.full(len(layer.counts_E), nan)
    return RoutingSums(layer.num_tokens, layer.counts_E.astype(np.int64), unknown_E, nan, nan, nan, nan, {}, {})


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (f" and {len(numbers) - 12} more" if len(numbers) > 12 else "")
