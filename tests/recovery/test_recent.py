"""The newest scores of a layer: the right ones, and no more memory than they need, however traffic is cut."""

import gc

import pytest
import torch

from equipoise.layer import MoE
from equipoise.recovery.recent import RecentScores

E, D = 4, 8


def live():
    """All live tensors that have a column per expert."""
    return [o for o in gc.get_objects() if type(o) is torch.Tensor and o.dim() == 2 and o.shape[1] == E]


def held(others):
    """Bytes of those that came after `others`, whole storages. What other tests left may have no storage at all."""
    known = {id(tensor) for tensor in others}
    storages = [tensor.untyped_storage() for tensor in live() if id(tensor) not in known]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("per_forward", [1, 3, 50, 700])
@torch.no_grad()
def test_the_last_tokens_are_kept_and_nothing_before_them(per_forward):
    limit, layer = 500, MoE(D, 8, E).eval()
    recent = RecentScores({"moe": layer}, limit)
    others, logits = live(), []
    handle = layer.tap.register_forward_hook(lambda m, a, routed: logits.append(routed.decision.selection_TE.clone()))
    for _ in range(4000 // per_forward):
        layer(torch.randn(1, per_forward, D))
    handle.remove()
    assert torch.equal(recent.scores("moe"), torch.cat(logits)[-limit:])
    logits.clear()
    gc.collect()
    assert 0 < held(others) <= 4 * E * (limit + 64 * per_forward + per_forward)
    recent.detach()
    with pytest.raises(KeyError):
        recent.scores("another")
    with pytest.raises(ValueError, match="no traffic has been seen yet"):
        recent.scores("moe")


def test_no_tokens_are_none_to_keep():
    with pytest.raises(ValueError, match=r"num_tokens: expected at least 1, got 0"):
        RecentScores({"moe": MoE(D, 8, E)}, 0)
