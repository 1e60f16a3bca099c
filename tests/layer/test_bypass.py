"""What a breaker keeps from a layer's experts: on top of the mode, and no part of it."""

import pytest
import torch

from equipoise.layer import Capacity, FeedForward, MoE
from equipoise.layer.mode import NO_BYPASS, NORMAL, Bypass, Mode
from equipoise.routing import TopK

D, F, E, K, T = 16, 8, 6, 2, 40


def layer(shared=1):
    return MoE(D, F, E, router=TopK(k=K), shared_experts=shared).eval()


def run(moe, x):
    """(y, assignments that were diverted, rows of each expert)."""
    seen = []
    handle = moe.tap.register_forward_hook(lambda module, args, routed: seen.append(routed))
    with torch.no_grad():
        y = moe(x)
    handle.remove()
    plan = seen[0].plan
    return y, int(plan.drops.get("diverted", torch.zeros(()))), plan.counts_e


def test_it_does_what_a_mode_would_do():
    moe, x = layer(), torch.randn(T, D)
    for kept in ({"dense_share": 1.0}, {"shut_experts": (1, 3)}, {"dense_share": 1.0, "shut_experts": (2,)}):
        moe.set_mode(Mode(**kept))
        expected = run(moe, x)
        moe.set_mode(NORMAL)
        moe.set_bypass(Bypass(**kept))
        assert moe.mode == NORMAL
        assert all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(run(moe, x), expected, strict=True)
        )
        moe.set_bypass(NO_BYPASS)


def test_without_it_the_layer_is_as_before():
    moe, x = layer(), torch.randn(T, D)
    before, state = run(moe, x)[0], moe.state_dict().keys()
    moe.set_bypass(Bypass(dense_share=1.0))
    assert moe.state_dict().keys() == state
    assert not torch.equal(run(moe, x)[0], before)
    moe.set_bypass(NO_BYPASS)
    assert torch.equal(run(moe, x)[0], before)


def test_modes_come_and_go_under_it():
    moe, x = layer(), torch.randn(T, D)
    moe.set_bypass(Bypass(shut_experts=(4,)))
    for mode in (Mode(shut_experts=(0,)), Mode(bias=(0.0,) * E), Mode(round_robin=True), NORMAL):
        moe.set_mode(mode)
        assert moe.mode == mode
        counts_e = run(moe, x)[2].tolist()
        assert [counts_e[e] == 0 for e in (4, *mode.shut_experts)] == [True] * (1 + len(mode.shut_experts))
        assert sum(counts_e) > 0


@pytest.mark.parametrize(("mode", "bypass"), [(0.25, 1.0), (1.0, 0.25)])
def test_the_larger_share_holds(mode, bypass):
    moe, x = layer(), torch.randn(T, D)
    moe.set_mode(Mode(dense_share=mode))
    moe.set_bypass(Bypass(dense_share=bypass))
    assert run(moe, x)[1] == T * K
    assert moe.mode == Mode(dense_share=mode)


def test_its_stand_in_gives_way_to_that_of_the_mode():
    moe, x, ours, theirs = layer(shared=0), torch.randn(T, D), FeedForward(D, F), FeedForward(D, F)
    moe.set_bypass(Bypass(dense_share=1.0, dense=ours))
    with torch.no_grad():  # the combine weights of a token add up to 1
        assert torch.allclose(run(moe, x)[0], ours(x), atol=1e-6)
        assert moe.dense is None  # of the mode
        moe.set_mode(Mode(shut_experts=(1,)), theirs)
        assert torch.allclose(run(moe, x)[0], theirs(x), atol=1e-6)
        assert moe.dense is theirs
        moe.set_mode(moe.mode, moe.dense)  # put back as it was found
        moe.set_bypass(NO_BYPASS)
    assert moe.dense is theirs
    assert run(moe, x)[1] == run(moe, x)[1] < T * K


def test_what_the_layer_cannot_take_is_refused_and_changes_nothing():
    moe, before = layer(shared=0), Mode(capacity=Capacity(1.0))
    moe.set_mode(before)
    with pytest.raises(
        ValueError, match=r"nothing can stand in for the experts; build the layer with shared_experts=1"
    ):
        moe.set_bypass(Bypass(dense_share=1.0))
    with pytest.raises(ValueError, match=rf"shut_experts: expected experts in 0 to {E - 1}, got \[{E}\]"):
        moe.set_bypass(Bypass(shut_experts=(E,), dense=FeedForward(D, F)))
    with pytest.raises(ValueError, match=r"dense_share: expected a share in \[0, 1\], got 1.5"):
        moe.set_bypass(Bypass(dense_share=1.5))
    assert (moe.mode, moe.bypass) == (before, NO_BYPASS)
