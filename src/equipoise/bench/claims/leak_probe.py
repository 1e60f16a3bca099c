"""A probe: what a trained model's loss owes to tokens that are not there yet when text is generated.

The loss of the same tokens with ever fewer others in the forward; and what later tokens change about earlier ones.
Numbers are named "way.loss" and "leak.number".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as fn

from equipoise.bench.claims.probes import Numbers
from equipoise.models.cache import ContiguousCache
from equipoise.models.decoder import Decoder
from equipoise.train.data import eval_batches
from equipoise.train.loop import Trainer

SEQUENCES = 48
NOTICED = 1e-4  # nats by which some token's log-probability changes: beyond what rounding does


def together(model: Decoder, tokens_BS: Tensor) -> Tensor:
    """All sequences in one forward, as in training."""
    logits_BSV: Tensor = model(tokens_BS)
    return logits_BSV


def alone(model: Decoder, tokens_BS: Tensor) -> Tensor:
    """One whole sequence at a time."""
    return torch.cat([model(row_1S) for row_1S in tokens_BS[:, None]])


def lock_step(model: Decoder, tokens_BS: Tensor) -> Tensor:
    """The beginnings of all sequences together, computed anew for each next token."""
    return torch.stack([model(tokens_BS[:, : t + 1])[:, -1] for t in range(tokens_BS.shape[1])], dim=1)


def prefix(model: Decoder, tokens_BS: Tensor) -> Tensor:
    """The beginning of one sequence, computed anew for each next token: nothing else is there."""
    return torch.cat([lock_step(model, row_1S) for row_1S in tokens_BS[:, None]])


def cached(model: Decoder, tokens_BS: Tensor) -> Tensor:
    """One sequence token by token, the others' keys and values from a cache."""
    return torch.cat([_decoded(model, row_1S) for row_1S in tokens_BS[:, None]])


WAYS: Mapping[str, Callable[[Decoder, Tensor], Tensor]] = {
    "together": together,
    "alone": alone,
    "lock_step": lock_step,
    "prefix": prefix,
    "cached": cached,
}


@torch.no_grad()
def leak(trainer: Trainer) -> Numbers:
    """The loss of each of WAYS, and what `future` says, on the same validation text."""
    config, model = trainer.config, trainer.model
    size = (config.batch_size, config.data.seq_len, max(1, SEQUENCES // config.batch_size))
    batches = list(eval_batches(trainer.data.val, *size))
    model.eval()
    try:
        with trainer.watch.recorder.paused():
            numbers = {}
            for name, way in WAYS.items():
                losses = [_loss(way(model, batch.tokens_BS), batch.targets_BS) for batch in batches]
                numbers[f"{name}.loss"] = sum(losses) / len(losses)
            generator = torch.Generator().manual_seed(config.seed)
            found = [future(model, batch.tokens_BS, generator) for batch in batches]
    finally:
        model.train()
    return numbers | {f"leak.{name}": sum(each[name] for each in found) / len(found) for name in found[0]}


def future(model: Decoder, tokens_BS: Tensor, generator: torch.Generator) -> Numbers:
    """Half of each sequence replaced by other tokens: what is said of the half before it.

    changed_share: of the earlier places whose prediction is another one. divergence: Kullback-Leibler, nats per place.
    """
    half = tokens_BS.shape[1] // 2
    other_BS = tokens_BS.clone()
    order = torch.randperm(tokens_BS.numel(), generator=generator)
    other_BS[:, half:] = tokens_BS.flatten()[order].view_as(tokens_BS)[:, half:]
    before_BSV, after_BSV = (model(each)[:, :half].double().log_softmax(-1) for each in (tokens_BS, other_BS))
    changed_BS = (before_BSV - after_BSV).abs().amax(-1) > NOTICED
    divergence = fn.kl_div(after_BSV, before_BSV, log_target=True, reduction="sum") / changed_BS.numel()
    return {"changed_share": float(changed_BS.float().mean()), "divergence": float(divergence)}


def _loss(logits_BSV: Tensor, targets_BS: Tensor) -> float:
    return float(fn.cross_entropy(logits_BSV.float().flatten(0, 1), targets_BS.flatten()))


def _decoded(model: Decoder, row_1S: Tensor) -> Tensor:
    cache = ContiguousCache(model.config, 1, row_1S.shape[1])
    return torch.cat([model(row_1S[:, t : t + 1], cache=cache) for t in range(row_1S.shape[1])], dim=1)
