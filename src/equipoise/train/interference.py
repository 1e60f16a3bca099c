"""How far the balancing losses pull a router away from what the language model's loss asks of it.

Both gradients on each router's weight, taken apart: their cosine and the ratio of their lengths (that a balancing loss
interferes with the task is the argument of arXiv 2408.15664; the measure is ours). Changes nothing that training uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from equipoise.models.decoder import Decoder
from equipoise.monitor.recorder import Recorder
from equipoise.train.data import Batch
from equipoise.train.step import batch_scopes, count_targets, rehearsal, task_loss
from equipoise.types import BatchScope


@dataclass(frozen=True)
class Interference:
    """Balancing gradient against task gradient on the weight of one layer's router, over one or more batches.

    layer: its name in the model. cosine: of the angle between the two, mean over the batches; negative means that
    balancing undoes what the task asks for. ratio: length of the balancing gradient over that of the task gradient,
    mean over the batches; infinite where the task sends the router no gradient. negative_share: share of the batches
    whose cosine is below 0. Cosine and ratio are 0 where there is no balancing gradient: no loss, or a balancer alone.
    The balancing gradient of a layer has a part that the losses of later layers send down the residual stream.
    """

    layer: str
    cosine: float
    ratio: float
    negative_share: float
    num_batches: int

    def scalars(self) -> dict[str, float]:
        """As named numbers for the run store."""
        return {
            f"interference_cosine.{self.layer}": self.cosine,
            f"interference_ratio.{self.layer}": self.ratio,
            f"interference_negative_share.{self.layer}": self.negative_share,
        }


def interference(
    model: Decoder, batches: Sequence[Sequence[Batch]], step: int, bf16: bool, recorder: Recorder | None = None
) -> list[Interference]:
    """One record per MoE layer whose router has a weight that is trained, in the model's order.

    batches: whole batches, each as its micro-batches, as `gradients` takes them. step: for coefficients that follow a
    schedule. recorder: what watches the model, if anything does: it is paused. Each batch costs two forwards and
    two backwards. Gradients, random state, buffers, what balancers have counted and the training mode stay as they
    are. Raises ValueError without a batch.
    """
    if not batches:
        raise ValueError("interference: expected at least one batch, got none; pass some of the training batches")
    pairs = [router_gradients(model, batch, step, bf16, recorder) for batch in batches]
    return [
        _over_batches(name, [_compare(task[layer], balance[layer]) for task, balance in pairs])
        for layer, name in enumerate(_router_weights(model))
    ]


def router_gradients(
    model: Decoder, batches: Sequence[Batch], step: int, bf16: bool, recorder: Recorder | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """(task gradient, balancing gradient) on each trained router weight (E, D), of one batch in micro-batches.

    Their sum is what `gradients` adds to the weight's `.grad`. Both passes make the same random decisions.
    """
    if not _router_weights(model):
        return [], []
    modes = [(module, module.training) for module in model.modules()]
    model.train()  # balancing losses exist in training only
    try:
        with recorder.paused() if recorder else nullcontext():
            scopes = batch_scopes(model, batches, step, bf16, recorder)
            task = _gradients(model, batches, [replace(scope, share=0.0) for scope in scopes], 1.0, bf16)
            # `attach_loss` gives a balancing loss the gradient 1 whatever comes down from above: here zeros
            balance = _gradients(model, batches, scopes, 0.0, bf16)
    finally:
        for module, training in modes:
            module.training = training
    return task, balance


def _router_weights(model: Decoder) -> dict[str, Tensor]:
    """By the layer's name. A router that has no weight, such as one that hashes, or a frozen one, is left out."""
    weights = {name: getattr(layer.router, "weight", None) for name, layer in model.moe_layers.items()}
    return {name: weight for name, weight in weights.items() if weight is not None and weight.requires_grad}


def _gradients(
    model: Decoder, batches: Sequence[Batch], scopes: Sequence[BatchScope], factor: float, bf16: bool
) -> list[Tensor]:
    """Of factor * mean task loss + balancing losses, on the routers' weights."""
    weights = list(_router_weights(model).values())
    total = [torch.zeros_like(weight) for weight in weights]
    num_targets = count_targets(batches)
    with rehearsal(model), torch.enable_grad():
        for batch, scope in zip(batches, scopes, strict=True):
            loss = task_loss(model, batch, scope, bf16) * (factor / num_targets)
            grads = torch.autograd.grad(loss, weights, materialize_grads=True)
            for sum_, grad in zip(total, grads, strict=True):
                sum_ += grad
    return total


def _compare(task_ED: Tensor, balance_ED: Tensor) -> tuple[float, float]:
    """(cosine, ratio of lengths)."""
    task, balance = task_ED.double().flatten(), balance_ED.double().flatten()
    task_length, balance_length = float(task.norm()), float(balance.norm())
    if balance_length == 0.0:
        return 0.0, 0.0
    if task_length == 0.0:
        return 0.0, math.inf
    return float(task @ balance) / (task_length * balance_length), balance_length / task_length


def _over_batches(layer: str, measured: Sequence[tuple[float, float]]) -> Interference:
    cosines, ratios = zip(*measured, strict=True)
    num_batches = len(measured)
    return Interference(
        layer=layer,
        cosine=sum(cosines) / num_batches,
        ratio=sum(ratios) / num_batches,
        negative_share=sum(cosine < 0 for cosine in cosines) / num_batches,
        num_batches=num_batches,
    )
