"""One small batch worked through every formula: T = 4 tokens, E = 4 experts, k = 2.

Logits z below; the two largest of each row give the ids [0 1] [0 1] [0 1] [1 2], so the counts are [3, 4, 1, 0].
The numbers were computed apart from this package, from the formulas of the papers named in `routing`.
"""

import pytest
import torch

from equipoise.routing import ImportanceLoss, LoadLoss, SwitchLoss, TopK, ZLoss
from equipoise.routing.balancers import bias_step, quantile_bias, quantile_thresholds, smooth_step
from equipoise.routing.losses import LossInputs, coefficient_of_variation_squared

Z = torch.tensor([[2, 1, 0, -1], [1.5, 1.4, -0.5, 0.2], [3, 0.5, 0.4, 0.3], [0, 2, 1, -2]])
COUNTS = torch.tensor([3, 4, 1, 0])
EXACT = {"rtol": 0, "atol": 1.5e-6}  # the golden numbers have six decimals


def decide(config: TopK, z: torch.Tensor = Z):
    """The decision for logits z: a router whose weight is the identity, in eval."""
    router = config.build(4, 4).eval()
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    return router(z)


def loss_value(loss, config: TopK = TopK(k=2)) -> float:  # noqa: B008 - frozen
    return loss(LossInputs(decide(config), torch.zeros(4, dtype=torch.int64), 1, 2)).item()


def close(actual: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(actual.detach(), torch.tensor(expected), **EXACT)


@pytest.mark.parametrize(
    "config",
    [TopK(k=2), TopK(k=2, order="post"), TopK(k=2, score="sigmoid"), TopK(k=2, score="sqrtsoftplus")],
    ids=["softmax", "post", "sigmoid", "sqrtsoftplus"],
)
def test_ids_and_counts(config):
    ids = decide(config).expert_ids_N
    assert ids.view(4, 2).tolist() == [[0, 1], [0, 1], [0, 1], [1, 2]]
    assert torch.bincount(ids, minlength=4).tolist() == COUNTS.tolist()


def test_softmax_rows():
    rows = [
        [0.643914, 0.236883, 0.087144, 0.032059],
        [0.432394, 0.391246, 0.058518, 0.117841],
        [0.817285, 0.067087, 0.060703, 0.054926],
        [0.088947, 0.657233, 0.241783, 0.012038],
    ]
    decision = decide(TopK(k=2, renormalize=False))
    close(decision.probs_TE, rows)
    # raw weights are the rows' own numbers
    close(decision.weights_N.view(4, 2), [rows[0][:2], rows[1][:2], rows[2][:2], rows[3][1:3]])


RENORMALISED = [[0.731059, 0.268941], [0.524979, 0.475021], [0.924142, 0.075858], [0.731059, 0.268941]]


@pytest.mark.parametrize("config", [TopK(k=2), TopK(k=2, order="post")], ids=["pre", "post"])
def test_renormalised_weights_equal_softmax_after_selection(config):
    close(decide(config).weights_N.view(4, 2), RENORMALISED)


def test_sigmoid_normalised_weights_and_scale():
    expected = [[0.546449, 0.453551], [0.504751, 0.495249], [0.604796, 0.395204], [0.546449, 0.453551]]
    close(decide(TopK(k=2, score="sigmoid")).weights_N.view(4, 2), expected)
    scaled = decide(TopK(k=2, score="sigmoid", scale=2.5)).weights_N.view(4, 2)
    torch.testing.assert_close(scaled / 2.5, torch.tensor(expected), **EXACT)


def test_mean_probabilities():
    close(decide(TopK(k=2)).probs_TE.mean(0), [0.495635, 0.338112, 0.112037, 0.054216])


@pytest.mark.parametrize("scope", ["micro", "sequence", "global"])
def test_switch_loss_is_k_normalised(scope):
    # 4 * (3/8 * .495635 + 4/8 * .338112 + 1/8 * .112037) = 1.475695; unnormalised code bases say 2.951391
    assert loss_value(SwitchLoss(scope=scope)) == pytest.approx(1.475695, abs=1.5e-6)


def test_sequence_loss_of_sigmoid_scores_normalises_each_row():
    assert loss_value(SwitchLoss(scope="sequence"), TopK(k=2, score="sigmoid")) == pytest.approx(1.20774, abs=1e-5)


def test_z_loss_is_a_mean_over_tokens():
    assert loss_value(ZLoss()) == pytest.approx(6.882267, abs=1e-5)  # the sum would be 27.53


def test_importance_is_the_biased_cv():
    importance = torch.zeros(4).index_add(0, decide(TopK(k=2)).expert_ids_N, decide(TopK(k=2)).weights_N.detach())
    close(importance, [2.18018, 1.550879, 0.268941, 0.0])
    assert loss_value(ImportanceLoss()) == pytest.approx(0.807685, abs=1e-5)  # 1.076913 with the unbiased variance


def test_switch_loss_gradient():
    z = Z.clone().requires_grad_()
    SwitchLoss()(LossInputs(decide(TopK(k=2), z), torch.zeros(4, dtype=torch.int64), 1, 2)).backward()
    close(z.grad[0], [0.002703, 0.030605, -0.02142, -0.011887])


def test_load_loss_by_hand():
    # z - threshold, with the best left out (0, .2, .4, 0) for selected experts and the last selected (1, 1.4, .5, 1)
    # for the others:
    margins = torch.tensor([[2, 1, -1, -2], [1.3, 1.2, -1.9, -1.2], [2.6, 0.1, -0.1, -0.2], [-1, 2, 1, -3]])
    load = 0.5 * (1 + torch.erf(margins / 0.5 / 2**0.5)).sum(0)
    expected = coefficient_of_variation_squared(load).item()
    assert loss_value(LoadLoss(noise_std=0.5)) == pytest.approx(expected, rel=1e-5)


def test_sign_bias():
    # mean load 2: [3, 4, 1, 0] is over, over, under, under; the steps already sum to 0
    close(bias_step(COUNTS, 1e-3, "sign"), [-0.001, -0.001, 0.001, 0.001])


def test_proportional_bias():
    close(bias_step(COUNTS, 1e-3, "proportional") * 1e3, [-0.5, -1.0, 0.5, 1.0])  # (2 - c) / 2


def test_smooth_bias():
    # 1e-3 * (1 - .5) * tanh(2 v), v = [-.5, -1, .5, 1]: tanh 1 = .761594, tanh 2 = .964028
    step, momentum = smooth_step(COUNTS, torch.zeros(4), 1e-3)
    close(step * 1e3, [-0.380797, -0.482014, 0.380797, 0.482014])
    assert torch.equal(step, momentum)
    again, _ = smooth_step(COUNTS, momentum, 1e-3)
    torch.testing.assert_close(again, 1.5 * step)  # half of the old momentum and half of the same step


def test_quantile_balancing():
    scores = Z.sigmoid()
    close(quantile_thresholds(scores, torch.zeros(4), 2)[:, 0], [0.5, 0.549834, 0.598688, 0.5])
    bias = quantile_bias(scores, torch.zeros(4), 2)
    cutoffs = torch.tensor([0.26774, 0.231059, 0.0, -0.231059])  # the third largest margin of each expert
    close(bias, (cutoffs.mean() - cutoffs).tolist())
    close(bias, [-0.200805, -0.164123, 0.066935, 0.297994])
    counts = torch.bincount((scores + bias).topk(2).indices.flatten(), minlength=4).tolist()
    assert counts in ([2, 2, 2, 2], [2, 3, 1, 2])  # the second slot of token 0 is an exact tie of three
