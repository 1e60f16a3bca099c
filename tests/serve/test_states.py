"""Mamba in the engine: a state per sequence beside its blocks, whatever is batched, cut, interrupted or repeated."""

import re
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.small import (
    DEVICE,
    MAX_TOKENS,
    TOKENIZER,
    answers,
    assert_nothing_leaks,
    assert_same,
    greedy,
    mixed_requests,
    tiny_engine,
    tiny_model,
)

from equipoise.models.config import MoEConfig
from equipoise.models.generate import generate
from equipoise.models.mamba import Mamba
from equipoise.routing import TopK
from equipoise.serve.engine import blocks_that_fit
from equipoise.serve.paged_cache import PagedKV, Ragged, Span
from equipoise.serve.reference import answer
from equipoise.serve.request import Request, Sampling
from equipoise.serve.scheduler import Limits
from equipoise.serve.states import States

SMALL = Mamba(state_dim=3, conv_width=3, expand=1, chunk=4)
SHORTCUT = MoEConfig(num_experts=8, hidden_dim=16, router=TopK(k=1), shared_experts=1, shortcut="pos3")
MODELS = {
    "some layers": {"mamba": SMALL, "mamba_layers": (0,)},
    "all layers": {"mamba": SMALL},
    "no experts, no window": {"mamba": Mamba(state_dim=3, conv_width=1, expand=1), "moe": None},
    "shortcut": {"moe": SHORTCUT, "num_layers": 4, "moe_layers": (1, 3), "mamba": SMALL, "mamba_layers": (0, 2)},
}
EACH = pytest.mark.parametrize("name", MODELS)
PROMPT = tuple(range(40, 61))


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(**changes) for name, changes in MODELS.items()}


@EACH
def test_mixed_requests_as_the_slow_twin(models, name):
    """Prompts in pieces, and answers under way beside them."""
    engine, requests = tiny_engine(deepcopy(models[name]).to(DEVICE), num_blocks=14), mixed_requests(10)
    got = answers(engine, requests)
    for request in requests:
        assert_same(got[request.id], answer(models[name], TOKENIZER, request))
        assert got[request.id].num_cached == 0
    assert_nothing_leaks(engine)


@EACH
def test_who_is_preempted_begins_anew_and_loses_nothing(models, name):
    engine = tiny_engine(models[name], num_blocks=11)  # for one answer of 61 tokens and not for two
    requests = [greedy("a", PROMPT, 40), greedy("b", PROMPT[::-1], 40)]
    got = answers(engine, requests)
    assert engine.scheduler.num_preempted > 0
    for request in requests:
        assert_same(got[request.id], answer(models[name], TOKENIZER, request))
    assert_nothing_leaks(engine)


@EACH
def test_batched_equals_single_equals_generate(models, name):
    prompts = torch.randint(0, 256, (5, 13), generator=torch.Generator().manual_seed(0))
    requests = [greedy(str(n), prompt, 9) for n, prompt in enumerate(prompts.tolist())]
    together = answers(tiny_engine(models[name]), requests)
    expected = generate(models[name], prompts, 9, temperature=0)[:, 13:].tolist()
    for request, tokens in zip(requests, expected, strict=True):
        assert_same(together[request.id], answers(tiny_engine(models[name]), [request])[request.id])
        assert list(together[request.id].token_ids) == tokens


@given(st.data())
@settings(max_examples=25)
def test_pieces_of_many_sequences_are_each_as_if_alone(data):
    """Whatever the cuts, slots and company: logits and states are those of the whole sequence at once."""
    model = _MODEL
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    cuts = [sorted(data.draw(st.sets(st.integers(1, each), max_size=3)) | {each}) for each in lengths]
    slots = data.draw(st.permutations(range(len(lengths) + 1)))[: len(lengths)]
    kv, states = PagedKV(model.config, 3 * len(lengths), 4, torch.float64), dirty_states(model, len(lengths) + 1)
    tokens = [[(37 * n + 11 * at) % 257 for at in range(length)] for n, length in enumerate(lengths)]
    done, got = [0] * len(lengths), [[] for _ in lengths]
    with torch.inference_mode():
        while going := [n for n, length in enumerate(lengths) if done[n] < length]:
            ends = [next(cut for cut in cuts[n] if cut > done[n]) for n in going]
            pairs = list(zip(going, ends, strict=True))
            spans = [Span([3 * n, 3 * n + 1, 3 * n + 2], done[n], end - done[n], slots[n]) for n, end in pairs]
            row = torch.tensor([[token for n, end in pairs for token in tokens[n][done[n] : end]]])
            model(row, cache=Ragged(kv, spans, states))  # comes to nothing: it is not committed
            cache = Ragged(kv, spans, states)
            logits = model(row, cache=cache)[0]
            cache.commit()
            for (n, end), part in zip(pairs, logits.split([span.num_tokens for span in spans]), strict=True):
                got[n].append(part)
                done[n] = end
        for n, parts in enumerate(got):
            torch.testing.assert_close(torch.cat(parts), model(torch.tensor([tokens[n]]))[0])
            alone = dirty_states(model, 1)
            cache = Ragged(kv, [Span([3 * n, 3 * n + 1, 3 * n + 2], 0, lengths[n], 0)], alone)
            model(torch.tensor([tokens[n]]), cache=cache)
            cache.commit()
            torch.testing.assert_close(states.h_MSIN[:, slots[n]], alone.h_MSIN[:, 0])
            torch.testing.assert_close(states.windows_MSIW[:, slots[n]], alone.windows_MSIW[:, 0])


_MODEL = tiny_model(**MODELS["some layers"])


def dirty_states(model, num_slots):
    """As whoever had the slots may have left them."""
    states = States(model.config, num_slots, torch.float64)
    states.windows_MSIW.fill_(torch.nan)
    states.h_MSIN.fill_(torch.nan)
    return states


@pytest.mark.parametrize("limits", [Limits(max_running=1, tokens_per_step=2), Limits(max_running=14)])
def test_a_prompt_in_pieces_is_the_whole_prompt(models, limits):
    request = Request("a", PROMPT, 6, Sampling(0.0), num_logprobs=2, prompt_logprobs=True, routed_experts=True)
    for model in models.values():
        assert_same(answers(tiny_engine(model, limits=limits), [request])["a"], answer(model, TOKENIZER, request))


def test_a_prefix_is_not_used_again(models):
    engine = tiny_engine(models["some layers"])
    first = answers(engine, [greedy("first", PROMPT)])["first"]
    again = answers(engine, [greedy("again", PROMPT)])["again"]
    assert (again.token_ids, again.num_cached) == (first.token_ids, 0)


@EACH
def test_cancelling_frees_the_slot_for_a_sequence_that_sees_nothing_of_it(models, name):
    engine = tiny_engine(models[name], limits=Limits(max_running=2, tokens_per_step=20))
    for id in ("a", "b", "waits"):
        engine.add(greedy(id, PROMPT, 30))
    for _ in range(4):
        engine.step()
    assert engine.scheduler.num_free_slots == 0
    engine.cancel("waits")
    engine.cancel("a")
    assert engine.scheduler.num_free_slots == 1
    for states in (engine._runner._states.h_MSIN, engine._runner._states.windows_MSIW):
        slot = next(iter(engine.scheduler._free_slots))
        states[:, slot] = torch.nan  # as after an output that is not a number
    request = greedy("c", [7, 8, 9], 12)
    engine.add(request)
    assert_same(answers(engine)["c"], answer(models[name], TOKENIZER, request))
    assert_nothing_leaks(engine)


def test_changed_weights_begin_anew(models):
    engine, request = tiny_engine(models["some layers"]), greedy("a", PROMPT, 8)
    got = answers(engine, [request], between=lambda step: engine.forget_cache() if step in (2, 5) else None)
    assert_same(got["a"], answer(models["some layers"], TOKENIZER, request))
    assert_nothing_leaks(engine)


@pytest.mark.parametrize("where", ["in the middle of the model", "after the model"])
def test_a_step_that_fails_moves_no_state(models, where):
    """The same pieces are computed again, and a state must not take in its tokens twice."""
    model, failures = models["all layers"], [3, 4, 8]
    engine, calls = tiny_engine(model), 0
    requests = [greedy("a", PROMPT, 8), greedy("b", [9, 8, 7], 8)]

    def fail(module, args):
        nonlocal calls
        calls += 1
        if calls in failures:
            raise RuntimeError("out of memory")

    place = model.layers[1].mlp if where == "in the middle of the model" else model.norm
    handle = place.register_forward_pre_hook(fail)
    try:
        got = answers(engine, requests)
    finally:
        handle.remove()
    assert calls > max(failures)
    for request in requests:
        assert_same(got[request.id], answer(model, TOKENIZER, request))


def test_what_is_not_a_number_stays_with_its_own():
    model = tiny_model(tie_embeddings=False, **MODELS["all layers"])
    others = [greedy(str(n), [*PROMPT[:16], *range(n)], 12) for n in range(4)]
    expected = {request.id: answer(model, TOKENIZER, request) for request in others}
    with torch.no_grad():
        model.embed_tokens.weight[200] = torch.nan
    engine = tiny_engine(model, limits=Limits(max_running=5, tokens_per_step=9))
    got = answers(engine, [greedy("bad", [*PROMPT[:16], 200, 1], 5), *others])
    assert got["bad"].finish == "failed"
    for _ in range(2):  # also in the slot that the bad one has left
        for request in others:
            assert_same(got[request.id], expected[request.id])
        got = answers(engine, others)
    assert_nothing_leaks(engine)


def test_memory_is_for_the_layers_that_need_it(models):
    model = models["some layers"]  # one layer with 2 heads of 8 and blocks of 4, one with 32 channels of 3 + 2 numbers
    assert PagedKV.bytes_per_block(model.config, 4, torch.float64) == 2 * 1 * 4 * 2 * 8 * 8
    assert States.bytes_per_slot(model.config, torch.float64) == 32 * (3 + 2) * 8
    states = States(model.config, 7, torch.float64)
    assert states.h_MSIN.nbytes + states.windows_MSIW.nbytes == 7 * 32 * 5 * 8
    gigabytes = (30 * 1024 + 6 * 1280) / 2**30
    assert blocks_that_fit(model, 4, gigabytes, max_running=6) == 30
    with pytest.raises(ValueError, match=re.escape("and states of 6 sequences 7.15e-06 GB, got 1e-06; give")):
        blocks_that_fit(model, 4, 1e-6, max_running=6)
    assert blocks_that_fit(models["all layers"], 4, gigabytes, max_running=6) == 6 * MAX_TOKENS // 4
    with pytest.raises(ValueError, match="cache_gb: one sequence of 96 tokens takes 0 GB, and states of 6"):
        blocks_that_fit(models["all layers"], 4, 1e-6, max_running=6)
    assert States.bytes_per_slot(tiny_model().config, torch.float64) == 0


def test_a_row_without_states_or_slots_is_refused(models):
    model, kv = models["some layers"], PagedKV(models["some layers"].config, 2, 4, torch.float64)
    with torch.inference_mode(), pytest.raises(ValueError, match="Ragged: expected states for layer 0, which is Mamba"):
        model(torch.tensor([[1, 2]]), cache=Ragged(kv, [Span([0], 0, 2)]))
    with pytest.raises(ValueError, match="Ragged: expected a slot for each span of a model with states"):
        Ragged(kv, [Span([0], 0, 2)], States(model.config, 1, torch.float64))
