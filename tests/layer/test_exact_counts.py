"""Each real token is counted once: under recomputation, accumulation, padding, eval, autocast and compilation."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from equipoise.layer import Capacity, MoE, reduce_and_update
from equipoise.ops.count import accumulate_counts
from equipoise.routing import BiasBalance, QuantileBalance, SwitchLoss, TopK

# PyTorch's own deprecations inside its compiler: it makes an instance of each Function, and scripts a method.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]

B, S, D, E, K = 4, 6, 8, 4, 2


class Counted:
    """A layer under a balancer, with an observer at its tap."""

    def __init__(self, balance=BiasBalance(), capacity=None) -> None:  # noqa: B008 - frozen
        self.layer = MoE(D, 8, E, router=TopK(k=K), balance=(balance, SwitchLoss()), capacity=capacity)
        self.layer.init_weights(0.5, 0.5)
        self.seen_E = torch.zeros(E, dtype=torch.int64)
        self.layer.tap.register_forward_hook(self._count)

    def _count(self, module, args, routed):
        accumulate_counts(self.seen_E, routed.decision.expert_ids_N)


def expected_counts(layer: MoE, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
    """From the logits, apart from the layer's own forward."""
    real = x.reshape(-1, D) if padding is None else x[~padding]
    logits = real @ layer.router.weight.detach().float().t()
    return torch.bincount(logits.topk(K).indices.flatten(), minlength=E)


def plain(layer, x):
    layer(x).square().sum().backward()


def without_reentry(layer, x):
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()


def with_reentry(layer, x):
    checkpoint(layer, x, use_reentrant=True).square().sum().backward()


def checkpoint_in_checkpoint(layer, x):
    def outer(x):
        return checkpoint(layer, x.sin().asin(), use_reentrant=False)

    checkpoint(outer, x.clamp(-1, 1), use_reentrant=False).square().sum().backward()


def in_micro_batches(layer, x):
    for part in x.split(1):
        layer(part).square().sum().backward()


def under_autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()


def compiled(layer, x):
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()


def compiled_with_checkpoint(layer, x):
    def run(x):
        return checkpoint(layer, x, use_reentrant=False)

    torch.compile(run, fullgraph=True, backend="aot_eager")(x).square().sum().backward()


WAYS = [
    plain,
    without_reentry,
    with_reentry,
    checkpoint_in_checkpoint,
    in_micro_batches,
    under_autocast,
    compiled,
    compiled_with_checkpoint,
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("capacity", [None, Capacity(0.5)], ids=["dropless", "capacity"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_training_counts_each_token_once(way, capacity):
    """Observer and balancer alike, before drops, as int64."""
    counted, x = Counted(capacity=capacity), torch.rand(B, S, D).requires_grad_()
    expected = expected_counts(counted.layer, x.detach())
    assert expected.sum().item() == B * S * K
    way(counted.layer, x)
    assert torch.equal(counted.seen_E, expected)
    assert torch.equal(counted.layer.balancer.pending, expected)
    assert counted.layer.balancer.pending.dtype == torch.int64


@pytest.mark.parametrize(
    "way", [plain, without_reentry, with_reentry, in_micro_batches, compiled], ids=lambda w: w.__name__
)
def test_quantile_balancing_takes_each_token_once(way):
    counted, x = Counted(QuantileBalance()), torch.rand(B, S, D).requires_grad_()
    way(counted.layer, x)
    assert counted.layer.balancer.pending.sum(1).tolist() == [B * S] * E


@pytest.mark.slow
def test_inductor_counts_each_token_once():
    counted, x = Counted(), torch.rand(B, S, D).requires_grad_()
    torch.compile(counted.layer, fullgraph=True)(x).square().sum().backward()
    assert torch.equal(counted.seen_E, expected_counts(counted.layer, x.detach()))
    assert torch.equal(counted.layer.balancer.pending, counted.seen_E)


def test_padding_is_never_counted():
    counted, x = Counted(), torch.rand(B, S, D)
    padding = torch.arange(S) >= torch.tensor([6, 1, 0, 4])[:, None]  # one sequence is nothing but padding
    counted.layer(x, padding_mask=padding)
    assert counted.seen_E.sum().item() == 11 * K
    assert torch.equal(counted.seen_E, expected_counts(counted.layer, x, padding))
    assert torch.equal(counted.layer.balancer.pending, counted.seen_E)


@pytest.mark.parametrize("balance", [BiasBalance(), QuantileBalance()], ids=repr)
@pytest.mark.parametrize("grad", [True, False])
def test_eval_is_counted_by_observers_but_never_by_balancers(balance, grad):
    counted, x = Counted(balance), torch.rand(B, S, D)
    with torch.set_grad_enabled(grad):
        counted.layer.eval()(x)
    assert torch.equal(counted.seen_E, expected_counts(counted.layer, x))
    assert not counted.layer.balancer.pending.any()
    reduce_and_update([counted.layer])
    assert not counted.layer.balancer.bias_E.any()


def test_update_takes_all_micro_batches_sums_over_ranks_and_starts_anew():
    counted, x = Counted(), torch.rand(B, S, D)
    in_micro_batches(counted.layer, x)
    other_rank = torch.tensor([0, 100, 0, 0])
    total = expected_counts(counted.layer, x) + other_rank
    reduce_and_update([counted.layer, MoE(D, 8, E)], reduce=lambda pending: pending.add_(other_rank))
    step = 1e-3 * (total.double().mean() - total).sign().float()
    torch.testing.assert_close(counted.layer.balancer.bias_E, step - step.mean())
    assert not counted.layer.balancer.pending.any()


def test_accumulating_gradients_moves_the_bias_as_the_whole_batch_does():
    """The sign of the sum, not the sum of signs."""
    whole, split = Counted(), Counted()
    split.layer.load_state_dict(whole.layer.state_dict())
    x = torch.rand(B, S, D)
    plain(whole.layer, x)
    in_micro_batches(split.layer, x)
    reduce_and_update([whole.layer, split.layer])
    assert torch.equal(whole.layer.balancer.bias_E, split.layer.balancer.bias_E)
    assert whole.layer.balancer.bias_E.any()
