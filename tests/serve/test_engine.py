"""The engine gives what its slow twin gives, whatever it batches, reuses, interrupts or computes again."""

from copy import deepcopy

import pytest
import torch
from tests.serve.small import (
    DEVICE,
    EOT,
    MAX_TOKENS,
    TOKENIZER,
    TOP_2,
    answers,
    assert_nothing_leaks,
    assert_same,
    greedy,
    mixed_requests,
    tiny_engine,
    tiny_model,
)

from equipoise.models.attention_experts.configs import MixtureOfAttention, MixtureOfHeads, SwitchHead
from equipoise.models.config import Latent, MoEConfig
from equipoise.models.tokenizer import Tokenizer
from equipoise.ops.native import paged
from equipoise.routing import Hash, Threshold, TopK
from equipoise.serve.engine import Engine, Occupancy, OverloadedError, blocks_that_fit
from equipoise.serve.reference import answer
from equipoise.serve.request import Request, RequestError, Sampling
from equipoise.serve.scheduler import Limits

PROMPT = tuple(range(40, 61))
SHORTCUT = MoEConfig(num_experts=8, hidden_dim=16, router=TopK(k=1), shared_experts=1, shortcut="pos3")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def expect(model, request):
    return answer(model, TOKENIZER, request)


# ---------------------------------------------------------------------------------------------- the slow twin

MODELS = {
    "top-k": {},
    "gpt2": {"style": "gpt2"},
    "multi-head": {"num_kv_heads": 4},
    "one key head, normed": {"num_kv_heads": 1, "qk_norm": True},
    "threshold": {"router": Threshold(k=2, warmup=1)},
    "hash": {"router": Hash(vocab_size=257, k=2)},
    "shared expert": {"shared_experts": 1, "moe_layers": (1,)},
    "shortcut": {"moe": SHORTCUT, "num_layers": 4, "moe_layers": (1, 3)},
    "windows, sinks, biases": {"window": 5, "window_layers": (0,), "sinks": True, "attention_bias": "qkvo"},
    "latent": {"latent": Latent(kv_rank=12, nope_dim=8, rope_dim=4, value_dim=8), "num_kv_heads": None},
    "dense": {"moe": None},
    "moa": {"attention_moe": MixtureOfAttention(num_experts=4)},
    "switch head": {"attention_moe": SwitchHead(num_experts=3), "num_kv_heads": None},
    "mixture of heads, dense": {"attention_moe": MixtureOfHeads(shared_heads=1), "moe": None},
    "mixed": {"moe": MoEConfig(num_experts=8, hidden_dim=16, first_layers=1, first_router=Hash(vocab_size=257, k=1))},
}


@pytest.mark.parametrize("name", MODELS)
def test_mixed_requests_as_the_slow_twin(name):
    model = tiny_model(**MODELS[name])
    for layer in model.moe_layers.values():
        if hasattr(layer.router, "state"):
            layer.router.state.updates.fill_(1)  # thresholds of 0 decide: tokens have from none to all experts
    requests = mixed_requests(14)
    engine = tiny_engine(deepcopy(model).to(DEVICE), num_blocks=20)
    got = answers(engine, requests)
    assert got.keys() == {request.id for request in requests}
    for request in requests:
        assert_same(got[request.id], expect(model, request))
    assert len({output.finish for output in got.values()}) == 2
    assert_nothing_leaks(engine)


def test_thresholds_give_tokens_different_numbers_of_experts():
    model = tiny_model(**MODELS["threshold"])
    for layer in model.moe_layers.values():
        layer.router.state.updates.fill_(1)
    got = answers(tiny_engine(model), [greedy("a", PROMPT, 4, routed_experts=True)])["a"]
    assert got.experts.shape[:2] == (2, len(PROMPT) + 3)
    assert len(set((got.experts >= 0).sum(-1).ravel().tolist())) > 2


@pytest.mark.parametrize("limits", [Limits(max_running=1, tokens_per_step=2), Limits(max_running=14)])
def test_batched_equals_single(model, limits):
    requests = mixed_requests(14, seed=1)
    together = answers(tiny_engine(model, limits=limits), requests)
    for request in requests:
        assert_same(together[request.id], answers(tiny_engine(model, limits=Limits()), [request])[request.id])


@pytest.mark.parametrize("group", [False, True])
def test_a_limited_decode_batch_changes_no_answer(model, group):
    requests = mixed_requests(12, seed=2)
    limits = Limits(max_running=8, tokens_per_step=20, decode_batch=3, group_by_experts=group)
    got = answers(tiny_engine(model, num_blocks=24, limits=limits), requests)
    for request in requests:
        assert_same(got[request.id], expect(model, request))


@pytest.mark.parametrize("changes", [{}, {"window": 5, "window_layers": (0,), "sinks": True, "attention_bias": "qkvo"}])
def test_native_code_in_float32_as_the_slow_twin_in_float64(changes):
    """Sizes that native code takes: attention in blocks where they lie, linear layers, experts."""
    if reason := paged.unsupported(16, torch.float32, torch.device("cpu")):
        pytest.skip(reason)
    exact = tiny_model(dim=64, moe=MoEConfig(num_experts=8, hidden_dim=32, router=TOP_2), **changes)
    requests = mixed_requests(14)
    got = answers(tiny_engine(deepcopy(exact).float(), num_blocks=20), requests)
    for request in requests:
        assert_same(got[request.id], expect(exact, request), atol=1e-3)


def test_float32_in_small_blocks(model):
    single = tiny_model().float()
    request = greedy("a", PROMPT, 10)
    got = answers(tiny_engine(single, block_size=1, num_blocks=40), [request])["a"]
    assert_same(got, answers(tiny_engine(single, block_size=64), [request])["a"])


# ---------------------------------------------------------------------------------------------- prefixes

SIZE = 8


@pytest.mark.parametrize("shared", [SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, 21])
@pytest.mark.parametrize("own", [0, 1, SIZE - 1, SIZE])
def test_a_shared_prefix_changes_nothing(model, shared, own):
    first = greedy("first", PROMPT[:shared], 3)
    second = greedy("second", [*PROMPT[:shared], *range(own)], 4)
    engine = tiny_engine(model, block_size=SIZE)
    answers(engine, [first])
    got = answers(engine, [second])["second"]
    known = [*PROMPT[:shared], *expect(model, first).token_ids[:-1]]  # the last token was never computed
    same = 0
    while same < min(len(known), len(second.prompt)) and known[same] == second.prompt[same]:
        same += 1
    full_blocks = min(same, len(second.prompt) - 1) // SIZE  # one token at least is computed
    assert got.num_cached == full_blocks * SIZE
    assert_same(got, expect(model, second))


def test_what_asks_for_each_prompt_token_reuses_nothing(model):
    engine = tiny_engine(model)
    answers(engine, [greedy("first", PROMPT, 1)])
    for fields in ({"prompt_logprobs": True}, {"routed_experts": True}):
        request = greedy("second", PROMPT, 2, **fields)
        got = answers(engine, [request])["second"]
        assert got.num_cached == 0
        assert_same(got, expect(model, request))


def test_without_reuse_the_answers_are_the_same(model):
    requests = mixed_requests(12, seed=3)
    reusing, plain = tiny_engine(model), tiny_engine(model, prefix_reuse=False)
    with_reuse, without = answers(reusing, requests), answers(plain, requests)
    for request in requests:
        assert_same(with_reuse[request.id], without[request.id])
    assert sum(output.num_cached for output in with_reuse.values()) > 0
    assert sum(output.num_cached for output in without.values()) == 0


def test_num_cached_is_of_the_first_admission(model):
    limits = Limits(max_running=2, tokens_per_step=64)
    engine = tiny_engine(model, num_blocks=5, limits=limits)  # the second is interrupted, and finds its own blocks
    got = answers(engine, [greedy("a", PROMPT[:8], 20), greedy("b", PROMPT[8:16], 20)])
    assert engine.scheduler.num_preempted > 0
    assert [got[id].num_cached for id in "ab"] == [0, 0]


# ---------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("num_blocks", [12, 14, 20])
def test_preemption_loses_nothing_and_leaks_nothing(model, num_blocks):
    requests = [greedy(str(n), range(n, n + 5 + n), 40, routed_experts=n % 2 == 0) for n in range(8)]
    engine = tiny_engine(model, num_blocks=num_blocks, limits=Limits(max_running=8, tokens_per_step=30))
    got = answers(engine, requests)
    assert engine.scheduler.num_preempted > 0
    for request in requests:
        assert_same(got[request.id], expect(model, request))
    assert_nothing_leaks(engine)


def test_a_whole_context_fits_exactly(model):
    request = greedy("a", PROMPT, MAX_TOKENS - len(PROMPT), stop_ids=frozenset())
    engine = tiny_engine(model, num_blocks=MAX_TOKENS // 8)
    got = answers(engine, [request])["a"]
    assert len(got.token_ids) == MAX_TOKENS - len(PROMPT)
    assert_same(got, expect(model, request))
    with pytest.raises(RequestError, match="21 tokens and 76 new ones make 97, expected at most 96; shorten"):
        engine.add(greedy("b", PROMPT, MAX_TOKENS - len(PROMPT) + 1))


def test_the_cache_bounds_the_context_too(model):
    engine = tiny_engine(model, num_blocks=3)
    assert engine.max_tokens == 24
    assert len(answers(engine, [greedy("a", PROMPT, 3)])["a"].token_ids) == 3
    with pytest.raises(RequestError, match="make 25, expected at most 24"):
        engine.add(greedy("b", PROMPT, 4))


def test_no_tokens_but_the_prompts_probabilities(model):
    request = greedy("a", PROMPT, 0, prompt_logprobs=True, routed_experts=True)
    got = answers(tiny_engine(model), [request])["a"]
    assert (got.token_ids, got.finish, len(got.prompt_logprobs)) == ((), "length", len(PROMPT))
    assert_same(got, expect(model, request))


def test_changed_weights_are_used_from_the_next_token_on():
    model, other = tiny_model(), tiny_model(seed=1)
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = tiny_engine(model, limits=Limits())
    requests = [greedy("a", PROMPT, 12), greedy("b", [*PROMPT[:16], 7], 12)]

    def swap(step):
        if step == 5:
            model.load_state_dict(other.state_dict())
            engine.forget_cache()

    got = answers(engine, requests, between=swap)
    model.load_state_dict(old)
    for request in requests:
        before = answer(model, TOKENIZER, request).token_ids[:5]
        rest = answer(other, TOKENIZER, greedy(request.id, [*request.prompt, *before], 7)).token_ids
        assert got[request.id].token_ids == before + rest
    assert_nothing_leaks(engine)


def test_a_prefix_of_old_weights_is_not_used_again():
    model, other = tiny_model(), tiny_model(seed=1)
    engine = tiny_engine(model)
    answers(engine, [greedy("a", PROMPT, 2)])
    model.load_state_dict(other.state_dict())
    engine.forget_cache()
    got = answers(engine, [greedy("b", PROMPT, 6)])["b"]
    assert got.num_cached == 0
    assert_same(got, expect(other, greedy("b", PROMPT, 6)))


def test_cancel_gives_what_was_held_back_and_frees_all(model):
    engine = tiny_engine(model)
    text = expect(model, greedy("a", PROMPT, 1)).text
    engine.add(greedy("a", PROMPT, 30, stop=(text + "never",)))
    engine.add(greedy("b", PROMPT[::-1], 5))
    while not (pieces := [piece for piece in engine.step() if piece.id == "a"]):
        pass
    assert pieces[0].text == ""  # it may be the beginning of the stop
    [last] = engine.cancel("a")
    assert (last.finish, last.text) == ("cancelled", text)
    assert engine.cancel("a") == []
    assert engine.cancel("nobody") == []
    assert_same(answers(engine)["b"], expect(model, greedy("b", PROMPT[::-1], 5)))
    assert_nothing_leaks(engine)


@pytest.mark.parametrize("deadline", [0.0, 1.0])
def test_a_deadline_that_is_over(model, deadline):
    engine = tiny_engine(model)
    got = answers(engine, [greedy("late", PROMPT, deadline=deadline), greedy("other", PROMPT, deadline=1e12)])
    assert (got["late"].finish, got["late"].token_ids) == ("deadline", ())
    assert got["other"].finish == "length"
    assert_nothing_leaks(engine)


# ---------------------------------------------------------------------------------------------- what goes wrong


def broken(model, when):
    """A hook that raises before a forward for which `when(tokens)` is true."""

    def hook(module, args):
        if when(args[0].tolist()[0]):
            raise RuntimeError("out of order")

    return model.register_forward_pre_hook(hook)


def test_a_forward_that_fails_once_is_tried_again(model):
    requests = mixed_requests(6, seed=4)
    engine = tiny_engine(model)
    calls = iter(range(10**6))
    with broken(model, lambda tokens: next(calls) in (0, 3, 9, 10)):
        got = answers(engine, requests)
    for request in requests:
        assert_same(got[request.id], expect(model, request))
    assert_nothing_leaks(engine)


def test_only_failures_in_a_row_count(model):
    calls = iter(range(10**6))
    with broken(model, lambda tokens: next(calls) % 4 < 2):
        got = answers(tiny_engine(model), [greedy("a", PROMPT, 12)])["a"]
    assert_same(got, expect(model, greedy("a", PROMPT, 12)))


def test_a_model_that_always_fails_ends_all_requests(model):
    engine = tiny_engine(model)
    with broken(model, lambda tokens: True):
        got = answers(engine, mixed_requests(6))
    assert {(output.finish, output.error) for output in got.values()} == {("failed", "RuntimeError: out of order")}
    assert_nothing_leaks(engine)


def test_one_that_makes_the_forward_fail_takes_nobody_with_it(model):
    others = [greedy(str(n), range(n, n + 9), 12) for n in range(5)]
    engine = tiny_engine(model, limits=Limits())
    with broken(model, lambda tokens: 200 in tokens):
        got = answers(engine, [*others[:2], greedy("bad", [*PROMPT, 200], 5), *others[2:]])
    assert (got["bad"].finish, got["bad"].token_ids) == ("failed", ())
    for request in others:
        assert_same(got[request.id], expect(model, request))
    assert_nothing_leaks(engine)


@pytest.mark.parametrize("num_blocks", [8, 64])
@pytest.mark.parametrize("tokens_per_step", [9, 64])
def test_what_is_not_a_number_stays_with_its_own(num_blocks, tokens_per_step):
    model = tiny_model(tie_embeddings=False)
    bad, others = [*PROMPT[:16], 200, 1], [greedy(str(n), [*PROMPT[:16], *range(n)], 12) for n in range(5)]
    expected = {request.id: expect(model, request) for request in others}
    with torch.no_grad():
        model.embed_tokens.weight[200] = torch.nan
    engine = tiny_engine(model, num_blocks=num_blocks, limits=Limits(max_running=8, tokens_per_step=tokens_per_step))
    got = answers(engine, [greedy("bad", bad, 5), *others])
    assert (got["bad"].finish, got["bad"].error) == ("failed", "the model's output is not a number")
    for _ in range(2):  # also in the blocks that the bad one has left
        for request in others:
            assert_same(got[request.id], expected[request.id])
        got = answers(engine, others)
    assert_nothing_leaks(engine)


def test_what_is_not_a_number_is_not_found_again():
    """Once the cause is gone, the same prompt is computed anew."""
    model = tiny_model()
    expected = expect(model, greedy("again", PROMPT, 5))
    engine = tiny_engine(model, limits=Limits(max_running=2, tokens_per_step=10))
    hook = model.layers[0].register_forward_hook(lambda module, args, out: out * torch.nan)
    assert answers(engine, [greedy("bad", PROMPT, 5)])["bad"].finish == "failed"
    hook.remove()
    got = answers(engine, [greedy("again", PROMPT, 5)])["again"]
    assert got.num_cached == 0
    assert_same(got, expected)


def test_what_is_not_a_number_is_seen_before_others_can_share_it():
    """In the middle of a long prompt, not at its end."""
    model = tiny_model(tie_embeddings=False)
    with torch.no_grad():
        model.embed_tokens.weight[200] = torch.nan
    engine = tiny_engine(model, limits=Limits(max_running=2, tokens_per_step=18))
    prompt = [*PROMPT[:9], 200, *PROMPT, *PROMPT]
    engine.add(greedy("bad", prompt))
    assert [output.finish for output in engine.step()] == ["failed"]
    assert engine.pool.match(prompt)[0] == []
    assert_nothing_leaks(engine)


def test_a_prefix_that_was_damaged_is_not_found_again(model):
    """Whoever finds it fails; after that it is computed anew."""
    request = greedy("a", PROMPT, 3)
    engine = tiny_engine(model)
    answers(engine, [request])
    engine._runner.kv.values_LSHD.fill_(torch.nan)
    assert answers(engine, [request])["a"].finish == "failed"
    assert_same(answers(engine, [request])["a"], expect(model, request))


def test_a_vocabulary_that_is_filled_up():
    """Ids that the tokenizer doesn't know are neither asked for nor given, however likely."""
    model = tiny_model(vocab_size=320, tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[257:] *= 100
    request = Request("a", PROMPT, 20, Sampling(temperature=2.0), num_logprobs=20)
    engine = tiny_engine(model)
    got = answers(engine, [request])["a"]
    assert max(got.token_ids) <= EOT
    assert_same(got, expect(model, request))
    with pytest.raises(RequestError, match=r"prompt: expected token ids in \[0, 257\), got 257; use this model's"):
        engine.add(greedy("b", [257]))
    with pytest.raises(RequestError, match=r"logit_bias: expected token ids in \[0, 257\), got 300"):
        engine.add(Request("b", PROMPT, 1, Sampling(logit_bias={300: 1.0})))


def test_a_tokenizer_with_more_ids_than_the_model():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"cd": 257}
    engine = Engine(tiny_model(), Tokenizer("larger", ranks), num_blocks=8)
    with pytest.raises(RequestError, match=r"prompt: expected token ids in \[0, 257\), got 257"):
        engine.add(greedy("a", [257]))


def test_too_many_and_twice_the_same(model):
    engine = tiny_engine(model, limits=Limits(max_waiting=2))
    engine.add(greedy("a", PROMPT))
    with pytest.raises(RequestError, match="id: expected a new one, 'a' is being served"):
        engine.add(greedy("a", PROMPT))
    engine.add(greedy("b", PROMPT))
    with pytest.raises(OverloadedError, match="2 requests wait already"):
        engine.add(greedy("c", PROMPT))
    assert answers(engine).keys() == {"a", "b"}
    assert answers(engine, [greedy("a", PROMPT)]).keys() == {"a"}  # its name is free again


def test_reports_of_steps(model):
    reports = []
    engine = tiny_engine(model, on_step=reports.append)
    got = answers(engine, [greedy("a", PROMPT, 5), greedy("b", PROMPT[::-1], 3)])
    assert sum(report.num_prompt_tokens for report in reports) == 2 * len(PROMPT)
    assert sum(report.num_answer_tokens for report in reports) == sum(len(each.token_ids) for each in got.values())
    assert all(1 <= distinct <= 8 for report in reports for distinct in report.distinct_experts)
    assert all(report.seconds > 0 for report in reports)


def test_forwards_that_are_made_one_by_one_are_reported(model):
    """The first one of all fails. What is computed then is told of like any other."""
    reports, calls = [], iter(range(10**6))
    engine = tiny_engine(model, on_step=reports.append, limits=Limits())
    with broken(model, lambda tokens: next(calls) == 0):
        got = answers(engine, [greedy("a", PROMPT, 5), greedy("b", PROMPT[::-1], 3)])
    assert [report.num_prompt_tokens for report in reports[:2]] == [len(PROMPT)] * 2
    assert sum(report.num_answer_tokens for report in reports) == sum(len(each.token_ids) for each in got.values()) == 8
    assert all(min(report.distinct_experts) >= 1 and report.seconds > 0 for report in reports)


def test_how_full_it_is_also_between_steps(model):
    engine = tiny_engine(model, limits=Limits(max_running=1))
    for id in ("a", "b"):
        engine.add(greedy(id, PROMPT))
    engine.step()
    now = engine.occupancy()
    assert (now.num_running, now.num_waiting, now.num_blocks) == (1, 1, 64)
    assert now.free_blocks < 64
    for id in ("a", "b"):
        engine.cancel(id)  # no step comes after it
    assert engine.occupancy() == Occupancy(num_running=0, num_waiting=0, free_blocks=64, num_blocks=64)


def test_nothing_is_left_on_the_model():
    model = tiny_model()
    before = [len(layer.tap._forward_hooks) for layer in model.moe_layers.values()]
    engine = tiny_engine(model)
    answers(engine, [greedy("a", PROMPT)])
    engine.close()
    assert [len(layer.tap._forward_hooks) for layer in model.moe_layers.values()] == before


def test_how_many_blocks_fit(model):
    per_token = 2 * 2 * 2 * 8 * 8  # keys and values, layers, key heads, head size, bytes
    assert blocks_that_fit(model, 8, 50 * 8 * per_token / 2**30) == 50
    with pytest.raises(ValueError, match=r"cache_gb: one sequence of 96 tokens takes 4.58e-05 GB, got 1e-05; give"):
        blocks_that_fit(model, 8, 1e-5)
