"""Exact sums over what the routers of a model decide: attached from outside, flushed every few steps.

Each layer's `tap` is hooked. A hook adds to buffers that were allocated once, on the layer's device, without waiting
for it; a forward that is run again for its gradients adds nothing. `flush` moves all sums to the host together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.ops.count import accumulate, accumulate_counts, inside_backward
from equipoise.types import DROP_REASONS, Observable, Routed, RoutingStats

_MOMENTS = 5  # tokens, token entropies, logits, squared logits, log-sum-exps


@dataclass(frozen=True, eq=False)
class _Sums:
    """One layer's window on the device: views into one integer and one float buffer, losses beside them."""

    integers: Tensor  # int64: E counts, then the drops by reason
    floats: Tensor  # float64: E sums of probabilities, then the moments
    num_experts: int
    losses: dict[str, Tensor] = field(default_factory=dict)

    def add(self, routed: Routed) -> None:
        decision, E = routed.decision, self.num_experts
        accumulate_counts(self.integers[:E], decision.expert_ids_N)
        for index, reason in enumerate(DROP_REASONS):
            if reason in routed.plan.drops:
                accumulate(self.integers[E + index], routed.plan.drops[reason])
        logits_TE, probs_TE = decision.logits_TE.detach(), decision.probs_TE.detach()
        moments = torch.stack(
            [
                logits_TE.new_full((), decision.num_tokens),
                torch.special.entr(probs_TE).sum(),
                logits_TE.sum(),
                logits_TE.square().sum(),
                logits_TE.logsumexp(-1).sum(),
            ]
        )
        accumulate(self.floats, torch.cat([probs_TE.sum(0), moments]))
        for name, value in routed.losses.items():
            if name not in self.losses:
                self.losses[name] = torch.zeros((), dtype=torch.float64, device=value.device)
            accumulate(self.losses[name], value * decision.num_tokens)

    def to_host(self) -> RoutingSums:
        E = self.num_experts
        integers, floats = self.integers.cpu(), self.floats.cpu()
        tokens, entropy, logits, squares, logsumexps = floats[E:].tolist()
        return RoutingSums(
            num_tokens=int(tokens),
            counts_E=integers[:E].numpy().copy(),
            probs_sum_E=floats[:E].numpy().copy(),
            token_entropy_sum=entropy,
            logit_sum=logits,
            logit_sq_sum=squares,
            logsumexp_sum=logsumexps,
            dropped=dict(zip(DROP_REASONS, integers[E:].tolist(), strict=True)),
            losses={name: value.item() for name, value in self.losses.items()},
        )

    def reset(self) -> None:
        for buffer in (self.integers, self.floats, *self.losses.values()):
            buffer.zero_()


def observable_layers(model: nn.Module) -> dict[str, Observable]:
    """The layers of the model that can be watched, by name, in the model's order.

    Raises ValueError when there is none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Observable)}
    if not layers:
        raise ValueError(
            f"model: expected at least one layer with a routing tap, found none in {type(model).__name__}; "
            "build its experts with equipoise.MoE"
        )
    return layers


class Recorder:
    """Counts every real token of every MoE layer once. Outputs are bit-identical with and without it.

    reduce: sums a tensor over data-parallel ranks in place at `flush`; None on one rank.
    """

    def __init__(self, model: nn.Module, reduce: Callable[[Tensor], None] | None = None) -> None:
        self._reduce = reduce
        self._paused = False
        self._handles: list[RemovableHandle] = []
        self._sums: dict[str, _Sums] = {}
        for name, layer in observable_layers(model).items():
            assert isinstance(layer, nn.Module)
            device = next(layer.parameters()).device
            integers = torch.zeros(layer.num_experts + len(DROP_REASONS), dtype=torch.int64, device=device)
            floats = torch.zeros(layer.num_experts + _MOMENTS, dtype=torch.float64, device=device)
            sums = self._sums[name] = _Sums(integers, floats, layer.num_experts)
            self._handles.append(layer.tap.register_forward_hook(self._hook(sums)))

    def _hook(self, sums: _Sums) -> Callable[[nn.Module, tuple[Routed], Routed], None]:
        @torch.no_grad()
        def record(module: nn.Module, args: tuple[Routed], routed: Routed) -> None:
            # The operators look for themselves, also in a compiled graph; this spares the arithmetic where it can.
            recomputed = not torch.compiler.is_compiling() and inside_backward()
            if not self._paused and not recomputed:
                sums.add(routed)

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
        window = []
        for name, sums in self._sums.items():
            if self._reduce is not None:
                for buffer in (sums.integers, sums.floats, *sums.losses.values()):
                    self._reduce(buffer)
            window.append(routing_stats(name, step, sums.to_host()))
            sums.reset()
        return window

    def state_dict(self) -> dict[str, Tensor]:
        """The open window, so that a resumed run goes on in the middle of it."""
        state: dict[str, Tensor] = {}
        for name, sums in self._sums.items():
            state |= {f"{name}.integers": sums.integers.clone(), f"{name}.floats": sums.floats.clone()}
            state |= {f"{name}.losses.{loss}": value.clone() for loss, value in sums.losses.items()}
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
            sums.losses.clear()
            prefix = f"{name}.losses."
            for key in (key for key in state if key.startswith(prefix)):
                sums.losses[key.removeprefix(prefix)] = state[key].clone().to(sums.floats.device)

    def detach(self) -> None:
        """Remove the hooks: the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
