"""The gradient of one batch, in one or more micro-batches.

Splitting a batch changes no gradient: the language model's loss is a sum over the batch's targets divided by their
number, balancing losses are scaled by each micro-batch's share, and losses of global scope get the whole batch's
counts from a first pass without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from equipoise.models.decoder import Decoder, cross_entropy_sum
from equipoise.monitor.recorder import Recorder
from equipoise.ops.count import count_assignments
from equipoise.train.data import IGNORE, Batch
from equipoise.types import BatchScope, Routed


def autocast(enabled: bool, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def split(batch: Batch, parts: int) -> list[Batch]:
    """The batch in equal parts, in order."""
    tensors = (batch.tokens_BS, batch.targets_BS, batch.domains_BS)
    return [Batch(*part) for part in zip(*(tensor.chunk(parts) for tensor in tensors), strict=True)]


def gradients(model: Decoder, batches: Sequence[Batch], step: int, bf16: bool, recorder: Recorder) -> float:
    """Add the gradient of the whole batch, given in micro-batches, to the parameters; return the mean loss in nats."""
    device = batches[0].tokens_BS.device
    num_targets = sum(int((batch.targets_BS != IGNORE).sum()) for batch in batches)
    num_tokens = sum(batch.tokens_BS.numel() for batch in batches)
    counts_LE = None
    if len(batches) > 1 and needs_global_counts(model):
        with recorder.paused():
            counts_LE = global_counts(model, batches, bf16)
    total = 0.0
    for batch in batches:
        scope = BatchScope(step=step, share=batch.tokens_BS.numel() / num_tokens, counts=counts_LE)
        with autocast(bf16, device):
            logits_BSV = model(batch.tokens_BS, scope=scope)
            loss = cross_entropy_sum(logits_BSV, batch.targets_BS)[0] / num_targets
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        total += loss.item()
    return total


def needs_global_counts(model: Decoder) -> bool:
    """Whether a loss is taken over the global batch."""
    layers = model.moe_layers.values()
    return any(loss.scope == "global" for layer in layers for loss in layer.losses)


@torch.no_grad()
def global_counts(model: Decoder, batches: Sequence[Batch], bf16: bool) -> Tensor:
    """int64 (L, E): assignments of the whole batch per MoE layer, from a forward over each micro-batch.

    The random state is put back, so that noise and dropout make the same decisions in the pass that counts; so is
    what the balancers have counted, which see each token again in the pass that trains.
    """
    counts: list[Tensor] = []

    def count(module: torch.nn.Module, args: tuple[Routed], routed: Routed) -> None:
        counts.append(count_assignments(routed.decision.expert_ids_N, routed.decision.num_experts))

    layers = model.moe_layers.values()
    handles = [layer.tap.register_forward_hook(count) for layer in layers]
    pending = [layer.balancer.pending for layer in layers if layer.balancer is not None]
    before = [counted.clone() for counted in pending]
    device = batches[0].tokens_BS.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), autocast(bf16, device):
            for batch in batches:
                model(batch.tokens_BS)
    finally:
        for handle in handles:
            handle.remove()
        for counted, value in zip(pending, before, strict=True):
            counted.copy_(value)
    return torch.stack(counts).view(len(batches), len(layers), -1).sum(0)
