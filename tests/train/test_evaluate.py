"""Validation numbers against ones worked out apart, per domain and in all; and a sample of text."""

import math

import numpy as np
import pytest
import torch

from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.monitor.recorder import Recorder
from equipoise.train.data import TokenStream
from equipoise.train.evaluate import Evaluation, evaluate, sample_text
from equipoise.train.run import open_data

V, S = 11, 4


def build(vocab_size=V):
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "max_seq_len": 16, "init_std": 0.3}
    return Decoder(DecoderConfig(vocab_size=vocab_size, **sizes, moe=MoEConfig(num_experts=4, hidden_dim=8)))


def make_stream(num_tokens=2 * S + 1, ends=(5, 9), domains=(1, 0), names=("a", "b"), num_bytes=(12, 10)):
    """Two documents: tokens 0 to 4 are of domain b, 5 to 8 of domain a."""
    tokens = np.arange(num_tokens, dtype=np.uint16) * 7 % V
    return TokenStream(tokens, np.array(ends), np.array(domains), names, np.array(num_bytes), "made up")


def nats_of(model, stream):
    """-ln p of the tokens 1 to 8, each from the tokens of its window before it."""
    tokens = torch.from_numpy(stream.tokens_N.astype(np.int64))
    nats = []
    model.eval()
    with torch.no_grad():
        for first in (0, S):
            window = tokens[first : first + S + 1]
            logits = model(window[None, :-1])[0].double()
            nats += [float(logits[i].logsumexp(0) - logits[i, window[i + 1]]) for i in range(S)]
    model.train()
    return nats


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_by_hand(batch_size):
    model, stream = build(), make_stream()
    nats = nats_of(model, stream)
    result = evaluate(model, stream, batch_size, S, 5, bf16=False)
    assert result.loss == pytest.approx(sum(nats) / 8, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(sum(nats) / 8), rel=1e-6)
    # domain b has 10 bytes in 5 tokens, a has 12 in 4: 2 and 3 bytes per token. Token 0 is nobody's target, so that
    # 4 targets are of b (tokens 1 to 4) and 4 of a (5 to 8): 8 and 12 bytes
    bits = [n / math.log(2) for n in nats]
    assert result.by_domain == pytest.approx({"a": sum(bits[4:]) / 12, "b": sum(bits[:4]) / 8}, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(sum(bits) / 20, rel=1e-6)
    # the whole is the domains' average, weighted with their bytes
    assert result.bits_per_byte * 20 == pytest.approx(result.by_domain["a"] * 12 + result.by_domain["b"] * 8)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = build()
    for parameter in model.parameters():
        parameter.data.zero_()
    result = evaluate(model, make_stream(), 2, S, 5, bf16=False)
    assert result.loss == pytest.approx(math.log(V), rel=1e-6)
    assert result.perplexity == pytest.approx(V, rel=1e-5)


def test_a_domain_without_targets_is_left_out():
    stream = make_stream(ends=(9,), domains=(1,), names=("a", "b"), num_bytes=(0, 18))
    assert evaluate(build(), stream, 2, S, 5, bf16=False).by_domain.keys() == {"b"}


def test_a_loss_beyond_floats_is_a_large_perplexity_not_an_overflow():
    model = build()
    model.embed_tokens.weight.data *= 1e4
    result = evaluate(model, make_stream(), 2, S, 5, bf16=False)
    assert result.loss > 700
    assert math.isfinite(result.perplexity)


def test_it_leaves_mode_random_state_and_gradients_alone():
    model, stream = build(), make_stream()
    before = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        evaluate(model, stream, 2, S, 5, bf16=True)
        assert model.training is training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mode_is_put_back_after_an_error():
    model = build(vocab_size=V - 2)  # the stream has ids that it does not know
    with pytest.raises(ValueError, match=r"tokens_BS: expected ids in \[0, vocab_size=9\)"):
        evaluate(model, make_stream(), 2, S, 5, bf16=False)
    assert model.training


def test_max_batches():
    model, stream = build(), make_stream()
    nats = nats_of(model, stream)
    recorder = Recorder(model)
    assert evaluate(model, stream, 1, S, 1, bf16=False).loss == pytest.approx(sum(nats[:S]) / S, rel=1e-6)
    assert recorder.flush(0)[0].num_tokens == S


def test_scalars():
    result = Evaluation(loss=1.0, perplexity=2.7, bits_per_byte=0.5, by_domain={"a": 0.4, "b": 0.6})
    assert result.scalars() == {
        "val_perplexity": 2.7,
        "val_bits_per_byte": 0.5,
        "val_bits_per_byte.a": 0.4,
        "val_bits_per_byte.b": 0.6,
    }


def test_sample_text(make_config):
    config, data = open_data(make_config())
    model = Decoder(config.model)
    text = sample_text(model, data, "def ", num_tokens=8)
    assert text.startswith("def ")
    assert len(data.tokenizer.encode(text)) > len(data.tokenizer.encode("def "))
    assert sample_text(model, data, "def ", num_tokens=8) == text  # the same seed, the same text
    assert sample_text(model, data, "def ", num_tokens=8, seed=1) != text
    assert model.training
    assert sample_text(model, data, "def ", num_tokens=10_000).startswith(text)  # ends where the positions do
