import pytest
import torch

from equipoise.models.decoder import Decoder
from equipoise.models.generate import generate, sample

LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()  # probabilities by index, sorted: 1, 3, 2, 0


def drawn(**options) -> set[int]:
    """The tokens that 200 draws from LOGITS reach."""
    rng = torch.Generator().manual_seed(0)
    return set(sample(LOGITS.expand(200, 4), rng=rng, **options).flatten().tolist())


@pytest.fixture
def make_model(make_config):
    def make(**overrides) -> Decoder:
        torch.manual_seed(0)
        return Decoder(make_config(**overrides))

    return make


class TestSample:
    def test_all_tokens_without_options(self):
        assert drawn() == {0, 1, 2, 3}

    def test_greedy(self):
        assert drawn(temperature=0) == {1}

    def test_top_k(self):
        assert drawn(top_k=2) == {1, 3}

    def test_top_k_beyond_the_vocabulary(self):
        assert drawn(top_k=9) == {0, 1, 2, 3}

    @pytest.mark.parametrize(
        ("top_p", "kept"),
        # cumulative 0.4, 0.7, 0.9, 1.0: the fewest tokens that reach p
        [(0.01, {1}), (0.39, {1}), (0.5, {1, 3}), (0.8, {1, 2, 3}), (1.0, {0, 1, 2, 3})],
    )
    def test_top_p(self, top_p, kept):
        assert drawn(top_p=top_p) == kept

    def test_top_k_comes_before_top_p(self):
        # of {1, 3} renormalised, 0.4 / 0.7 = 0.57 reaches 0.5 alone; without top_k it would take two tokens
        assert drawn(top_k=2, top_p=0.5) == {1}

    def test_temperature_sharpens(self):
        # at 0.1 the probabilities go as p^10: the second has 0.75^10 = 0.056 of the first
        tokens = sample(LOGITS.expand(500, 4), temperature=0.1, rng=torch.Generator().manual_seed(0))
        assert (tokens == 1).float().mean() > 0.85

    def test_frequencies_follow_the_probabilities(self):
        tokens = sample(LOGITS.expand(4000, 4), rng=torch.Generator().manual_seed(0)).flatten()
        shares = tokens.bincount(minlength=4) / 4000
        torch.testing.assert_close(shares, LOGITS.exp()[0], atol=0.03, rtol=0)  # 4 sigma is 0.031


class TestGenerate:
    @pytest.mark.parametrize("style", ["modern", "gpt2"])
    @pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 3}, {"seed": 3, "top_k": 20, "top_p": 0.9}])
    def test_cache_and_no_cache_give_the_same_tokens(self, make_model, style, options):
        model, prompt = make_model(style=style), torch.randint(0, 61, (3, 6))
        fast = generate(model, prompt, 20, **options)
        assert fast.shape == (3, 26)
        assert fast[:, :6].equal(prompt)
        assert fast.equal(generate(model, prompt, 20, use_cache=False, **options))

    def test_greedy_takes_the_likeliest_next_token(self, make_model):
        model, prompt = make_model().eval(), torch.randint(0, 61, (1, 5))
        tokens = generate(model, prompt, 4, temperature=0)
        with torch.inference_mode():
            assert model(tokens)[0, 4:-1].argmax(-1).equal(tokens[0, 5:])

    def test_seeds(self, make_model):
        model, prompt = make_model(), torch.randint(0, 61, (2, 4))
        first = generate(model, prompt, 10, seed=1)
        assert first.equal(generate(model, prompt, 10, seed=1))
        assert not first.equal(generate(model, prompt, 10, seed=2))

    def test_a_row_does_not_depend_on_its_neighbours(self, make_model):
        model, prompt = make_model(), torch.randint(0, 61, (4, 5))
        together = generate(model, prompt, 12, temperature=0)
        assert generate(model, prompt[2:3], 12, temperature=0).equal(together[2:3])

    def test_stops_at_eos_and_fills_up(self, make_model):
        model, prompt = make_model(), torch.randint(0, 61, (2, 5))
        free = generate(model, prompt, 20, temperature=0)[:, 5:]
        eos = int(free[0, 3])
        tokens = generate(model, prompt, 20, temperature=0, eos_id=eos)[:, 5:]
        for free_row, row in zip(free, tokens, strict=True):
            hits = (free_row == eos).nonzero().flatten()
            end = int(hits[0]) + 1 if len(hits) else len(free_row)
            assert row[:end].equal(free_row[: min(end, len(row))])
            assert bool((row[end:] == eos).all())

    def test_ends_early_when_every_row_is_done(self, make_model):
        model, prompt = make_model(), torch.randint(0, 61, (1, 5))
        free = generate(model, prompt, 20, temperature=0)[0, 5:]
        first_hit = int((free == free[3]).nonzero()[0])
        assert generate(model, prompt, 20, temperature=0, eos_id=int(free[3])).shape == (1, 5 + first_hit + 1)

    @pytest.mark.parametrize("training", [True, False])
    def test_restores_the_mode(self, make_model, training):
        model = make_model().train(training)
        generate(model, torch.zeros(1, 1, dtype=torch.int64), 1)
        assert model.training is training

    def test_no_new_tokens(self, make_model):
        prompt = torch.randint(0, 61, (2, 5))
        assert generate(make_model(), prompt, 0).equal(prompt)

    def test_under_autocast(self, make_model):
        with torch.autocast("cpu", torch.bfloat16):
            assert generate(make_model(), torch.zeros(1, 3, dtype=torch.int64), 5).shape == (1, 8)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_new_tokens": 30}, r"max_new_tokens: prompt of 4 and 30 new tokens make 34, .* max_seq_len=32"),
            ({"max_new_tokens": -1}, r"max_new_tokens: expected 0 or more, got -1"),
            ({"temperature": -0.5}, r"temperature: expected 0 \(greedy\) or a positive number, got -0.5"),
            ({"temperature": float("nan")}, r"temperature: .*got nan"),
            ({"top_k": 0}, r"top_k: expected at least 1, got 0. Pass None"),
            ({"top_p": 1.5}, r"top_p: expected a probability in \(0, 1\], got 1.5"),
            ({"tokens_BS": torch.zeros(2, 0, dtype=torch.int64)}, r"tokens_BS: expected prompts .*got \(2, 0\)"),
        ],
    )
    def test_errors(self, make_model, options, message):
        arguments = {"tokens_BS": torch.zeros(1, 4, dtype=torch.int64), "max_new_tokens": 1} | options
        with pytest.raises(ValueError, match=message):
            generate(make_model(), **arguments)
