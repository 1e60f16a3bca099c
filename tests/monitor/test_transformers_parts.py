"""What the adapter for transformers is made of, on modules that transformers has not: routers, experts, masks."""

import math

import pytest
import torch
from tests.monitor.transformers_models import entropy, probabilities
from torch import nn

from equipoise.monitor.adapters.padding import real_tokens
from equipoise.monitor.adapters.transformers_moe import interpret
from equipoise.monitor.recorder import Recorder, observable_layers
from equipoise.monitor.watch import watch

# ------------------------------------------------------------------------------- models that transformers has not


class Experts(nn.Module):
    def __init__(self, num_experts=4, declared=True):
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_experts, 6, 6))
        if declared:
            self.num_experts = num_experts

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return torch.einsum("td,tkdf,tk->tf", hidden_states, self.up[top_k_index], top_k_weights)


class Router(nn.Module):
    """Top-2 of 4 with any scores; returns what it is told to."""

    def __init__(self, scores, returns):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.scores, self.returns = scores, returns

    def forward(self, x):
        logits = x @ self.weight.T
        scores = self.scores(logits)
        weights, ids = scores.topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        what = {"logits": logits, "probs": scores, "wide": torch.cat([logits, logits], -1), "nothing": None}
        return what[self.returns], weights, ids


class Block(nn.Module):
    def __init__(self, scores=lambda z: z.softmax(-1), returns="logits", **options):
        super().__init__()
        torch.manual_seed(4)
        self.router, self.experts = Router(scores, returns), Experts(**options)

    def forward(self, x):
        _, weights, ids = self.router(x)
        return self.experts(x, top_k_weights=weights, top_k_index=ids)


def watched(block, x=None):
    recorder = Recorder(block)
    block(torch.randn(40, 6, generator=torch.Generator().manual_seed(5)) if x is None else x)
    [stats] = recorder.flush(1)
    assert (stats.num_tokens, stats.counts_E.sum()) == (40, 80)
    return stats


def test_a_router_that_returns_logits_of_softmax_or_sigmoid():
    known, sigmoid = watched(Block()), watched(Block(torch.sigmoid))
    assert known.logit_std == sigmoid.logit_std > 0
    assert 0 < known.token_entropy < sigmoid.token_entropy < 1
    assert known.counts_E.tolist() == sigmoid.counts_E.tolist()


def test_a_router_with_scores_unlike_any_has_no_probabilities():
    known, odd = watched(Block()), watched(Block(lambda z: nn.functional.softplus(z).sqrt()))
    assert math.isnan(odd.token_entropy)
    assert math.isnan(odd.mutual_information)
    assert odd.logit_std == known.logit_std
    assert odd.counts_E.tolist() == known.counts_E.tolist()


def test_a_router_that_returns_probabilities_has_no_logits():
    known, probs = watched(Block()), watched(Block(returns="probs"))
    assert probs.token_entropy == pytest.approx(known.token_entropy)
    assert probs.counts_E.tolist() == known.counts_E.tolist()
    assert all(math.isnan(value) for value in (probs.logit_mean, probs.logit_std, probs.logit_logsumexp))


@pytest.mark.parametrize("returns", ["wide", "nothing"])
def test_a_router_that_cannot_be_read_is_counted(returns):
    known, unread = watched(Block()), watched(Block(returns=returns))
    assert unread.counts_E.tolist() == known.counts_E.tolist()
    assert unread.load_entropy == known.load_entropy
    assert all(math.isnan(value) for value in (unread.token_entropy, unread.logit_mean, unread.logit_std))


def test_experts_without_a_router_are_counted():
    experts = Experts()
    recorder = Recorder(experts)
    experts(torch.randn(2, 6), torch.tensor([[0, 2], [2, 1]]), torch.full((2, 2), 0.5))
    [stats] = recorder.flush(1)
    assert (stats.layer, stats.counts_E.tolist()) == ("", [1, 1, 2, 0])


def test_the_verdict_on_scores_outlasts_tokens_that_cannot_tell():
    """Weights of two equal logits are 1/2 under softmax and sigmoid; only what came before tells which it is."""
    block = Block(torch.sigmoid)
    recorder = Recorder(block)
    block(torch.randn(40, 6))
    recorder.flush(1)
    with torch.no_grad():
        block.router.weight[:2], block.router.weight[2:] = 0.1, -0.1
    block(torch.ones(1, 6))  # logits 0.6, 0.6, -0.6, -0.6
    [stats] = recorder.flush(2)
    expected = entropy(probabilities([0.6, 0.6, -0.6, -0.6], "sigmoid")) / math.log(4)
    assert stats.token_entropy == pytest.approx(expected, rel=1e-5)


def test_one_token_with_one_expert_tells_nothing_about_scores():
    misfits, logits = torch.zeros(3, dtype=torch.float64), torch.tensor([[1.0, -2.0], [0.5, 2.5]])
    ids, weights = logits.argmax(-1, keepdim=True), logits.sigmoid().amax(-1, keepdim=True) * 2.5
    assert interpret(logits[:1], ids[:1], weights[:1], misfits)[1].isnan().all()
    expected = [probabilities(row, "sigmoid") for row in logits.tolist()]
    assert torch.allclose(interpret(logits, ids, weights, misfits)[1], torch.tensor(expected))
    assert interpret(logits, ids, torch.ones(2, 1), torch.zeros(3, dtype=torch.float64))[1].isnan().all()


def test_the_number_of_experts_is_of_their_weights():
    layers = observable_layers(Block(num_experts=4, declared=False))
    assert [layer.num_experts for layer in layers.values()] == [4]


def test_experts_of_unknown_number():
    class Unknown(nn.Module):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states

    with pytest.raises(ValueError, match=r"mlp: expected Unknown to have num_experts or stacked weights .*; set num"):
        Recorder(nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Unknown()})}))


def test_experts_that_are_spread_over_ranks():
    block = Block()
    block.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match=r"expected all experts of the layer on this rank.* watch the model without"):
        Recorder(block)


@pytest.mark.parametrize(
    ("ids", "weights", "got"),
    [
        (torch.ones(2, 2), torch.ones(2, 2), r"\(torch.float32, \(2, 2\)\) and \(torch.float32, \(2, 2\)\)"),
        (torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 2), r"\(torch.int64, \(2, 4\)\) and .*\(2, 2\)\)"),
        (None, None, "None and None"),
    ],
)
def test_indices_that_are_none(ids, weights, got):
    message = rf"expected integer top_k_index and top_k_weights of one shape \(T, K\), got {got}; experts that"
    experts = Experts()
    with watch(experts), pytest.raises(ValueError, match=message):
        experts(torch.randn(2, 6), ids, weights)


class Decoder(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.mlp, self.first = Block(), first

    def forward(self, inputs_embeds, attention_mask=None):
        return self.mlp(inputs_embeds[:, self.first :].reshape(-1, 6)) * (1 // self.first)


def test_a_mask_that_cannot_be_matched_with_the_tokens():
    model = Decoder(first=1)  # one token of each sequence goes another way
    message = r"mlp: expected top_k_index for the 2 x 5 = 10 tokens of the attention_mask, got \(8, 2\)"
    with watch(model), pytest.raises(ValueError, match=message):
        model(torch.randn(2, 5, 6), torch.ones(2, 5))


def test_a_mask_ends_with_its_forward_also_with_one_that_fails():
    model, x = Decoder(first=0), torch.randn(2, 5, 6)
    recorder = Recorder(model)
    with pytest.raises(ZeroDivisionError):
        model(x, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]))
    model.mlp(x[0])  # by itself
    assert recorder.flush(1)[0].num_tokens == 3 + 4 + 5


def test_nothing_to_watch():
    with pytest.raises(ValueError, match=r"found none in Linear; build its experts with equipoise.MoE, or as those of"):
        watch(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------------ the masks


class Cache:
    """One that is longer than what it holds."""

    def __init__(self, held):
        self.held = held

    def get_seq_length(self):
        return self.held


NO, OK = float("-inf"), 0.0
MASKS = {  # mask, cache, which of the 2 new tokens of 1 sequence are real
    "of the new tokens": ([[0, 1]], None, [0, 1]),
    "bool": ([[False, True]], None, [0, 1]),
    "float": ([[0.0, 1.0]], None, [0, 1]),
    "with what is cached": ([[0, 0, 1, 0]], None, [1, 0]),
    "of a static cache": ([[1, 0, 1, 0, 0]], Cache(1), [0, 1]),
    "of a static cache, on the device": ([[1, 0, 1, 0, 0]], Cache(torch.tensor(1)), [0, 1]),
    "of a sliding window": ([[0, 1, 1, 0]], Cache(9), [1, 0]),
    "causal": ([[[[False, False], [False, True]]]], None, [0, 1]),
    "causal, padding at the right": ([[[[True, False], [True, False]]]], None, [1, 0]),
    "causal, added": ([[[[OK, NO], [OK, OK]]]], None, [1, 1]),
    "causal, with what is cached": ([[[[OK, NO, NO, NO], [OK, NO, OK, NO]]]], Cache(1), [0, 1]),
    "by kind": ({"sliding": [[[[OK, NO], [NO, NO]]]], "full_attention": [[[[NO, NO], [NO, OK]]]]}, None, [0, 1]),
    "by kind, one plain": ({"full_attention": [[[[NO, NO], [NO, OK]]]], "conv": [[1, 0]]}, None, [1, 0]),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    mask, cache, expected = MASKS[name]
    as_tensors = {k: torch.tensor(v) for k, v in mask.items()} if isinstance(mask, dict) else torch.tensor(mask)
    assert real_tokens(as_tensors, (1, 2), cache).int().tolist() == [expected]


def test_no_mask_in_a_dict():
    assert real_tokens({"full_attention": None}, (1, 2)) is None


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(3, 7), r"\(3, 7\)"),
        (torch.ones(2, 6), r"\(2, 6\)"),
        (torch.ones(2, 1, 7), r"\(2, 1, 7\)"),
        (torch.ones(2, 1, 1, 7), r"\(2, 1, 1, 7\)"),
        ("causal", "str"),
    ],
)
def test_masks_that_do_not_fit(mask, got):
    message = rf"attention_mask: expected shape \(2, 7 or more\) or \(2, heads, 7, 7 or more\).*, got {got}; pass"
    with pytest.raises(ValueError, match=message):
        real_tokens(mask, (2, 7))
