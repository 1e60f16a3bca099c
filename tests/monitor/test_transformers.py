"""Models of transformers under watch: every number against a count by hand of what the experts were called with."""

import math

import pytest
import torch
import transformers
from tests.monitor.transformers_models import (
    CACHE,
    FAMILIES,
    VOCAB,
    E,
    K,
    Witness,
    batch,
    blocks,
    build,
    entropy,
    probabilities,
    router_of,
)

from equipoise.monitor.recorder import Recorder
from equipoise.monitor.watch import watch

every_family = pytest.mark.parametrize("family", FAMILIES)

# ------------------------------------------------------------------------------------------------ the right numbers


@every_family
@pytest.mark.parametrize("pad", [None, "left", "right"])
def test_statistics_by_hand(family, pad):
    model, (tokens, mask) = build(family), batch(pad=pad)
    witness = Witness(model)
    with watch(model, every=1) as eye:
        for _ in range(2):
            model(tokens, attention_mask=mask)
        eye.step(1)
    real = [mask.flatten().tolist()] * 2
    num_real = 2 * int(mask.sum())
    assert [stats.layer for stats in eye.stats()] == list(blocks(model))
    for stats in eye.stats():
        counts = witness.counts(stats.layer, real)
        assert (stats.num_tokens, stats.counts_E.tolist()) == (num_real, counts)
        assert sum(counts) == num_real * K
        logits = witness.real(witness.logits[stats.layer], real)
        probs = [probabilities(row, FAMILIES[family][2]) for row in logits]
        marginal = entropy([sum(p[e] for p in probs) / num_real for e in range(E)])
        per_token = sum(map(entropy, probs)) / num_real
        flat = [z for row in logits for z in row]
        mean = sum(flat) / len(flat)
        shares = [count / sum(counts) for count in counts]
        expected = {
            "token_entropy": per_token / math.log(E),
            "marginal_entropy": marginal / math.log(E),
            "mutual_information": marginal - per_token,
            "logit_mean": mean,
            "logit_std": math.sqrt(sum((z - mean) ** 2 for z in flat) / len(flat)),
            "logit_logsumexp": sum(math.log(sum(map(math.exp, row))) for row in logits) / num_real,
            "load_entropy": entropy(shares) / math.log(E),
            "effective_experts": math.exp(entropy(shares)),
            "max_violation": max(shares) * E - 1,
            "max_token_share": max(counts) / num_real,
        }
        for name, value in expected.items():
            assert getattr(stats, name) == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3"])
def test_selections_follow_from_the_routers_formula(family):
    """Not from what the model says that it chose, but from hidden states and weights, in fp64."""
    model, (tokens, mask) = build(family), batch(B=4, S=16)
    with torch.no_grad():
        for block in blocks(model).values():
            if family == "DeepseekV3":
                block.gate.e_score_correction_bias.uniform_(-0.3, 0.3)
    witness, recorder = Witness(model), Recorder(model)
    model(tokens, attention_mask=mask)
    for stats in recorder.flush(1):
        gate, counts = router_of(blocks(model)[stats.layer]), [0] * E
        weights = gate.weight.detach().double().tolist()
        bias = getattr(gate, "e_score_correction_bias", torch.zeros(E)).double().tolist()
        for x in witness.inputs[stats.layer][0].double().tolist():
            logits = [sum(a * b for a, b in zip(x, row, strict=True)) for row in weights]
            scores = probabilities(logits, "softmax")
            if family == "DeepseekV3":
                scores = [1 / (1 + math.exp(-z)) + b for z, b in zip(logits, bias, strict=True)]
            for expert in sorted(range(E), key=lambda e: -scores[e])[:K]:
                counts[expert] += 1
        assert stats.counts_E.tolist() == counts


@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
@pytest.mark.parametrize("family", ["Olmoe", "DeepseekV3"])
def test_every_one_of_the_k_choices(family, top_k):
    model, (tokens, mask) = build(family, num_experts=16, top_k=top_k, norm_topk_prob=False), batch(pad="left")
    witness, recorder = Witness(model), Recorder(model)
    model(tokens, attention_mask=mask)
    for stats in recorder.flush(1):
        assert stats.counts_E.tolist() == witness.counts(stats.layer, [mask.flatten().tolist()], 16)
        assert stats.counts_E.sum() == int(mask.sum()) * top_k
        logits = witness.real(witness.logits[stats.layer], [mask.flatten().tolist()])
        probs = [probabilities(row, FAMILIES[family][2]) for row in logits]
        expected = sum(map(entropy, probs)) / len(probs) / math.log(16)
        assert stats.token_entropy == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["GptOss", "DeepseekV3"])
def test_the_last_experts_are_dead_and_are_seen(family):
    """The number of experts is not the largest index that was seen."""
    model, (tokens, _) = build(family), batch(B=8, S=64)
    with torch.no_grad():
        for block in blocks(model).values():
            bias = router_of(block).bias if family == "GptOss" else block.gate.e_score_correction_bias
            bias[-3:] = -1e4
    recorder = Recorder(model)
    model(tokens)
    for stats in recorder.flush(1):
        assert len(stats.counts_E) == stats.num_experts == E
        assert stats.counts_E[-3:].tolist() == [0, 0, 0]
        assert set(stats.dead_experts) >= {E - 3, E - 2, E - 1}


@every_family
def test_a_padded_batch_counts_as_its_sequences_alone(family):
    """No observer of the padded batch is needed: nothing is padded in the other run."""
    model, (tokens, mask) = build(family), batch(pad="right")
    padded, alone = Recorder(model), Recorder(model)
    with alone.paused():
        model(tokens, attention_mask=mask)
    with padded.paused():
        for row, real in zip(tokens, mask, strict=True):
            model(row[real.bool()][None])
    for one, other in zip(padded.flush(1), alone.flush(1), strict=True):
        assert (one.num_tokens, one.counts_E.tolist()) == (other.num_tokens, other.counts_E.tolist())
        assert one.token_entropy == pytest.approx(other.token_entropy, rel=1e-5)
        assert one.logit_std == pytest.approx(other.logit_std, rel=1e-5)


def test_more_than_a_million_tokens():
    """Counts are integers: nothing saturates and nothing is rounded."""
    model = build(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, num_key_value_heads=1, intermediate_size=8)
    recorder, total, name = Recorder(model), torch.zeros(E, dtype=torch.int64), "model.layers.0.mlp"

    def count(module, args):
        total.add_(torch.bincount(args[1].flatten(), minlength=E))

    model.model.layers[0].mlp.experts.register_forward_pre_hook(count)
    tokens = torch.randint(3, VOCAB, (8192, 16))
    with torch.no_grad():
        for _ in range(8):
            model.model(tokens, use_cache=False)
    [stats] = recorder.flush(1)
    assert (stats.layer, stats.num_tokens) == (name, 8 * 8192 * 16)
    assert stats.num_tokens > 1_000_000
    assert stats.counts_E.tolist() == total.tolist()
    assert stats.counts_E.sum() == stats.num_tokens * K


# ---------------------------------------------------------------------------------------------------- under generate


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("family", ["Olmoe", "GptOss", "DeepseekV3"])
def test_generate(family, cache):
    """The mask covers the cache, the input is what is new; a static cache gets masks of its own kind."""
    model, (tokens, mask) = build(family), batch(pad="left")
    witness, recorder = Witness(model), Recorder(model)
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    model.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, **options)
    prompt, B, new = mask.flatten().tolist(), len(tokens), 4  # the last token is not put through the model
    if cache is None:
        steps = [torch.cat([mask, mask.new_ones(B, n)], 1).flatten().tolist() for n in range(new + 1)]
    else:
        steps = [prompt] + [[1] * B] * new
    for stats in recorder.flush(1):
        assert stats.num_tokens == sum(map(sum, steps))
        assert stats.counts_E.tolist() == witness.counts(stats.layer, steps)


def test_generate_with_padding_at_the_right_and_beams():
    model, (tokens, mask) = build(), batch(pad="right")
    witness, recorder = Witness(model), Recorder(model)
    model.generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False, num_beams=2)
    steps = [mask.repeat_interleave(2, 0).flatten().tolist(), [1] * 6, [1] * 6]
    for stats in recorder.flush(1):
        assert stats.counts_E.tolist() == witness.counts(stats.layer, steps)


def test_a_prompt_in_two_parts():
    """Chunked prefill: the second part brings several tokens, padding among them, after what is cached."""
    model, (tokens, mask) = build(), batch(S=8, pad="right")
    witness, recorder = Witness(model), Recorder(model)
    cache = model(tokens[:, :3], attention_mask=mask[:, :3], use_cache=True)[CACHE]
    model(tokens[:, 3:], attention_mask=mask, use_cache=True, **{CACHE: cache})
    steps = [mask[:, :3].flatten().tolist(), mask[:, 3:].flatten().tolist()]
    for stats in recorder.flush(1):
        assert stats.num_tokens == int(mask.sum())
        assert stats.counts_E.tolist() == witness.counts(stats.layer, steps)


@pytest.mark.parametrize("passed", ["by name", "by position"])
def test_a_static_cache_tells_how_much_of_the_mask_is_past(passed):
    """The mask is as wide as the cache: which columns are those of the new tokens, only the cache knows."""
    model, (tokens, mask) = build(), batch(S=8, pad="left")
    witness, recorder = Witness(model), Recorder(model)
    cache = transformers.StaticCache(config=model.config, max_cache_len=12)
    wide = torch.cat([mask, mask.new_zeros(len(mask), 4)], 1)
    for part in (tokens[:, :5], tokens[:, 5:]):
        if passed == "by name":
            model(part, attention_mask=wide, use_cache=True, **{CACHE: cache})
        else:
            model(part, wide, None, cache)
    steps = [mask[:, :5].flatten().tolist(), mask[:, 5:].flatten().tolist()]
    for stats in recorder.flush(1):
        assert stats.num_tokens == int(mask.sum())
        assert stats.counts_E.tolist() == witness.counts(stats.layer, steps)


def test_a_mask_that_does_not_fit_the_batch_of_a_model():
    model, (tokens, mask) = build(), batch()
    with watch(model), pytest.raises(ValueError, match=r"expected shape \(3, 7 or more\).* got \(2, 7\)"):
        model(tokens, attention_mask=mask[:2])
    model(tokens)  # and nothing of it is left
