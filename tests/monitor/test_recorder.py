"""The recorder: every real token of every layer once, outputs untouched, nothing left behind."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from equipoise.layer import Capacity, MoE
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.monitor.recorder import Recorder, observable_layers
from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.routing import QuantileBalance, SwitchLoss, TopK, ZLoss
from equipoise.types import DROP_REASONS, RoutingDecision

B, S, D, E, K = 3, 10, 16, 6, 2
T = B * S


def build(**options):
    torch.manual_seed(1)
    moe = MoE(D, 8, E, **{"router": TopK(k=K), "balance": (SwitchLoss(), ZLoss())} | options)
    moe.init_weights(0.5, 0.5)
    return moe


def build_decoder():
    moe = MoEConfig(num_experts=E, hidden_dim=16, router=TopK(k=K, jitter=0.1), balance=(SwitchLoss(), ZLoss()))
    sizes = {"vocab_size": 50, "dim": 32, "num_layers": 3, "num_heads": 4, "hidden_dim": 32, "max_seq_len": 16}
    return Decoder(DecoderConfig(**sizes, moe=moe, moe_layers=(0, 2)))


def inputs(batch=B, requires_grad=False):
    return torch.randn(batch, S, D, generator=torch.Generator().manual_seed(2)).requires_grad_(requires_grad)


def decision_of(moe, x):
    """What the layer decides about x, seen from outside the recorder."""
    seen = []
    handle = moe.tap.register_forward_hook(lambda module, args, routed: seen.append(routed))
    moe(x)
    handle.remove()
    return seen[0]


def expected_stats(step, routed, forwards=1, name="moe"):
    """The statistics of one decision, from plain numpy sums, as if it was made so many times."""
    decision: RoutingDecision = routed.decision
    probs, logits = decision.probs_TE.double().detach().numpy(), decision.logits_TE.double().detach().numpy()
    sums = RoutingSums(
        num_tokens=forwards * decision.num_tokens,
        counts_E=forwards * np.bincount(decision.expert_ids_N.numpy(), minlength=E),
        probs_sum_E=forwards * probs.sum(0),
        token_entropy_sum=forwards * float(-(probs * np.log(probs)).sum()),
        logit_sum=forwards * float(logits.sum()),
        logit_sq_sum=forwards * float((logits**2).sum()),
        logsumexp_sum=forwards * float(np.log(np.exp(logits).sum(1)).sum()),
        dropped={"capacity": 0, "tokens": 0},
        losses={},
    )
    return routing_stats(name, step, sums)


NUMBERS = ["load_entropy", "token_entropy", "marginal_entropy", "mutual_information", "max_violation"]
NUMBERS += ["effective_experts", "max_token_share", "logit_mean", "logit_std", "logit_logsumexp"]


# ------------------------------------------------------------------------------------------------ what it records


@pytest.mark.parametrize("forwards", [1, 3])
def test_statistics_are_those_of_the_decision(forwards):
    moe, x = build(), inputs()
    expected = expected_stats(7, decision_of(moe, x), forwards)
    recorder = Recorder(nn.ModuleDict({"moe": moe}))
    for _ in range(forwards):
        moe(x)
    [stats] = recorder.flush(7)
    assert (stats.layer, stats.step, stats.num_tokens) == ("moe", 7, forwards * T)
    assert stats.counts_E.tolist() == expected.counts_E.tolist()
    assert stats.counts_E.dtype == np.int64
    for name in NUMBERS:
        assert getattr(stats, name) == pytest.approx(getattr(expected, name), rel=1e-5, abs=1e-6), name


def test_losses_are_averages_over_tokens():
    moe = build()
    few, many = inputs(1), inputs(3)
    values = [{name: float(v) for name, v in decision_of(moe, x).losses.items()} for x in (few, many)]
    recorder = Recorder(moe)
    moe(few)
    moe(many)
    [stats] = recorder.flush(1)
    assert stats.losses.keys() == {"switch_micro", "z"}
    for name, value in stats.losses.items():
        assert value == pytest.approx((values[0][name] * 1 + values[1][name] * 3) / 4, rel=1e-6)


@given(factor=st.floats(0.1, 1.5), policy=st.sampled_from(["position", "probability", "random"]))
def test_drops_are_those_of_the_plan(factor, policy):
    moe = build(capacity=Capacity(factor=factor, policy=policy))
    recorder = Recorder(moe)
    seen = []
    moe.tap.register_forward_hook(lambda module, args, routed: seen.append(routed.plan))
    moe(inputs())
    [stats] = recorder.flush(1)
    counted = {reason: int(count) for reason, count in seen[0].drops.items()}
    dropped = {reason: counted[reason] for reason in DROP_REASONS}
    assert stats.dropped == dropped
    assert stats.rerouted == {"moved": 0, "spilled": 0, "diverted": 0}
    assert stats.counts_E.sum() == T * K  # before drops
    assert T * K - int(seen[0].counts_e.sum()) == dropped["capacity"]


@pytest.mark.parametrize("overflow", ["next_choice", "shared"])
def test_reroutes_are_those_of_the_plan(overflow):
    moe = MoE(D, 8, E, capacity=Capacity(0.8, overflow=overflow), shared_experts=1)
    moe.init_weights(0.5, 0.5)
    recorder = Recorder(moe)
    seen = []
    moe.tap.register_forward_hook(lambda module, args, routed: seen.append(routed.plan))
    moe(inputs())
    moe(inputs(1))
    [stats] = recorder.flush(1)
    rerouted = {key: sum(int(plan.drops[key]) for plan in seen) for key in ("moved", "spilled")}
    assert stats.rerouted == rerouted | {"diverted": 0}
    assert sum(stats.rerouted.values()) > 0


def test_flush_starts_anew():
    moe = build()
    recorder = Recorder(moe)
    moe(inputs())
    recorder.flush(1)
    [empty] = recorder.flush(2)
    assert (empty.num_tokens, empty.counts_E.tolist(), dict(empty.dropped)) == (
        0,
        [0] * E,
        {"capacity": 0, "hard_cap": 0, "tokens": 0},
    )
    moe(inputs(1))
    assert recorder.flush(3)[0].num_tokens == S


def test_flushed_records_are_not_the_live_buffers():
    moe = build()
    recorder = Recorder(moe)
    moe(inputs())
    [stats] = recorder.flush(1)
    counts = stats.counts_E.copy()
    moe(inputs())
    assert stats.counts_E.tolist() == counts.tolist()


def test_layers_are_named_in_the_models_order():
    model = build_decoder()
    recorder = Recorder(model)
    model(torch.zeros(2, 8, dtype=torch.int64))
    assert [stats.layer for stats in recorder.flush(1)] == ["layers.0.mlp", "layers.2.mlp"] == list(model.moe_layers)
    assert list(observable_layers(model)) == list(model.moe_layers)


def test_a_model_without_moe_layers():
    with pytest.raises(
        ValueError, match=r"model: expected at least one layer with a routing tap, found none in Linear"
    ):
        Recorder(nn.Linear(2, 2))


def test_reduce_gets_every_sum_of_every_layer():
    """Two ranks with the same tokens: everything doubles, but for the averages."""
    moe = build()
    recorder, alone = Recorder(moe, reduce=lambda tensor: tensor.mul_(2)), Recorder(moe)
    moe(inputs())
    [both], [one] = recorder.flush(1), alone.flush(1)
    assert both.num_tokens == 2 * one.num_tokens
    assert both.counts_E.tolist() == (2 * one.counts_E).tolist()
    assert both.losses == pytest.approx(one.losses)
    assert both.logit_std == pytest.approx(one.logit_std)


# -------------------------------------------------------------------------------------------- once, and only once


def backward_through(run, x):
    run(x).square().sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    moe = build(balance=(QuantileBalance(),))
    recorder, forwards = Recorder(moe), []
    moe.router.register_forward_hook(lambda *args: forwards.append(1))
    backward_through(lambda x: checkpoint(moe, x, use_reentrant=use_reentrant), inputs(requires_grad=True))
    assert len(forwards) == 2  # it was computed twice
    [stats] = recorder.flush(1)
    assert (stats.num_tokens, stats.counts_E.sum()) == (T, T * K)
    assert stats.token_entropy <= 1.0  # the float sums are of one pass too
    assert moe.balancer.pending.sum() == T * E


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    moe = build()
    recorder = Recorder(moe)
    with context():
        moe(inputs())
    moe.eval()
    moe(inputs())
    [stats] = recorder.flush(1)
    assert (stats.num_tokens, stats.counts_E.sum()) == (2 * T, 2 * T * K)


def test_two_recorders_each_count_everything():
    moe = build()
    recorders = [Recorder(moe), Recorder(moe)]
    moe(inputs())
    assert [recorder.flush(1)[0].num_tokens for recorder in recorders] == [T, T]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    moe = build()
    recorder = Recorder(moe)
    with torch.autocast("cpu", dtype=dtype):
        moe(inputs())
    [stats] = recorder.flush(1)
    assert (stats.num_tokens, stats.counts_E.sum()) == (T, T * K)


@given(mask=st.lists(st.booleans(), min_size=T, max_size=T))
def test_padding_is_never_counted(mask):
    moe = build()
    recorder = Recorder(moe)
    padding = torch.tensor(mask).view(B, S)
    moe(inputs(), padding_mask=padding)
    [stats] = recorder.flush(1)
    real = T - sum(mask)
    assert (stats.num_tokens, stats.counts_E.sum()) == (real, real * K)


def test_what_is_in_padding_changes_no_number():
    moe, x = build(), inputs()
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[:, 7:] = True
    recorder = Recorder(moe)
    moe(x, padding_mask=padding)
    [clean] = recorder.flush(1)
    moe(x.masked_fill(padding[..., None], 1e6), padding_mask=padding)
    [dirty] = recorder.flush(1)
    assert all(getattr(clean, name) == getattr(dirty, name) for name in NUMBERS)
    assert clean.losses == dirty.losses


def test_paused():
    moe = build()
    recorder = Recorder(moe)
    with recorder.paused():
        moe(inputs())
        with recorder.paused():
            moe(inputs())
        moe(inputs())  # still paused
    moe(inputs(1))
    assert recorder.flush(1)[0].num_tokens == S


def pause_and_fail(recorder):
    with recorder.paused():
        raise RuntimeError("stop")


def test_pause_ends_with_an_error():
    moe = build()
    recorder = Recorder(moe)
    with pytest.raises(RuntimeError, match="stop"):
        pause_and_fail(recorder)
    moe(inputs())
    assert recorder.flush(1)[0].num_tokens == T


@pytest.mark.filterwarnings("default")  # of torch.compile itself
def test_under_compile():
    """One graph, the recorder in it: the same numbers, forward after forward, also when it is recomputed."""
    moe, x = build(), inputs()
    eager = Recorder(moe)
    moe(x)
    [expected] = eager.flush(1)
    eager.detach()
    recorder = Recorder(moe)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    backward_through(lambda x: checkpoint(compiled, x, use_reentrant=False), inputs(requires_grad=True))
    with recorder.paused():
        compiled(x)
    [stats] = recorder.flush(1)
    assert stats.num_tokens == 2 * T
    assert stats.counts_E.tolist() == (2 * expected.counts_E).tolist()
    for name in NUMBERS:
        assert getattr(stats, name) == pytest.approx(getattr(expected, name), rel=1e-5, abs=1e-6), name
    assert stats.losses == pytest.approx(expected.losses)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------ it is free

HOOKS = [name for name in vars(nn.Linear(1, 1)) if name.endswith("_hooks") or "hooks_" in name]


def hooks_of(model):
    return [
        (name, kind, OrderedDict(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in HOOKS
        if isinstance(getattr(module, kind), dict)
    ]


def test_outputs_and_gradients_are_bit_identical():
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))

    def run(model):
        torch.manual_seed(3)  # jitter
        logits = model(tokens)
        logits.square().mean().backward()
        return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, torch.get_rng_state()

    model = build_decoder()
    logits, grads, rng = run(model)
    model.zero_grad(set_to_none=True)
    recorder = Recorder(model)
    watched_logits, watched_grads, watched_rng = run(model)
    assert recorder.flush(1)[0].num_tokens == 24
    assert torch.equal(logits, watched_logits)
    assert all(torch.equal(grads[name], watched_grads[name]) for name in grads)
    assert torch.equal(rng, watched_rng)


def test_detach_leaves_the_model_as_it_was():
    model = build_decoder()
    assert {"_forward_hooks", "_backward_hooks", "_forward_pre_hooks", "_state_dict_hooks"} <= set(HOOKS)
    hooks, attributes = hooks_of(model), {name: set(vars(module)) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recorder = Recorder(model)
    assert hooks_of(model) != hooks
    model(torch.zeros(2, 8, dtype=torch.int64))
    recorder.detach()
    recorder.detach()  # harmless
    assert hooks_of(model) == hooks
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.state_dict().keys() == state.keys()
    model(torch.zeros(2, 8, dtype=torch.int64))
    assert recorder.flush(1)[0].num_tokens == 16  # nothing after the detach


# ------------------------------------------------------------------------------------------------- an open window


def test_the_open_window_goes_on_in_another_recorder():
    moe = build(capacity=Capacity(factor=0.5))
    straight, first = Recorder(moe), Recorder(moe)
    moe(inputs())
    state = first.state_dict()
    first.detach()
    second = Recorder(moe)
    second.load_state_dict(state)
    moe(inputs(1))
    [expected], [stats] = straight.flush(1), second.flush(1)
    assert stats.counts_E.tolist() == expected.counts_E.tolist()
    assert all(getattr(stats, name) == getattr(expected, name) for name in NUMBERS)
    assert (stats.dropped, stats.losses) == (expected.dropped, expected.losses)
    assert stats.dropped["capacity"] > 0


def test_saved_state_is_a_copy():
    moe = build()
    recorder = Recorder(moe)
    moe(inputs())
    state = recorder.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    moe(inputs())
    recorder.flush(1)
    assert all(torch.equal(state[name], before[name]) for name in state)
    recorder.load_state_dict(state)
    moe(inputs())
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_load_replaces_what_was_counted():
    moe = build()
    recorder = Recorder(moe)
    state = recorder.state_dict()
    moe(inputs())
    recorder.load_state_dict(state)
    [stats] = recorder.flush(1)
    assert (stats.num_tokens, stats.losses) == (0, {})


def test_state_of_another_model():
    state = Recorder(build()).state_dict()
    message = r"recorder state: expected \.integers of shape \(14,\), got \(12,\); it belongs to another model"
    with pytest.raises(ValueError, match=message):
        Recorder(MoE(D, 8, E + 2)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"recorder state: expected layers\.0\.mlp\.integers .* got None"):
        Recorder(build_decoder()).load_state_dict(state)


class TestSmallForwards:
    """Single tokens, as in decoding, are added several forwards at a time."""

    def tokens(self, number):
        return torch.randn(number, D, generator=torch.Generator().manual_seed(3))

    @pytest.mark.parametrize("options", [{}, {"capacity": Capacity(factor=0.5, policy="position")}])
    def test_one_by_one_is_as_all_at_once(self, options):
        moe, x = build(**options).eval(), self.tokens(700)
        one, all_at_once = Recorder(moe), Recorder(moe)
        with torch.inference_mode(), all_at_once.paused():
            for row in x.split(1):
                moe(row)
        with torch.inference_mode(), one.paused():
            if not options:
                moe(x)
            else:  # a capacity is a batch's: what it drops is another number for other batches
                for row in x.split(1):
                    moe(row)
        [a], [b] = one.flush(1), all_at_once.flush(1)
        assert a.num_tokens == b.num_tokens == 700
        assert np.array_equal(a.counts_E, b.counts_E)
        assert a.dropped == b.dropped
        for name in ("token_entropy", "marginal_entropy", "logit_mean", "logit_std", "logit_logsumexp"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-5, abs=1e-6), name

    def test_what_waits_is_bounded(self):
        moe = build().eval()
        recorder = Recorder(moe)
        [backlog] = recorder._backlogs.values()
        most = 0
        with torch.inference_mode():
            for row in self.tokens(6000).split(1):
                moe(row)
                most = max(most, backlog._size)
        assert most < backlog.MAX_WAITING
        assert recorder.flush(1)[0].num_tokens == 6000

    def test_what_waits_is_in_the_state_and_is_replaced_by_one(self):
        moe = build().eval()
        recorder = Recorder(moe)
        with torch.inference_mode():
            moe(self.tokens(3))
            state = recorder.state_dict()
            moe(self.tokens(5))
            recorder.load_state_dict(state)
        assert recorder.flush(1)[0].num_tokens == 3

    def test_no_graph_is_kept(self):
        moe = build()
        recorder = Recorder(moe)
        moe(self.tokens(4))  # with gradients, and small
        assert all(not backlog._waiting for backlog in recorder._backlogs.values())
        assert recorder.flush(1)[0].num_tokens == 4
