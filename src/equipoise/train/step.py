"""The gradient of one batch, in one or more micro-batches.

Splitting a batch changes no gradient: the language model's loss is a sum over the batch's targets divided by their
number, balancing losses are scaled by each micro-batch's share, and losses of global scope get the whole batch's
counts from a first pass without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

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


def gradients(
    model: Decoder,
    batches: Sequence[Batch],
    step: int,
    bf16: bool,
    recorder: Recorder | None,
    reduce: Callable[[Tensor], None] | None = None,
) -> float:
    """Add the gradient of the whole batch, given in micro-batches, to the parameters; return the mean loss in nats.

    recorder: what observes the model, to be paused where it is run twice; None where nothing does.
    reduce: sums a tensor over data-parallel ranks, in place; None on one rank. Each rank then adds its own part of the
    gradient of all ranks' batches, and returns its part of the loss: both are complete when summed (not averaged) over
    ranks.
    """
    num_targets = _total(count_targets(batches), batches, reduce)
    total = 0.0
    for batch, scope in zip(batches, batch_scopes(model, batches, step, bf16, recorder, reduce), strict=True):
        loss = task_loss(model, batch, scope, bf16) / num_targets
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        total += loss.item()
    return total


def _total(number: int, batches: Sequence[Batch], reduce: Callable[[Tensor], None] | None) -> int:
    """The sum of a number over ranks."""
    if reduce is None:
        return number
    total = torch.tensor(number, device=batches[0].tokens_BS.device)
    reduce(total)
    return int(total)


def count_targets(batches: Sequence[Batch]) -> int:
    """The tokens of the whole batch that are to be predicted."""
    return sum(int((batch.targets_BS != IGNORE).sum()) for batch in batches)


def batch_scopes(
    model: Decoder,
    batches: Sequence[Batch],
    step: int,
    bf16: bool,
    recorder: Recorder | None,
    reduce: Callable[[Tensor], None] | None = None,
) -> list[BatchScope]:
    """What the balancing losses of each micro-batch know of the whole batch. May run a forward over each of them."""
    num_tokens = _total(sum(batch.tokens_BS.numel() for batch in batches), batches, reduce)
    counts_LE = None
    if (len(batches) > 1 or reduce is not None) and needs_global_counts(model):
        with recorder.paused() if recorder else nullcontext():
            counts_LE = global_counts(model, batches, bf16)
        if reduce is not None:
            reduce(counts_LE)
    return [BatchScope(step=step, share=batch.tokens_BS.numel() / num_tokens, counts=counts_LE) for batch in batches]


def task_loss(model: Decoder, batch: Batch, scope: BatchScope, bf16: bool) -> Tensor:
    """The language model's loss, summed over the targets, in nats. Balancing losses hang on its graph, unseen."""
    with autocast(bf16, batch.tokens_BS.device):
        logits_BSV = model(batch.tokens_BS, scope=scope)
        return cross_entropy_sum(logits_BSV, batch.targets_BS)[0]


def needs_global_counts(model: Decoder) -> bool:
    """Whether a loss is taken over the global batch."""
    layers = model.moe_layers.values()
    return any(loss.scope == "global" for layer in layers for loss in layer.losses)


@torch.no_grad()
def global_counts(model: Decoder, batches: Sequence[Batch], bf16: bool) -> Tensor:
    """int64 (L, E): assignments of the whole batch per MoE layer, from a forward over each micro-batch.

    A rehearsal: noise and dropout make the same decisions in the pass that counts and in the one that trains, and the
    balancers see each token once.
    """
    counts: list[Tensor] = []

    def count(module: torch.nn.Module, args: tuple[Routed], routed: Routed) -> None:
        counts.append(count_assignments(routed.decision.expert_ids_N, routed.decision.num_experts))

    layers = model.moe_layers.values()
    handles = [layer.tap.register_forward_hook(count) for layer in layers]
    device = batches[0].tokens_BS.device
    try:
        with rehearsal(model), autocast(bf16, device):
            for batch in batches:
                model(batch.tokens_BS)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(counts).view(len(batches), len(layers), -1).sum(0)


@contextmanager
def rehearsal(model: Decoder) -> Iterator[None]:
    """Forwards inside leave no trace: the random state and the model's buffers, what balancers have counted among
    them, are as before when it ends. A recorder must be paused besides.
    """
    device = next(model.parameters()).device
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
