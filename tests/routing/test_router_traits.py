"""Each router keeps what its traits promise; where a trait is off, the tests show what that means and who refuses it.

The layer and the decoder rely on the traits alone, so a router that promises too much is wrong and one that promises
too little is refused where it would work.
"""

from dataclasses import replace

import pytest
import torch
from tests.routing.cases import VOCAB, D, E, T, assert_same_choice, batch, dense, each, route

from equipoise.layer import Capacity, MoE
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.routing import BiasBalance, QuantileBalance, RoundRobin, Sinkhorn
from equipoise.types import RoutingDecision


def change_after(cut: int, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Other tokens from position `cut` on."""
    x, ids = x.clone(), ids.clone()
    x[cut:], ids[cut:] = 3 * torch.randn_like(x[cut:]), (ids[cut:].flip(0) + 1) % VOCAB
    return x, ids


def rows_before(cut: int, decision: RoutingDecision) -> tuple[torch.Tensor, torch.Tensor]:
    taken, weights = dense(decision)
    return taken[:cut], weights[:cut]


def decoder(vocab_size: int = VOCAB, **moe) -> DecoderConfig:
    sizes = {"vocab_size": vocab_size, "dim": D, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "max_seq_len": 8}
    return DecoderConfig(**sizes, moe=MoEConfig(**({"num_experts": E, "hidden_dim": 8} | moe)))


class TestCausal:
    @each(lambda case: case.traits.causal)
    def test_nothing_at_or_before_a_token_depends_on_later_ones(self, case):
        router, (x, ids) = case.build(), batch()
        before = route(router, x, ids)
        for cut in range(1, T):
            after = route(router, *change_after(cut, x, ids))
            (taken, weights), (expected_taken, expected) = rows_before(cut, after), rows_before(cut, before)
            assert torch.equal(taken, expected_taken)
            torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)

    @each(lambda case: not case.traits.causal)
    def test_the_others_leak_the_future_in_training(self, case):
        """Who is chosen at or before a token changes with what comes after it: at most cuts, it does here."""
        router, (x, ids) = case.build(), batch()
        before = route(router, x, ids)
        leaks = [
            not torch.equal(rows_before(cut, route(router, *change_after(cut, x, ids)))[0], rows_before(cut, before)[0])
            for cut in range(1, T)
        ]
        assert sum(leaks) > T / 2

    @each(lambda case: not case.traits.causal)
    def test_a_decoder_refuses_them_unless_told_otherwise(self, case):
        name = type(case.config).__name__
        message = rf"router: {name} lets a token's experts depend on later tokens.*or accept it with allow_future=True"
        for where in ({"router": case.config}, {"first_router": case.config, "first_layers": 1}):
            with pytest.raises(ValueError, match=message):
                decoder(**where)
        accepted = replace(case.config, allow_future=True)
        assert accepted.traits.allow_future
        assert decoder(router=accepted).moe.router == accepted

    @each(lambda case: case.traits.causal)
    def test_a_decoder_takes_all_others(self, case):
        assert decoder(router=case.config, balance=tuple(case.needed_losses())).moe.router == case.config


class TestBatchInvariance:
    @each(lambda case: case.traits.batch_invariant)
    def test_in_eval_a_token_alone_is_routed_as_in_the_batch(self, case):
        router, (x, ids) = case.build().eval(), batch()
        together = router(x, None, ids)
        for t in range(T):
            alone = router(x[t : t + 1], None, ids[t : t + 1])
            assert_same_choice(alone, together, rows=slice(t, t + 1))

    @each(lambda case: not case.traits.batch_invariant)
    def test_the_others_do_look_at_the_batch(self, case):
        router, (x, ids) = case.build().eval(), batch()
        together, _ = dense(router(x, None, ids))
        alone = torch.cat([dense(router(x[t : t + 1], None, ids[t : t + 1]))[0] for t in range(T)])
        assert not torch.equal(alone, together)


class TestPermutation:
    """Independent of the batch implies it in eval; but expert choice, which is not, has it too."""

    @each(lambda case: not isinstance(case.config, RoundRobin))
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_permuting_tokens_permutes_the_decision(self, case, training):
        router, (x, ids) = case.build().train(training and not case.random), batch()  # noise belongs to a place
        order = torch.randperm(T)
        assert_same_choice(route(router, x[order], ids[order]), route(router, x, ids), rows=order)

    @each(lambda case: isinstance(case.config, RoundRobin))
    def test_round_robin_looks_at_the_place_alone(self, case):
        router, k = case.build(), case.config.k
        ids = [router(batch()[0]).expert_ids_N.tolist() for _ in range(2)]
        assert ids[0] == ids[1] == [n % E for n in range(T * k)]


class TestBias:
    @each(lambda case: case.traits.takes_bias)
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_a_large_bias_brings_every_token_or_none(self, case, training):
        router, (x, ids) = case.build().train(training), batch()
        taken, _ = dense(route(router, x, ids, bias=1e3 * torch.eye(E)[3]))
        assert taken[:, 3].all()
        taken, _ = dense(route(router, x, ids, bias=-1e3 * torch.eye(E)[3]))
        assert not taken[:, 3].any()

    @each(lambda case: case.traits.takes_bias)
    def test_weights_know_the_choice_but_not_the_bias(self, case):
        router, (x, ids) = case.build(), batch(200)
        plain_taken, plain = dense(route(router, x, ids))
        taken, weights = dense(route(router, x, ids, bias=0.3 * torch.randn(E)))
        same = (taken == plain_taken).all(1)
        assert 20 < same.sum() < 200
        torch.testing.assert_close(weights[same], plain[same], rtol=1e-5, atol=1e-6)
        shifted_taken, shifted = dense(route(router, x, ids, bias=torch.full((E,), 4.0)))
        assert torch.equal(shifted_taken, plain_taken)
        torch.testing.assert_close(shifted, plain, rtol=1e-5, atol=1e-6)

    @each(lambda case: not case.traits.takes_bias)
    def test_the_others_refuse_a_bias_and_a_layer_refuses_a_balancer(self, case):
        router, (x, ids) = case.build(), batch()
        with pytest.raises(ValueError, match=r": a balancer's bias does not move its selection, .*remove the balancer"):
            router(x, torch.zeros(E), ids)
        name = type(case.config).__name__
        for balancer in (BiasBalance(), QuantileBalance()):
            message = rf"{type(balancer).__name__} moves a selection bias, which {name} does not use: remove the"
            with pytest.raises(ValueError, match=message):
                case.layer(balance=(balancer,))


class TestRanking:
    @each(lambda case: case.traits.ranks)
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_preferences_are_the_decision(self, case, training):
        router, (x, ids) = case.build().train(training), batch()
        bias = 0.1 * torch.randn(E) if case.traits.takes_bias else None
        decision, k = route(router, x, ids, bias), case.config.k
        preferences = decision.preferences
        assert not preferences.ranking_TE.requires_grad
        chosen = decision.expert_ids_N.view(T, k)
        assert torch.equal(preferences.ranking_TE.topk(k).indices, chosen)
        assert torch.equal(preferences.weights(chosen).reshape(-1), decision.weights_N)
        assert (preferences.ranking_TE.isfinite().sum(1) >= k).all()
        others = preferences.ranking_TE.topk(E, largest=False).indices[:, :k]
        moved = decision.with_experts(others)
        assert torch.equal(moved.weights_N.view(T, k), preferences.weights(others))
        assert torch.equal(moved.token_ids_N, decision.token_ids_N)

    @each(lambda case: not case.traits.ranks)
    def test_the_others_have_none_and_a_layer_refuses_next_choice(self, case):
        decision = route(case.build(), *batch())
        assert decision.preferences is None
        with pytest.raises(ValueError, match=r"with_experts: needs a router in which tokens rank all experts"):
            decision.with_experts(torch.zeros(T, 1, dtype=torch.int64))
        message = rf'"next_choice" needs a router in which tokens rank all experts, got {type(case.config).__name__}'
        with pytest.raises(ValueError, match=message):
            case.layer(capacity=Capacity(1.0, overflow="next_choice"))


class TestTokenIds:
    @each(lambda case: case.traits.needs_token_ids)
    def test_missing_ids_are_asked_for(self, case):
        with pytest.raises(ValueError, match=r"needs token ids.*call the layer with token_ids="):
            case.build()(torch.randn(T, D))

    @each(lambda case: case.traits.needs_token_ids)
    def test_ids_matter(self, case):
        router, (x, ids) = case.build().eval(), batch()
        assert not torch.equal(dense(router(x, None, ids))[0], dense(router(x, None, ids.flip(0)))[0])

    @each(lambda case: case.traits.needs_token_ids)
    def test_it_says_which_ids_it_knows_and_a_decoder_asks_for_all_of_its_own(self, case):
        known = case.traits.num_token_ids
        decision = case.build()(torch.randn(2, D), None, torch.tensor([0, known - 1]))
        assert decision.num_tokens == 2
        with pytest.raises(IndexError):
            case.build()(torch.randn(1, D), None, torch.tensor([known]))
        assert decoder(vocab_size=known, router=case.config).moe.router == case.config
        with pytest.raises(
            ValueError, match=rf"vocab_size is {known}, fewer than the model's vocab_size = {known + 1}"
        ):
            decoder(vocab_size=known + 1, router=case.config)

    @each(lambda case: not case.traits.needs_token_ids)
    def test_the_others_do_not_look_at_them(self, case):
        router, (x, ids) = case.build(), batch()
        assert_same_choice(route(router, x, None), route(router, x, ids))
        assert case.traits.num_token_ids is None


class TestNeededLoss:
    @each(lambda case: case.traits.needs_loss is not None)
    def test_a_layer_refuses_to_do_without(self, case):
        with pytest.raises(ValueError, match=rf'needs the loss "{case.traits.needs_loss}".*add \w+Loss\(\)'):
            MoE(D, 8, E, router=case.config)
        assert case.traits.needs_loss in case.layer().loss_names


class TestPadding:
    @each()
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_is_never_seen_by_a_router(self, case, training, routed_by):
        """Whatever stands there, numbers or ids: the decision is over the real tokens, as if they were all."""
        layer, (x, ids) = case.layer().train(training), batch()
        padding = torch.zeros(2, T // 2, dtype=torch.bool)
        padding[0, 9:] = padding[1, :5] = True
        x, ids = x.view(2, T // 2, D), ids.view(2, T // 2)
        results = []
        for garbage in (0.0, float("nan")):
            x[padding], ids[padding] = garbage, 10**9
            torch.manual_seed(1)
            results.append(routed_by(layer, x, token_ids=ids, padding_mask=padding))
        (y, routed), (again, _) = results
        assert torch.equal(y, again)
        assert not y[padding].any()
        assert routed.decision.num_tokens == int((~padding).sum()) == 16
        torch.manual_seed(1)
        alone, routed_alone = routed_by(layer, x[~padding], token_ids=ids[~padding])
        assert_same_choice(routed.decision, routed_alone.decision)
        torch.testing.assert_close(y[~padding], alone, rtol=1e-5, atol=1e-6)


def test_sinkhorn_is_batch_invariant_in_eval_alone():
    """In training it is neither causal nor independent of the batch; both hold for what it does in eval."""
    router, (x, _) = Sinkhorn(k=2).build(D, E), batch()
    torch.nn.init.normal_(router.weight)
    plain = (x @ router.weight.t()).topk(2).indices
    assert torch.equal(router.eval()(x).expert_ids_N.view(T, 2), plain)
    assert not torch.equal(router.train()(x).expert_ids_N.view(T, 2), plain)
