"""Which experts are chosen together: every pair against a count by hand of exactly the sampled tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.monitor.transformers_models import E as THEIR_E
from tests.monitor.transformers_models import Witness, batch, build
from torch import nn
from torch.utils.checkpoint import checkpoint

from equipoise.layer import MoE
from equipoise.monitor.co_selection import PairCounts
from equipoise.monitor.recorder import Recorder
from equipoise.monitor.store import MAX_CO_SELECTIONS, RunStore
from equipoise.monitor.watch import watch
from equipoise.routing import ExpertChoice, ReLURouting, SparsityLoss, TopK
from equipoise.types import CoSelection

D, E, T = 16, 6, 50


def build_moe(router=None):
    torch.manual_seed(1)
    balance = (SparsityLoss(),) if isinstance(router, ReLURouting) else ()
    moe = MoE(D, 8, E, router=router or TopK(k=3), balance=balance)
    moe.init_weights(0.5, 0.5)
    return moe


def tokens(number=T, requires_grad=False):
    return torch.randn(number, D, generator=torch.Generator().manual_seed(2)).requires_grad_(requires_grad)


def by_hand(choices, sample, num_experts=E):
    """choices: the experts of each token. The sampled tokens and their matrix, pair by pair in Python."""
    stride = -(-len(choices) // sample)
    counts = [[0] * num_experts for _ in range(num_experts)]
    sampled = choices[::stride]
    for experts in sampled:
        for a in experts:
            for b in experts:
                counts[a][b] += 1
    return len(sampled), counts


def choices_of(moe, x):
    seen = []
    handle = moe.tap.register_forward_hook(lambda module, args, routed: seen.append(routed.decision))
    moe(x)
    handle.remove()
    choices = [[] for _ in range(len(x))]
    for token, expert in zip(seen[0].token_ids_N.tolist(), seen[0].expert_ids_N.tolist(), strict=True):
        choices[token].append(expert)
    return choices


def watched(moe, sample, run):
    recorder = Recorder(moe)
    recorder.co_select(sample)
    run()
    recorder.flush(7)
    recorder.detach()
    [found] = recorder.co_selection
    return found


# --------------------------------------------------------------------------------------------------- what it counts


@pytest.mark.parametrize("sample", [1, 7, 17, T, 1000])
@pytest.mark.parametrize("router", [TopK(k=1), TopK(k=3), TopK(k=E), ExpertChoice(), ReLURouting()], ids=str)
def test_pairs_are_those_of_the_sampled_tokens(router, sample):
    """With one expert per token there is a diagonal and nothing else."""
    moe, x = build_moe(router), tokens()
    num_tokens, counts = by_hand(choices_of(moe, x), sample)
    found = watched(moe, sample, lambda: moe(x))
    assert (found.layer, found.step, found.num_tokens) == ("", 7, num_tokens)
    assert num_tokens <= min(sample, T)
    assert found.counts_EE.dtype == np.int64
    assert found.counts_EE.tolist() == counts


def test_forwards_add_up_and_a_flush_starts_anew():
    moe = build_moe()
    few, many = by_hand(choices_of(moe, tokens(9)), 4), by_hand(choices_of(moe, tokens()), 4)
    recorder = Recorder(moe)
    recorder.co_select(4)
    moe(tokens(9))
    moe(tokens())
    moe(tokens(0))
    recorder.flush(1)
    [both] = recorder.co_selection
    assert both.num_tokens == few[0] + many[0]
    assert both.counts_EE.tolist() == np.add(few[1], many[1]).tolist()
    recorder.flush(2)
    [empty] = recorder.co_selection
    assert (empty.step, empty.num_tokens, empty.counts_EE.any()) == (2, 0, False)
    assert both.counts_EE.sum() > 0  # and is no view of the live buffer


def test_padding_is_not_sampled():
    moe, x = build_moe(), tokens().view(5, 10, D)
    padding = torch.zeros(5, 10, dtype=torch.bool)
    padding[:, 7:] = True
    num_tokens, counts = by_hand(choices_of(moe, x[~padding]), 20)
    found = watched(moe, 20, lambda: moe(x, padding_mask=padding))
    assert (found.num_tokens, found.counts_EE.tolist()) == (num_tokens, counts)


@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3"])
def test_a_model_of_transformers(family, pad):
    model, (ids, mask) = build(family), batch(pad=pad)
    witness = Witness(model)
    with watch(model, every=1) as eye:
        assert eye.co_selection() == []
        eye.co_select(5)
        model(ids, attention_mask=mask)
        eye.step(3)
        for found in eye.co_selection():
            choices = witness.real(witness.ids[found.layer], [mask.flatten().tolist()])
            num_tokens, counts = by_hand(choices, 5, THEIR_E)
            assert (found.step, found.num_tokens, found.counts_EE.tolist()) == (3, num_tokens, counts)
        assert len(eye.co_selection()) == 2


# -------------------------------------------------------------------------------------- once, exactly, and for free


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("router", [TopK(k=3), ReLURouting()], ids=str)
def test_a_recomputed_forward_adds_nothing(router, use_reentrant):
    moe, x = build_moe(router), tokens(requires_grad=True)
    _, counts = by_hand(choices_of(moe, x), 8)
    found = watched(moe, 8, lambda: checkpoint(moe, x, use_reentrant=use_reentrant).square().sum().backward())
    assert found.counts_EE.tolist() == counts


@pytest.mark.parametrize("router", [TopK(k=3), ReLURouting()], ids=str)
def test_autocast_rounds_nothing(router):
    """bf16 has 8 bits: 257 tokens that choose the same would be 256 or 258."""
    moe, x = build_moe(router), tokens(1)
    many = x.expand(1027, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, counts = by_hand(choices_of(moe, many), 2000)
        found = watched(moe, 2000, lambda: moe(many))
    assert found.counts_EE.max() == 1027
    assert found.counts_EE.tolist() == counts


@pytest.mark.filterwarnings("default")  # of torch.compile itself
def test_under_compile():
    moe, x = build_moe(), tokens()
    num_tokens, counts = by_hand(choices_of(moe, x), 9)
    torch._dynamo.reset()
    found = watched(moe, 9, lambda: torch.compile(moe, fullgraph=True, backend="aot_eager")(x))
    torch._dynamo.reset()
    assert (found.num_tokens, found.counts_EE.tolist()) == (num_tokens, counts)


def test_outputs_are_bit_identical_and_paused_counts_nothing():
    moe, x = build_moe(), tokens()
    expected = moe(x)
    recorder = Recorder(moe)
    recorder.co_select(8)
    assert torch.equal(moe(x), expected)
    recorder.flush(1)
    with recorder.paused():
        moe(x)
    recorder.flush(2)
    assert recorder.co_selection[0].num_tokens == 0


def test_ranks_are_summed_with_the_rest():
    moe, x = build_moe(), tokens()
    num_tokens, counts = by_hand(choices_of(moe, x), 8)
    calls = []
    recorder = Recorder(moe, reduce=lambda tensor: calls.append(tensor.mul_(2)))
    recorder.co_select(8)
    moe(x)
    [stats] = recorder.flush(1)
    [found] = recorder.co_selection
    assert len(calls) == 1
    assert (stats.num_tokens, found.num_tokens) == (2 * T, 2 * num_tokens)
    assert found.counts_EE.tolist() == (2 * np.array(counts)).tolist()


def test_memory_is_what_it_says():
    layers = {str(i): SimpleNamespace(tap=nn.Identity(), num_experts=256, loss_names=()) for i in range(61)}
    words = PairCounts(layers, 256, torch.device("meta")).words
    assert words.numel() * words.element_size() == 61 * 8 * (256**2 + 1) < 32 * 2**20


def test_no_sample():
    with watch(build_moe()) as eye, pytest.raises(ValueError, match=r"tokens: expected at least 1 .*, got 0; 256 are"):
        eye.co_select(0)


# -------------------------------------------------------------------------------------------------------- the store


def record(step, counts_EE, layer="a"):
    counts_EE = np.array(counts_EE, dtype=np.int64)
    return CoSelection(layer, step, 40, counts_EE + counts_EE.T)


@pytest.mark.parametrize("most", [0, 127, 200, 40_000, 2**31, 2**61])
def test_the_store_keeps_every_count(tmp_path, most):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, most, (7, 7), endpoint=True)
    counts[2, 5] = most
    with RunStore(tmp_path) as store:
        store.co_selection([record(50, counts), record(50, np.zeros((3, 3)), "b")])
    with RunStore.open_readonly(tmp_path) as store:
        found = store.latest_co_selection("a")
        assert (found.layer, found.step, found.num_tokens) == ("a", 50, 40)
        assert found.counts_EE.dtype == np.int64
        assert found.counts_EE.tolist() == (counts + counts.T).tolist()
        assert store.latest_co_selection("b").counts_EE.shape == (3, 3)
        assert store.latest_co_selection("c") is None
        assert store.latest_co_selection("a", at=49) is None


def test_the_store_is_a_sink_of_it_and_keeps_few(tmp_path):
    """Every other one goes when there are more, never the newest; a resumed run forgets what it repeats."""
    moe, x = build_moe(), tokens()
    with RunStore(tmp_path) as store, watch(moe, every=1, sinks=[store]) as eye:
        eye.co_select(8)
        for step in range(1, 3 * MAX_CO_SELECTIONS):
            moe(x)
            eye.step(step)
            steps = [row[0] for row in store.rows("SELECT DISTINCT step FROM co_selection ORDER BY step")]
            assert len(steps) <= MAX_CO_SELECTIONS
            assert (steps[0], steps[-1]) == (1, step)
        assert store.latest_co_selection("").counts_EE.tolist() == by_hand(choices_of(moe, x), 8)[1]
        store.truncate_after(20)
        assert store.latest_co_selection("").step <= 20


def test_a_run_from_before_is_readable_and_goes_on(tmp_path):
    with RunStore(tmp_path) as store:
        store.set_meta(name="old")
        store._db.execute("DROP TABLE co_selection")
    with RunStore.open_readonly(tmp_path) as store:
        assert store.latest_co_selection("a") is None
    with RunStore(tmp_path) as store:
        store.co_selection([record(1, np.ones((2, 2)))])
        assert store.latest_co_selection("a").counts_EE.tolist() == [[2, 2], [2, 2]]
