"""What a token gets does not depend on who else is in the batch; and a causal policy never looks ahead."""

import pytest
import torch

from equipoise.layer import Capacity, MoE
from equipoise.routing import TopK

# The rows of a matrix product may be summed in another order when there are more of them: 1e-6, not bit for bit.
CLOSE = {"rtol": 0, "atol": 1e-6}
ROUTERS = [
    TopK(k=2),
    TopK(k=1),
    TopK(k=2, order="post"),
    TopK(k=2, score="sigmoid", num_groups=2, top_groups=1, jitter=0.1),
]


def build(**kwargs) -> MoE:
    layer = MoE(8, 16, 4, shared_experts=1, shared_gate=True, **kwargs)
    layer.init_weights(0.3, 0.3)
    return layer


@pytest.mark.parametrize("backend", ["lean", "grouped", "reference"])
@pytest.mark.parametrize("capacity", [None, Capacity(0.5)], ids=["dropless", "capacity"])
@pytest.mark.parametrize("router", ROUTERS, ids=repr)
def test_eval_output_of_a_token_does_not_depend_on_the_batch(router, capacity, backend):
    layer = build(router=router, capacity=capacity, backend=backend).eval()
    x = torch.randn(12, 8)
    together = layer(x)
    for t in range(12):
        torch.testing.assert_close(layer(x[t : t + 1]), together[t : t + 1], **CLOSE)  # decode equals prefill
    torch.testing.assert_close(layer(torch.cat([torch.randn(50, 8), x, x]))[50:62], together, **CLOSE)
    crowd = x[:1].expand(100, 8)  # a hundred tokens that want one token's experts
    torch.testing.assert_close(layer(torch.cat([crowd, x]))[100:], together, **CLOSE)


@pytest.mark.parametrize("backend", ["lean", "grouped"])
def test_changing_other_tokens_without_rerouting_changes_no_bit(backend):
    """The same rows in the same places: nothing of one token leaks into another's result."""
    layer = build(router=TopK(k=2), backend=backend).eval()
    x = torch.randn(12, 8)
    scaled = x.clone()
    scaled[6:] *= 1.5  # a linear router makes the same choice for a longer token
    assert torch.equal(layer(scaled)[:6], layer(x)[:6])
    assert not torch.allclose(layer(scaled)[6:], layer(x)[6:])


def test_padding_does_not_change_real_tokens_and_comes_out_as_zero():
    layer, x = build(router=TopK(k=2)), torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    y = layer(x, padding_mask=padding)
    assert not y[1, 3:].any()
    garbage = x.clone()
    garbage[1, 3:] = float("nan")
    assert torch.equal(layer(garbage, padding_mask=padding), y)
    torch.testing.assert_close(y[1, :3], layer(x[1, :3]), **CLOSE)
    torch.testing.assert_close(layer(x, padding_mask=torch.zeros(2, 5, dtype=torch.bool)), layer(x), **CLOSE)


def test_a_batch_of_nothing_but_padding_is_zero_with_zero_gradients():
    layer, x = build(router=TopK(k=2)), torch.randn(2, 3, 8, requires_grad=True)
    y = layer(x, padding_mask=torch.ones(2, 3, dtype=torch.bool))
    y.sum().backward()
    assert not y.any()
    assert not x.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("policy", ["position", "probability"])
def test_dropping_by_position_never_looks_ahead(policy):
    """In training, under a tight capacity. By probability a later token may evict an earlier one."""
    layer = build(router=TopK(k=2), capacity=Capacity(0.75, policy)).train()
    x, unchanged = torch.randn(24, 8), []
    before = layer(x)
    for cut in range(1, 24):
        changed = x.clone()
        changed[cut:] = torch.randn(24 - cut, 8) * 3
        after = layer(changed)
        unchanged.append(torch.allclose(after[:cut], before[:cut], **CLOSE))
        assert not torch.allclose(after[cut:], before[cut:])
    assert all(unchanged) if policy == "position" else not all(unchanged)
