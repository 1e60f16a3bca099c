"""The sums of many layers side by side in two arrays, so that windows are added up without a loop over layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from equipoise.monitor.stats import RoutingSums, merge

_MOMENTS = 4  # token entropies, logits, squared logits, log-sum-exps


class _Place(NamedTuple):
    """Of one layer: its name, where its experts begin, how many there are, and what its other numbers are about."""

    layer: str
    first: int
    num_experts: int
    dropped: tuple[str, ...]
    rerouted: tuple[str, ...]
    losses: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class StackedSums:
    """What `RoutingSums` says of each layer, exactly. L layers, N experts of all of them.

    integers: int64, N counts, then of each layer its tokens, drops and reroutes. floats: float64, N sums of
    probabilities, then of each layer its moments and losses. assignments_L: int64, sums of the counts.
    """

    layout: tuple[_Place, ...]
    integers: np.ndarray
    floats: np.ndarray
    assignments_L: np.ndarray

    @staticmethod
    def of(sums: Mapping[str, RoutingSums]) -> StackedSums:
        """All layers of `sums`, in its order."""
        if not sums:
            return StackedSums((), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
        first, layout, integers, floats = 0, list[_Place](), list[int](), list[float]()
        for name, each in sums.items():
            names = tuple(each.dropped), tuple(each.rerouted), tuple(each.losses)
            layout.append(_Place(name, first, len(each.counts_E), *names))
            first += len(each.counts_E)
            integers += [each.num_tokens, *each.dropped.values(), *each.rerouted.values()]
            floats += [each.token_entropy_sum, each.logit_sum, each.logit_sq_sum, each.logsumexp_sum]
            floats += each.losses.values()
        counts = np.concatenate([each.counts_E for each in sums.values()])
        probs = np.concatenate([each.probs_sum_E for each in sums.values()])
        return StackedSums(
            tuple(layout),
            np.concatenate([counts, np.array(integers, dtype=np.int64)]),
            np.concatenate([probs, np.array(floats, dtype=np.float64)]),
            np.add.reduceat(counts, [place.first for place in layout]),
        )

    @property
    def experts_L(self) -> np.ndarray:
        """int64, experts of each layer."""
        return np.array([place.num_experts for place in self.layout], dtype=np.int64)

    def by_layer(self, wanted: Collection[str] | None = None) -> dict[str, RoutingSums]:
        """As they were given, or added up: copies, of the layers that are wanted, or all."""
        if wanted is not None and not wanted:
            return {}
        others = zip(self.layout, self._others(), strict=True)
        return {at.layer: self._unstacked(at, *rest) for at, rest in others if wanted is None or at.layer in wanted}

    def like(self, other: StackedSums) -> StackedSums:
        """The same, with the other's layout where it is an equal one: then it need not be compared again."""
        return replace(self, layout=other.layout) if self.layout == other.layout else self

    def copy(self) -> StackedSums:
        """With arrays of its own."""
        return StackedSums(self.layout, self.integers.copy(), self.floats.copy(), self.assignments_L.copy())

    def absorb(self, other: StackedSums) -> StackedSums:
        """Both together: in place where they are laid out alike, else layer by layer (`merge`), the slow twin."""
        if self.layout is not other.layout and self.layout != other.layout:
            return self.merged(other)
        np.add(self.integers, other.integers, out=self.integers)
        np.add(self.floats, other.floats, out=self.floats)
        np.add(self.assignments_L, other.assignments_L, out=self.assignments_L)
        return self

    def merged(self, other: StackedSums) -> StackedSums:
        """Both together, layer by layer. Raises ValueError where a layer has other experts than before."""
        mine, theirs = self.by_layer(), other.by_layer()
        both = {
            layer: merge(mine[layer], theirs[layer]) if layer in mine and layer in theirs else each
            for layer, each in {**mine, **theirs}.items()
        }
        return StackedSums.of(both)

    def _others(self) -> list[tuple[list[int], list[float]]]:
        """What each layer has besides the experts' numbers."""
        num_experts = sum(place.num_experts for place in self.layout)
        integers, floats = self.integers[num_experts:].tolist(), self.floats[num_experts:].tolist()
        others, i, f = [], 0, 0
        for place in self.layout:
            to_i = i + 1 + len(place.dropped) + len(place.rerouted)
            to_f = f + _MOMENTS + len(place.losses)
            others.append((integers[i:to_i], floats[f:to_f]))
            i, f = to_i, to_f
        return others

    def _unstacked(self, place: _Place, integers: list[int], floats: list[float]) -> RoutingSums:
        experts = slice(place.first, place.first + place.num_experts)
        tokens, *reasons = integers
        entropy, logits, squares, logsumexps, *losses = floats
        num_drops = len(place.dropped)
        return RoutingSums(
            num_tokens=tokens,
            counts_E=self.integers[experts].copy(),
            probs_sum_E=self.floats[experts].copy(),
            token_entropy_sum=entropy,
            logit_sum=logits,
            logit_sq_sum=squares,
            logsumexp_sum=logsumexps,
            dropped=dict(zip(place.dropped, reasons[:num_drops], strict=True)),
            rerouted=dict(zip(place.rerouted, reasons[num_drops:], strict=True)),
            losses=dict(zip(place.losses, losses, strict=True)),
        )
