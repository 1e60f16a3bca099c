"""The defects of a widely read listing, executed: its losses, its data and its monitors, beside ours.

The other half of `test_seed_defects.py`. B-numbers are those of `listing.py`. Not executed: B40 (an argument that is
not used), B22 and B25 to B28 (cost and choices of its demonstration).
"""

import math

import numpy as np
import pytest
import torch
from tests.differential import listing
from tests.differential.harness import forward_and_see, loss_of, of_logits
from torch import Tensor, nn

from equipoise import watch
from equipoise.layer import MoE
from equipoise.models.decoder import cross_entropy_sum
from equipoise.monitor.detectors import CollapseDetector
from equipoise.monitor.stats import marginal_entropy
from equipoise.routing import ImportanceLoss, SwitchLoss, ZLoss
from equipoise.train.data import eval_batches
from equipoise.train.tokens import TokenStream
from equipoise.types import RoutingStats

E, K = 8, 2


def window(layer: MoE, x: Tensor) -> RoutingStats:
    """What the monitor says about one batch in eval."""
    with watch(layer, every=1) as watching:
        layer.eval()(x)
        watching.step(1)
        return watching.stats()[0]


def findings(stats: RoutingStats) -> list[str]:
    return [finding.rule for finding in CollapseDetector()([stats])]


# ------------------------------------------------------------------------------------------------- losses and data


def test_a_variation_of_counts_is_no_loss_and_at_collapse_it_is_not_zero():
    """It has no gradient. "0.0 because all tokens went to expert 0" is impossible: it is sqrt(E) then (see below).

    The Switch loss is E then, and has one. A value of 0 means that nobody is connected.
    """
    x = torch.randn(64, E, requires_grad=True)
    assert not listing.variation_loss(x.topk(K).indices, E).requires_grad
    layer = of_logits(E, k=K, balance=(SwitchLoss(),))
    loss_of(layer, x)
    assert x.grad.any()
    assert listing.variation_loss(torch.zeros(64, 1, dtype=torch.int64), E).item() == pytest.approx(math.sqrt(E))


@pytest.mark.parametrize("num_experts", [2, 8, 64])
def test_switch_loss_of_full_collapse_is_the_number_of_experts(num_experts):
    logits = torch.zeros(32, num_experts)
    logits[:, 0] = 50.0
    assert loss_of(of_logits(num_experts, balance=(SwitchLoss(),)), logits).item() == pytest.approx(num_experts)


def test_the_variance_over_experts_is_the_biased_one():
    """torch's default divides by E - 1, which makes CV^2 larger by E / (E - 1)."""
    x = torch.randn(64, E)
    layer = of_logits(E, k=K, balance=(ImportanceLoss(),))
    loss, (_, routed) = loss_of(layer, x).item(), forward_and_see(layer, x)
    weights = routed.decision.weights_N.detach()
    importance = torch.zeros(E).index_add(0, routed.decision.expert_ids_N, weights)
    assert (importance.var() / importance.mean() ** 2).item() == pytest.approx(loss * E / (E - 1), rel=1e-5)
    ids = routed.decision.expert_ids_N.view(-1, K)
    counts = np.bincount(ids.flatten(), minlength=E)
    inflated = listing.variation_loss(ids, E).item() ** 2
    assert inflated == pytest.approx(counts.var() / counts.mean() ** 2 * E / (E - 1), rel=1e-5)


def test_z_loss_does_not_grow_with_the_batch():
    """Without 1/T a coefficient is right for one number of tokens only: 1e-3 for a mean is 1e-9 for a million."""
    x = torch.randn(1, 50, E)
    means = [loss_of(of_logits(E, balance=(ZLoss(),)), batch).item() for batch in (x, x.repeat(2, 1, 1))]
    assert means[0] == pytest.approx(means[1])
    sums = [listing.summed_z_loss(batch[0]).item() for batch in (x, x.repeat(1, 2, 1))]
    assert sums == pytest.approx([50 * means[0], 100 * means[0]])


def test_b23_filling_is_not_a_target():
    """Eight texts of 5 tokens, filled up to 9: the specimen learns the filling, here half of all it learns."""
    logits, labels = torch.randn(8, 9, 20, requires_grad=True), torch.randint(20, (8, 9))
    labels[:, 5:] = 0
    listing.next_token_loss(logits, labels).backward()
    assert logits.grad[:, 4:8].any()
    logits.grad = None
    targets = labels[:, 1:].masked_fill(torch.arange(1, 9) >= 5, -100)
    total, count = cross_entropy_sum(logits[:, :-1], targets)
    total.backward()
    assert count.item() == 8 * 4
    assert not logits.grad[:, 4:].any()


def test_b24_every_token_but_the_first_is_a_target():
    """33 tokens in windows of 8. The specimen's chunks share no token, so their first ones are nobody's target.

    And of 32 tokens it loses the last chunk, although it is full.
    """
    assert len(listing.chunks(list(range(32)), 8)) == 3
    assert sum(len(chunk) - 1 for chunk in listing.chunks(list(range(33)), 8)) == 28
    tokens, end, domain = np.arange(33, dtype=np.uint16), np.array([33]), np.array([0])
    stream = TokenStream(tokens, end, domain, ("text",), num_bytes_D=end, fingerprint="none")
    batches = list(eval_batches(stream, 2, 8))
    assert torch.cat([batch.targets_BS.flatten() for batch in batches]).tolist() == list(range(1, 33))


# ------------------------------------------------------------------------------------------------------ the monitor


def test_b37_second_choices_count():
    """Token t takes expert t first and expert 4 + t second: even. The argmax sees experts 4 to 7 dead.

    Then the other way round: first choices even, second choices all expert 0. The argmax sees nothing.
    """
    eye = torch.eye(E)
    even = (2 * eye[torch.arange(2048) % 4] + eye[4 + torch.arange(2048) % 4]) * 3
    assert listing.utilisation_alarm(even.softmax(-1), E)[1] == [4, 5, 6, 7]
    stats = window(of_logits(E, k=K), even)
    assert stats.counts_E.tolist() == [512] * E
    assert findings(stats) == []

    hidden = (2 * eye[torch.arange(2048) % E] + 1.5 * eye[0]) * 3
    assert listing.utilisation_alarm(hidden.softmax(-1), E)[1] == []
    stats = window(of_logits(E, k=K), hidden)
    assert stats.max_token_share == 1.0
    assert findings(stats) == ["collapse"]


def test_b38_nine_tenths_of_the_probability_is_all_of_the_load():
    """For p = (.9, .1/7, ...) the listing's comment promises a utilisation of [.9, .014, ...]; it is [1, 0, ...]."""
    p = torch.full((1, 2000, E), 0.1 / 7)
    p[..., 0] = 0.9
    assert listing.utilisation_alarm(p, E)[0].tolist() == [1.0] + [0.0] * 7
    stats = window(of_logits(E), p.log())
    assert stats.counts_E.tolist() == [2000] + [0] * 7
    assert stats.max_violation == pytest.approx(E - 1)


def test_b39_an_absolute_5_percent_fires_on_every_healthy_expert():
    """64 experts with exactly their fair share of 1/64 = 1.6 % each. Ours compares with the fair share."""
    x = 5 * torch.eye(64).repeat(128, 1)
    assert listing.utilisation_alarm(x.softmax(-1), 64)[1] == list(range(64))
    stats = window(of_logits(64), x)
    assert (stats.max_violation, stats.dead_experts) == (0.0, ())
    assert findings(stats) == []


def test_b39_twenty_tokens_prove_nothing():
    """A fair expert of 8 is below 5 % of 20 tokens with (7/8)^20 = 6.9 %, so some expert is in 47 % of the windows."""
    ids = torch.randint(E, (400, 20), generator=torch.Generator().manual_seed(1))
    windows = 5 * nn.functional.one_hot(ids, E).float()
    alarms = sum(bool(listing.utilisation_alarm(x.softmax(-1), E)[1]) for x in windows)
    some_empty = sum((-1) ** (i + 1) * math.comb(E, i) * (1 - i / E) ** 20 for i in range(1, E))
    assert alarms / 400 == pytest.approx(some_empty, abs=4 * math.sqrt(some_empty * (1 - some_empty) / 400))
    layer = of_logits(E)
    assert all(findings(window(layer, x)) == [] for x in windows[:20])


def test_b45_probability_mass_is_not_load():
    """p = (.13, .1243 x 7) for every token: all go to expert 0, which has 1.04 fair shares of the mass.

    The mass check sees no hot and no cold expert, and the Switch loss, made of that mass too, says 1.04. Exact counts
    see expert 0 at 8 times its fair share.
    """
    p = torch.full((2000, E), 0.87 / 7)
    p[:, 0] = 0.13
    health = listing.soft_mass_health(p, E)
    assert (health["hot"], health["cold"]) == (0, 0)
    assert loss_of(of_logits(E, balance=(SwitchLoss(),)), p.log()).item() == pytest.approx(1.04)
    stats = window(of_logits(E), p.log())
    assert stats.max_violation == pytest.approx(7.0)
    assert findings(stats) == ["collapse", "dead_experts"]


def test_b44_b46_shapes_and_k():
    """B44: given (B, S, E) it sums over B and finds more hot experts than there are. Ours refuses.

    B46: given exact counts of k = 2, every expert of a perfectly even layer has twice the load it allows for.
    """
    p = torch.eye(E).repeat(2, 2, 1)  # (2, 16, 8)
    assert listing.soft_mass_health(p, E)["hot"] > E
    with pytest.raises(ValueError, match=r"expected shape \(T, E\), got \(2, 16, 8\)"):
        marginal_entropy(p)
    eye = torch.eye(E).repeat(256, 1)
    assert listing.soft_mass_health(eye + eye.roll(1, 1), E)["hot"] == E
    stats = window(of_logits(E, k=2), 3 * eye + eye.roll(1, 1))
    assert stats.max_violation == 0.0
    assert findings(stats) == []


def test_a_histogram_of_probabilities_is_not_one_of_experts():
    """Offered as triage: torch.histogram(router_weights, bins=8), "collapse" if a bin has over 50 %.

    It bins values, not experts: 7 of 8 probabilities of a decided router are near 0, and the healthiest alarms.
    """
    x = 9 * torch.eye(E).repeat(200, 1)
    assert torch.histogram(x.softmax(-1), bins=8).hist.max() / x.numel() == 7 / 8
    assert findings(window(of_logits(E), x)) == []
