"""Exact sums over what the routers of a model decide: attached from outside, flushed every few steps.

Each layer's `tap` is hooked. A hook adds to buffers that were allocated once, on the layer's device, without waiting
for it, several small forwards together; a forward that is run again for its gradients adds nothing. `flush` moves all
sums to the host together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise.monitor.adapters.transformers_moe import attach, experts_layers
from equipoise.monitor.co_selection import PairCounts
from equipoise.monitor.stats import RoutingSums, all_routing_stats
from equipoise.ops.count import accumulate, accumulate_counts, inside_backward
from equipoise.types import (
    DROP_REASONS,
    REROUTE_REASONS,
    CoSelection,
    Decision,
    Observable,
    ProductDecision,
    Routed,
    RoutingStats,
    is_observable,
)

_REASONS = DROP_REASONS + REROUTE_REASONS
_MOMENTS = 5  # tokens, token entropies, logits, squared logits, log-sum-exps


@dataclass(frozen=True, eq=False)
class _Sums:
    """One layer's window: views into the recorder's buffers, on the device.

    integers: int64, E counts, then drops and reroutes by reason. floats: float64, E sums of probabilities, the moments,
    then the losses.
    """

    integers: Tensor
    floats: Tensor
    num_experts: int
    loss_names: tuple[str, ...]
    # Sliced here, not in `add`: torch.compile mistakes the offset of a slice of a slice that an operator writes to.
    counts_E: Tensor
    reasons: tuple[Tensor, ...]

    @staticmethod
    def of(integers: Tensor, floats: Tensor, num_experts: int, loss_names: tuple[str, ...]) -> _Sums:
        reasons = tuple(integers[num_experts:].unbind())
        return _Sums(integers, floats, num_experts, loss_names, integers[:num_experts], reasons)

    @torch.no_grad()
    def add(self, seen: Sequence[Routed]) -> None:
        """Of one forward, or of several small ones together."""
        device = self.floats.device  # layers may be spread over devices
        decisions = [routed.decision for routed in seen]
        accumulate_counts(self.counts_E, _cat([decision.expert_ids_N for decision in decisions]).to(device))
        with_drops = [routed.plan.drops for routed in seen if routed.plan.drops]
        for reason, total in zip(_REASONS, self.reasons, strict=True):
            for drops in with_drops:
                if reason in drops:
                    accumulate(total, drops[reason].to(device))
        probs_E, moments = _router_sums(decisions)
        zero = moments[0].new_zeros(())
        losses = [
            sum((routed.losses[name] * routed.decision.num_tokens for routed in seen if name in routed.losses), zero)
            for name in self.loss_names
        ]
        accumulate(self.floats, torch.cat([probs_E, torch.stack(moments + losses)]).to(device))


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _router_sums(decisions: Sequence[Decision]) -> tuple[Tensor, list[Tensor]]:
    """Sums over tokens: of the probabilities (E,), and the moments, scalars."""
    products = [decision for decision in decisions if isinstance(decision, ProductDecision)]
    if len(products) == len(decisions):
        return _product_sums(
            _cat([each.first_TA for each in products]).detach(), _cat([each.second_TB for each in products]).detach()
        )
    logits_TE = _cat([decision.logits_TE for decision in decisions]).detach()
    probs_TE = _cat([decision.probs_TE for decision in decisions]).detach()
    return probs_TE.sum(0), [
        logits_TE.new_zeros(()) + len(probs_TE),
        torch.special.entr(probs_TE).sum(),
        logits_TE.sum(),
        logits_TE.square().sum(),
        logits_TE.logsumexp(-1).sum(),
    ]


def _product_sums(first_TA: Tensor, second_TB: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The same for logits that are sums of two parts, without making all of them: their softmax is a product.

    A softmax's entropy is its log-sum-exp less the mean logit under it.
    """
    A, B = first_TA.shape[1], second_TB.shape[1]
    logsumexp = first_TA.logsumexp(-1).sum() + second_TB.logsumexp(-1).sum()
    p_TA, q_TB = first_TA.softmax(-1), second_TB.softmax(-1)
    with torch.autocast(first_TA.device.type, enabled=False):
        probs_E = (p_TA.t() @ q_TB).flatten()
    return probs_E, [
        first_TA.new_zeros(()) + len(first_TA),
        logsumexp - (p_TA * first_TA).sum() - (q_TB * second_TB).sum(),
        B * first_TA.sum() + A * second_TB.sum(),
        B * first_TA.square().sum() + A * second_TB.square().sum() + 2 * (first_TA.sum(1) * second_TB.sum(1)).sum(),
        logsumexp,
    ]


class _Backlog:
    """Small forwards of one layer, as when single tokens are decoded, kept to be added together: a dozen operators per
    forward would take a tenth of the time of such a forward. At most MAX_WAITING probabilities wait."""

    SMALL, MAX_WAITING = 2**12, 2**15

    def __init__(self, sums: _Sums) -> None:
        self._sums, self._waiting, self._size = sums, list[Routed](), 0

    def add(self, routed: Routed) -> None:
        """Now, or later together with others. What a backward pass is waiting for is not kept."""
        decision = routed.decision
        scores = decision.first_TA if isinstance(decision, ProductDecision) else decision.probs_TE
        if torch.compiler.is_compiling() or scores.requires_grad or scores.numel() > self.SMALL:
            self._sums.add([routed])
            return
        self._waiting.append(routed)
        self._size += scores.numel()
        if self._size >= self.MAX_WAITING:
            self.settle()

    def settle(self) -> None:
        """Add all that waits."""
        if self._waiting:
            self._sums.add(self._waiting)
        self.forget()

    def forget(self) -> None:
        """Nothing waits any more."""
        self._waiting, self._size = [], 0


@dataclass(frozen=True, eq=False)
class _Buffers:
    """All layers' sums in one block of 64-bit words, so that they reach the host in one copy.

    words: int64; the first num_integers are integers, the others the bits of float64 numbers.
    """

    words: Tensor
    num_integers: int
    layers: Mapping[str, Observable]

    @staticmethod
    def allocate(layers: Mapping[str, Observable], device: torch.device) -> _Buffers:
        integers = sum(layer.num_experts + len(_REASONS) for layer in layers.values())
        floats = sum(layer.num_experts + _MOMENTS + len(layer.loss_names) for layer in layers.values())
        return _Buffers(torch.zeros(integers + floats, dtype=torch.int64, device=device), integers, layers)

    @property
    def integers(self) -> Tensor:
        return self.words[: self.num_integers]

    @property
    def floats(self) -> Tensor:
        return self.words[self.num_integers :].view(torch.float64)

    def by_layer(self) -> dict[str, _Sums]:
        views = {}
        integers, floats = self.integers, self.floats
        for name, layer in self.layers.items():
            E, names = layer.num_experts, layer.loss_names
            num_integers, num_floats = E + len(_REASONS), E + _MOMENTS + len(names)
            views[name] = _Sums.of(integers[:num_integers], floats[:num_floats], E, names)
            integers, floats = integers[num_integers:], floats[num_floats:]
        return views

    def to_host(self) -> dict[str, RoutingSums]:
        """Every layer's sums on the host, in one copy."""
        words = self.words.cpu().numpy().copy()  # on a CPU the first is no copy
        integers, floats = words[: self.num_integers], words[self.num_integers :].view(np.float64)
        sums, i, f = {}, 0, 0
        for name, layer in self.layers.items():
            E, num_losses = layer.num_experts, len(layer.loss_names)
            sums[name] = _sums_of(integers[i : i + E + len(_REASONS)], floats[f : f + E + _MOMENTS + num_losses], layer)
            i, f = i + E + len(_REASONS), f + E + _MOMENTS + num_losses
        return sums


def _sums_of(integers: np.ndarray, floats: np.ndarray, layer: Observable) -> RoutingSums:
    """From one layer's words, which are laid out as in `_Sums`."""
    E, num_drops = layer.num_experts, len(DROP_REASONS)
    tokens, entropy, logits, squares, logsumexps, *losses = floats[E:].tolist()
    reasons = integers[E:].tolist()
    return RoutingSums(
        num_tokens=int(tokens),
        counts_E=integers[:E],
        probs_sum_E=floats[:E],
        token_entropy_sum=entropy,
        logit_sum=logits,
        logit_sq_sum=squares,
        logsumexp_sum=logsumexps,
        dropped=dict(zip(DROP_REASONS, reasons[:num_drops], strict=True)),
        rerouted=dict(zip(REROUTE_REASONS, reasons[num_drops:], strict=True)),
        losses={name: value for name, value in zip(layer.loss_names, losses, strict=True) if value},  # 0: eval only
    )


def observable_layers(model: nn.Module, required: bool = True) -> dict[str, Observable]:
    """The layers of the model that can be watched, by name: equipoise's in the model's order, then others'.

    Raises ValueError when there is none and at least one is required.
    """
    layers: dict[str, Observable] = {n: module for n, module in model.named_modules() if is_observable(module)}
    layers |= experts_layers(model)
    if required and not layers:
        raise ValueError(
            f"model: expected at least one layer with a routing tap, found none in {type(model).__name__}; "
            "build its experts with equipoise.MoE, or as those of transformers 5: a module that is called with "
            "(hidden_states, top_k_index, top_k_weights)"
        )
    return layers


class Recorder:
    """Counts every real token of every MoE layer once. Outputs are bit-identical with and without it.

    reduce: sums a float64 tensor over data-parallel ranks in place, once per `flush`; None on one rank.
    required: refuse a model in which nothing is routed.
    """

    def __init__(
        self, model: nn.Module, reduce: Callable[[Tensor], object] | None = None, *, required: bool = True
    ) -> None:
        self._reduce = reduce
        self._paused = False
        self._pairs: PairCounts | None = None
        self.co_selection: list[CoSelection] = []
        layers = observable_layers(model, required)
        devices = [p.device for p in model.parameters() if p.device.type != "meta"]  # meta: weights kept elsewhere
        self._buffers = _Buffers.allocate(layers, devices[0] if devices else torch.device("cpu"))
        self._sums = self._buffers.by_layer()
        self._backlogs = {name: _Backlog(sums) for name, sums in self._sums.items()}
        self._handles: list[RemovableHandle] = [
            layer.tap.register_forward_hook(self._hook(name)) for name, layer in layers.items()
        ]
        self._handles += attach(layers.values())

    def co_select(self, tokens: int) -> None:
        """See `Watch.co_select`. After each flush `co_selection` has a record per layer.

        It is a sample: an open window of it is not in `state_dict`.
        """
        self._pairs = PairCounts(self._buffers.layers, tokens, self._buffers.words.device)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Routed], Routed], None]:
        backlog = self._backlogs[name]

        def record(module: nn.Module, args: tuple[Routed], routed: Routed) -> None:
            # The operators look for themselves, also in a compiled graph; this spares the arithmetic where it can.
            recomputed = not torch.compiler.is_compiling() and inside_backward()
            if not self._paused and not recomputed:
                backlog.add(routed)
                if self._pairs is not None:
                    self._pairs.add(name, routed.decision)

        return record

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is counted: for validation between training steps."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def flush(self, step: int) -> list[RoutingStats]:
        """One record per layer over everything since the last flush, and a fresh start."""
        return all_routing_stats(step, self.flush_sums(step))

    def flush_sums(self, step: int = 0) -> dict[str, RoutingSums]:
        """The sums behind `flush`, by layer, for whoever adds up several flushes."""
        self._settle()
        if self._reduce is not None:
            pairs = [] if self._pairs is None else [self._pairs.words]
            _reduce_together(self._reduce, [self._buffers.integers, self._buffers.floats, *pairs])
        if self._pairs is not None:
            self.co_selection = self._pairs.take(step)
        sums = self._buffers.to_host()
        self._buffers.words.zero_()
        return sums

    def state_dict(self) -> dict[str, Tensor]:
        """The open window, so that a resumed run goes on in the middle of it."""
        self._settle()
        state: dict[str, Tensor] = {}
        for name, sums in self._sums.items():
            state |= {f"{name}.integers": sums.integers.clone(), f"{name}.floats": sums.floats.clone()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned. Raises ValueError when it is of another model."""
        for name, sums in self._sums.items():
            for part, buffer in (("integers", sums.integers), ("floats", sums.floats)):
                saved = state.get(f"{name}.{part}")
                if saved is None or saved.shape != buffer.shape:
                    raise ValueError(
                        f"recorder state: expected {name}.{part} of shape {tuple(buffer.shape)}, got "
                        f"{None if saved is None else tuple(saved.shape)}; it belongs to another model"
                    )
                buffer.copy_(saved)
        for backlog in self._backlogs.values():
            backlog.forget()

    def _settle(self) -> None:
        for backlog in self._backlogs.values():
            backlog.settle()

    def detach(self) -> None:
        """Remove the hooks: the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _reduce_together(reduce: Callable[[Tensor], object], parts: Sequence[Tensor]) -> None:
    """Sum over ranks, as one tensor: counts are whole numbers in float64 too, up to 2^53 of them."""
    both = torch.cat([part.double() for part in parts])
    reduce(both)
    for part, summed in zip(parts, torch.split(both, [len(part) for part in parts]), strict=True):
        part.copy_(summed)
