"""The newest scores of a layer: the right ones, and no more memory than they need, however traffic is cut."""

import gc

import pytest
import torch

from equipoise.layer import MoE
from equipoise.recovery.recent import RecentScores

E, D = 4, 8


def held(layer: MoE) -> int:
    """Bytes of all live tensors that have a column per expert, whole storages."""
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.dim() == 2 and o.shape[1] == E]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    own = layer.router.weight.untyped_storage().data_ptr()
    return sum(size for pointer, size in storages.items() if pointer != own)


@pytest.mark.parametrize("per_forward", [1, 3, 50, 700])
@torch.no_grad()
def test_the_last_tokens_are_kept_and_nothing_before_them(per_forward):
    limit, layer = 500, MoE(D, 8, E).eval()
    recent = RecentScores({"moe": layer}, limit)
    before, logits = held(layer), []
    handle = layer.tap.register_forward_hook(lambda m, a, routed: logits.append(routed.decision.selection_TE.clone()))
    for _ in range(4000 // per_forward):
        layer(torch.randn(1, per_forward, D))
    handle.remove()
    assert torch.equal(recent.scores("moe"), torch.cat(logits)[-limit:])
    logits.clear()
    gc.collect()
    assert held(layer) - before <= 4 * E * (limit + 64 * per_forward + per_forward)
    recent.detach()
    with pytest.raises(KeyError):
        recent.scores("another")
    with pytest.raises(ValueError, match="no traffic has been seen yet"):
        recent.scores("moe")
