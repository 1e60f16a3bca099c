"""PEER: equal to a search over all experts and a loop over neurons; the monitor's numbers are those of all logits."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from equipoise.layer import Peer, ProductKeyExperts
from equipoise.monitor.key_usage import key_usage
from equipoise.monitor.recorder import Recorder, _router_sums
from equipoise.monitor.watch import watch
from equipoise.train.optim import decays
from equipoise.types import ProductDecision, RoutingDecision

D, B, S = 6, 2, 5
SMALL = Peer(num_experts=25, heads=3, k=4, key_dim=2)
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(config: Peer = SMALL, std: float = 0.7) -> ProductKeyExperts:
    layer = ProductKeyExperts(D, config).double()
    layer.init_weights(std, std)
    if layer.router.norm is not None:
        torch.nn.init.uniform_(layer.router.norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(layer.router.norm.bias)
    return layer


def all_scores(layer: ProductKeyExperts, x: torch.Tensor, head: int) -> torch.Tensor:
    """(N,): of every expert, one by one."""
    w, n = dict(layer.named_parameters()), layer.config.num_keys
    d = w["router.keys"].shape[2]
    query = w["router.query.weight"][head * 2 * d : (head + 1) * 2 * d] @ x
    if layer.config.query_norm:
        centred = query - query.mean()
        query = centred / (centred.square().mean() + 1e-5).sqrt() * w["router.norm.weight"] + w["router.norm.bias"]
    keys = w["router.keys"][2 * head : 2 * head + 2]
    return torch.stack([keys[0, e // n] @ query[:d] + keys[1, e % n] @ query[d:] for e in range(n * n)])


def naive(layer: ProductKeyExperts, x_TD: torch.Tensor) -> torch.Tensor:
    """Per token and head: the k best of all N scores, softmax over them, neuron by neuron."""
    rows = []
    for x in x_TD:
        y = 0 * x
        for head in range(layer.config.heads):
            scores = all_scores(layer, x, head)
            best = sorted(range(len(scores)), key=lambda e: -scores[e].item())[: layer.config.k]
            for weight, e in zip(scores[best].softmax(0), best, strict=True):
                y = y + weight * F.gelu(layer.down[e] @ x, approximate="tanh") * layer.up[e]
        rows.append(y)
    return torch.stack(rows)


VARIANTS = [SMALL, replace(SMALL, query_norm=False), replace(SMALL, heads=1, k=5), replace(SMALL, k=1, key_dim=None)]


@pytest.mark.parametrize("config", VARIANTS, ids=["plain", "no norm", "all sub-keys", "one expert"])
def test_the_layer_is_the_loop_forward_and_in_all_gradients(config):
    layer = make(config)
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(B * S, D, dtype=torch.float64)
    wanted = [x, *layer.parameters()]
    y, twin = layer(x).flatten(0, 1), naive(layer, x.flatten(0, 1))
    torch.testing.assert_close(y, twin, **EXACT)
    found = torch.autograd.grad((y * direction).sum(), wanted)
    expected = torch.autograd.grad((twin * direction).sum(), wanted, allow_unused=True)
    routed = config.k > 1  # of one expert the softmax is 1, whatever its score
    for actual, gradient in zip(found, expected, strict=True):
        gradient = torch.zeros_like(actual) if gradient is None else gradient
        torch.testing.assert_close(actual, gradient, **EXACT)
    keys = [name for name, _ in layer.named_parameters()].index("router.keys") + 1
    assert bool(found[keys].abs().max() > 1e-6) == routed


def test_padding_is_left_out_and_a_token_depends_on_itself_alone():
    layer = make()
    x, padding = torch.randn(B, S, D, dtype=torch.float64), torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 1, 1]]).bool()
    y = layer(x, padding_mask=padding)
    assert y[padding].count_nonzero() == 0
    for row in (~padding).nonzero().tolist():
        torch.testing.assert_close(y[tuple(row)], layer(x[tuple(row)][None])[0], **EXACT)
    assert layer(x[:0]).shape == (0, S, D)
    layer(x, padding_mask=torch.ones(B, S, dtype=torch.bool)).sum().backward()
    assert layer.up.grad.count_nonzero() == 0


def test_it_decides_in_fp32_under_autocast():
    layer = make().float()
    x = torch.randn(B, S, D)
    ids = layer.router(x.flatten(0, 1)).expert_ids_N
    with torch.autocast("cpu", torch.bfloat16):
        decision, y = layer.router(x.flatten(0, 1)), layer(x)
        y.sum().backward()
    assert torch.equal(decision.expert_ids_N, ids)
    assert (decision.weights_N.dtype, y.dtype, layer.down.grad.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(y, layer(x), rtol=0.05, atol=0.05)


def test_the_monitor_counts_each_neuron_and_knows_all_logits_from_the_two_parts():
    layer = make()
    x, padding = torch.randn(B, S, D, dtype=torch.float64), torch.rand(B, S) < 0.3
    recorder, seen = Recorder(layer), []
    plans = []
    layer.tap.register_forward_hook(lambda module, args, routed: seen.append(routed.decision))
    layer.tap.register_forward_hook(lambda module, args, routed: plans.append(routed.plan))
    layer(x, padding_mask=padding)
    with torch.no_grad():
        for row in x[:, :2]:  # small forwards, added together
            layer(row)
    sums = recorder.flush_sums()[""]
    real = torch.cat((x[~padding], x[:, :2].flatten(0, 1)))
    scores = torch.stack([all_scores(layer, row, head) for row in real for head in range(3)]).detach()
    expected = [0] * 25
    for row in scores.tolist():
        for e in sorted(range(25), key=lambda e: -row[e])[:4]:
            expected[e] += 1
    assert sums.counts_E.tolist() == expected
    assert sum(each.counts_e for each in plans).tolist() == expected
    assert not plans[0].drops
    probs = scores.softmax(-1)
    assert sums.num_tokens == len(scores) == 3 * len(real)
    np.testing.assert_allclose(sums.probs_sum_E, probs.sum(0).numpy(), rtol=1e-9)
    assert sums.token_entropy_sum == pytest.approx(float(torch.special.entr(probs).sum()))
    assert sums.logit_sum == pytest.approx(float(scores.sum()))
    assert sums.logit_sq_sum == pytest.approx(float(scores.square().sum()))
    assert sums.logsumexp_sum == pytest.approx(float(scores.logsumexp(-1).sum()))
    torch.testing.assert_close(torch.cat([each.logits_TE for each in seen]).detach(), scores, **EXACT)
    torch.testing.assert_close(torch.cat([each.probs_TE for each in seen]).detach(), probs, **EXACT)
    assert (seen[0].num_experts, seen[0].selection_TE.shape[1]) == (25, 25)


def test_statistics_of_many_experts_make_no_table_of_tokens_by_experts():
    """4096 experts, 2048 retrievals: the largest tensor that the recorder makes is far below 2048 x 4096."""
    rng = torch.Generator().manual_seed(1)
    T, n, k = 2048, 64, 8
    first, second = (torch.randn(T, n, generator=rng) for _ in range(2))
    decision = ProductDecision(
        torch.arange(T).repeat_interleave(k),
        torch.randint(0, n * n, (T * k,), generator=rng),
        torch.full((T * k,), 1 / k),
        first,
        second,
        k,
    )
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(each.numel() for each in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(each))
            return out

    with Sizes():
        probs_E, moments = _router_sums([decision])
    assert max(sizes) == T * n
    logits_TE = decision.logits_TE.double()
    dense = RoutingDecision(
        decision.token_ids_N, decision.expert_ids_N, decision.weights_N, logits_TE.softmax(-1), logits_TE, logits_TE
    )
    expected_E, expected = _router_sums([dense])
    torch.testing.assert_close(probs_E.double(), expected_E, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.stack(moments).double(), torch.stack(expected), rtol=1e-5, atol=0.01)


def test_pairs_are_not_counted_of_so_many():
    layers = torch.nn.ModuleDict({"many": make(replace(SMALL, num_experts=33**2)), "few": make()})
    watching = watch(layers, every=1)
    watching.co_select(8)
    for layer in layers.values():
        layer(torch.randn(1, S, D, dtype=torch.float64))
    watching.flush(1)
    (pairs,) = watching.co_selection()
    assert (pairs.layer, pairs.num_tokens, pairs.counts_EE.trace()) == ("few", 8, 8 * SMALL.k)
    assert {stats.layer for stats in watching.stats()} == {"many", "few"}


def test_key_usage_worked_out_by_hand():
    layer = make(replace(SMALL, num_experts=4, k=1, heads=1))
    recorder = Recorder(layer)
    layer(torch.randn(1, 40, D, dtype=torch.float64))
    (stats,) = recorder.flush(1)
    stats = replace(stats, counts_E=np.array([30, 10, 0, 0]))
    usage = key_usage(stats)
    # shares 3/4 and 1/4 of four: KL = 3/4 ln 3 + 1/4 ln 1; the second sub-key of the first half is never used
    assert usage.used == 0.5
    assert usage.unevenness == pytest.approx(0.75 * math.log(3))
    assert usage.unevenness == pytest.approx(math.log(4) * (1 - stats_entropy(stats.counts_E)))
    assert (usage.used_first, usage.used_second) == (0.5, 1.0)
    assert usage.used_by_chance == pytest.approx(1 - 0.75**40)
    assert usage.unevenness_by_chance == pytest.approx(3 / 80, rel=0.05)
    for counts in ([1, 2, 3], [0, 0, 0, 0]):
        with pytest.raises(ValueError, match="stats: expected assignments in a layer of n x n experts, got"):
            key_usage(replace(stats, counts_E=np.array(counts)))


def stats_entropy(counts: np.ndarray) -> float:
    """H(f) / ln E, as `RoutingStats.load_entropy` is."""
    shares = [count / counts.sum() for count in counts.tolist() if count]
    return -sum(share * math.log(share) for share in shares) / math.log(len(counts))


def test_chance_alone_leaves_about_so_many_keys_unused():
    layer = make(replace(SMALL, num_experts=400))
    recorder = Recorder(layer)
    layer(torch.randn(1, S, D, dtype=torch.float64))
    (stats,) = recorder.flush(1)
    drawn = np.bincount(np.random.default_rng(0).integers(0, 400, 800), minlength=400)
    usage = key_usage(replace(stats, counts_E=drawn))
    assert usage.used == pytest.approx(usage.used_by_chance, abs=0.05)
    assert usage.unevenness == pytest.approx(usage.unevenness_by_chance, rel=0.05)
    many = key_usage(replace(stats, counts_E=np.full(400, 10_000)))
    assert many.unevenness_by_chance == pytest.approx(399 / 8_000_000, rel=0.001)
    assert many.unevenness == pytest.approx(0)


def test_flops_and_parameters_are_what_torch_counts():
    def of_bag(weight, ids, *rest, out_val=None, **options):
        return 2 * ids[0] * weight[1]

    bags = {torch.ops.aten._embedding_bag: of_bag, torch.ops.aten._embedding_bag_forward_only: of_bag}
    for config in VARIANTS:
        layer = make(config)
        with FlopCounterMode(display=False, custom_mapping=bags) as counter, torch.no_grad():
            layer(torch.randn(B * S, D, dtype=torch.float64))
        assert counter.get_total_flops() == B * S * config.flops(D)
        assert sum(parameter.numel() for parameter in layer.parameters()) == config.parameters(D)
        idle = 2 * D * (config.num_experts - config.heads * config.k)
        assert config.parameters(D) - config.active_parameters(D) == idle


def test_weight_decay_is_for_neurons_and_not_for_keys():
    decayed = [name for name, each in make().named_parameters() if decays(f"layers.0.mlp.{name}", each)]
    assert decayed == ["down", "up"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 24}, "Peer.num_experts: expected a square, for two sets of sub-keys, got 24. Take 16 or 25"),
        ({"k": 6}, "Peer.k: expected at most the square root of num_experts, 5, got 6. The k best"),
        ({"heads": 0}, "Peer.heads: expected at least 1, got 0"),
        ({"key_dim": 0}, "Peer.key_dim: expected at least 1, or None for half of dim, got 0"),
    ],
)
def test_wrong_numbers_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(SMALL, **fields)
