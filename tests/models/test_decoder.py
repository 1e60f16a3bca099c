import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F  # noqa: N812

from equipoise.models.attend import attend, attention_mask, token_positions
from equipoise.models.cache import ContiguousCache
from equipoise.models.config import MoEConfig
from equipoise.models.decoder import Decoder, check_parameter_count, cross_entropy_sum
from equipoise.routing import BiasBalance, SwitchLoss
from equipoise.types import BatchScope

STYLES = pytest.mark.parametrize("style", ["modern", "gpt2"])
FP32 = {"rtol": 0, "atol": 1e-5}


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 61, (batch, length))


@pytest.fixture
def make_model(make_config):
    def make(**overrides) -> Decoder:
        return Decoder(make_config(**overrides))

    return make


class ConcatenatingCache:
    """The protocol at its smallest: no preallocation, no limit. Stands for any cache that somebody else writes."""

    def __init__(self, num_layers: int) -> None:
        self.stored = [()] * num_layers
        self.length = 0

    def longest(self, num_new):
        return self.length + num_new

    def place(self, num_new, padding_BK, device):
        positions = token_positions(num_new, self.length, padding_BK, device)
        return positions, attention_mask(num_new, self.length, padding_BK, device)

    def attend(self, layer, q_BHSD, k_BHSD, v_BHSD, mask, sight):
        new = (k_BHSD, v_BHSD)
        old = self.stored[layer]
        self.stored[layer] = tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True)) if old else new
        return attend(q_BHSD, *self.stored[layer], mask, sight)

    def advance(self, num_tokens):
        self.length += num_tokens


class TestForward:
    @STYLES
    @pytest.mark.parametrize("tie_embeddings", [True, False])
    @pytest.mark.parametrize("moe_layers", [(), (1,), None])
    def test_shapes(self, make_model, style, tie_embeddings, moe_layers):
        model = make_model(style=style, tie_embeddings=tie_embeddings, moe_layers=moe_layers)
        assert model(tokens()).shape == (2, 12, 61)
        assert model(tokens(batch=0)).shape == (0, 12, 61)
        assert model(tokens(1, 1)).shape == (1, 1, 61)

    def test_moe_layers_by_name(self, make_model):
        model = make_model(moe_layers=(0, 2))
        assert list(model.moe_layers) == ["layers.0.mlp", "layers.2.mlp"]
        assert all(model.get_submodule(name) is layer for name, layer in model.moe_layers.items())

    def test_int32_tokens(self, make_model):
        model, batch = make_model().eval(), tokens()
        assert model(batch.int()).equal(model(batch))

    @STYLES
    def test_later_tokens_change_nothing_before(self, make_model, style):
        model, batch = make_model(style=style).eval(), tokens()
        changed = batch.clone()
        changed[:, 7] = (changed[:, 7] + 1) % 61
        before, after = model(batch), model(changed)
        # experts get groups of other sizes, so matmuls may round differently: equal but for that
        torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=2e-6)
        assert not after[:, 7:].isclose(before[:, 7:], atol=1e-3).all(dim=-1).any()

    @STYLES
    def test_later_tokens_change_no_bit_before_in_a_dense_model(self, make_model, style):
        model, batch = make_model(style=style, moe_layers=()).eval(), tokens()
        changed = batch.clone()
        changed[:, 7] = (changed[:, 7] + 1) % 61
        assert model(batch)[:, :7].equal(model(changed)[:, :7])

    @STYLES
    def test_order_matters(self, make_model, style):
        model, batch = make_model(style=style).eval(), tokens(1, 6)
        swapped = batch[:, [1, 0, 2, 3, 4, 5]]
        assert not model(batch)[0, -1].isclose(model(swapped)[0, -1], atol=1e-4).all()

    @STYLES
    def test_a_row_does_not_depend_on_its_neighbours(self, make_model, style):
        model, batch = make_model(style=style).eval(), tokens(5)
        torch.testing.assert_close(model(batch[3:4]), model(batch)[3:4], **FP32)

    def test_moe_layers_get_token_ids_padding_and_their_own_scope(self, make_model):
        # hooks see what the decoder hands to layer 0 and 1 of the MoE layers (layers 1 and 2 of the model)
        model, batch, seen = make_model(), tokens(), []
        padding = torch.zeros(2, 12, dtype=torch.bool)
        padding[1, 9:] = True
        counts = torch.tensor([[21, 21, 0, 0], [12, 12, 9, 9]])
        for layer in model.moe_layers.values():
            layer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
        model(batch, padding_mask=padding, scope=BatchScope(step=7, counts=counts))
        assert [kwargs["scope"].counts.tolist() for kwargs in seen] == counts.tolist()
        assert [kwargs["scope"].step for kwargs in seen] == [7, 7]
        assert all(kwargs["token_ids"].equal(batch) and kwargs["padding_mask"].equal(padding) for kwargs in seen)


class TestCachedForward:
    @STYLES
    @pytest.mark.parametrize("chunk", [1, 5, 12])
    @torch.inference_mode()
    def test_equals_one_forward(self, make_model, style, chunk):
        model, batch = make_model(style=style).eval(), tokens()
        cache = ContiguousCache(model.config, batch_size=2, max_len=12)
        pieces = [model(piece, cache=cache) for piece in batch.split(chunk, dim=1)]
        assert cache.length == 12
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(batch), **FP32)

    @STYLES
    @torch.inference_mode()
    def test_with_left_padding(self, make_model, style):
        model, batch = make_model(style=style).eval(), tokens()
        padding = torch.zeros(2, 12, dtype=torch.bool)
        padding[0, :4] = True
        cache = ContiguousCache(model.config, batch_size=2, max_len=12)
        pieces, end = [], 0
        for piece in batch.split([3, 6, 1, 1, 1], dim=1):
            end += piece.shape[1]
            pieces.append(model(piece, cache=cache, padding_mask=padding[:, :end]))
        logits = torch.cat(pieces, dim=1)
        torch.testing.assert_close(logits[:1, 4:], model(batch[:1, 4:]), **FP32)
        torch.testing.assert_close(logits[1:], model(batch[1:]), **FP32)

    @torch.inference_mode()
    def test_any_cache_of_the_protocol(self, make_model):
        model, batch = make_model().eval(), tokens()
        cache = ConcatenatingCache(model.config.num_layers)
        pieces = [model(piece, cache=cache) for piece in batch.split([4, 3, 1, 4], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(batch), **FP32)

    @torch.inference_mode()
    def test_a_refused_forward_leaves_the_cache_as_it_was(self, make_model):
        model, batch = make_model().eval(), tokens()
        cache = ContiguousCache(model.config, batch_size=2, max_len=12)
        model(batch[:, :8], cache=cache)
        with pytest.raises(ValueError, match="13 slots needed"):
            model(batch[:, :5], cache=cache)
        torch.testing.assert_close(model(batch[:, 8:], cache=cache), model(batch)[:, 8:], **FP32)

    @STYLES
    @pytest.mark.parametrize("tie_embeddings", [True, False])
    def test_logits_of_some_tokens(self, make_model, style, tie_embeddings):
        model, batch = make_model(style=style, tie_embeddings=tie_embeddings), tokens()
        at = torch.tensor([23, 0, 11, 11])
        torch.testing.assert_close(model(batch, logits_at=at), model(batch).flatten(0, 1)[at], **FP32)
        assert model(batch, logits_at=at[:0]).shape == (0, 61)


class TestPadding:
    @STYLES
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_real_tokens_are_as_without_padding(self, make_model, style, side):
        model, batch = make_model(style=style).eval(), tokens()
        real = slice(4, None) if side == "left" else slice(None, 8)
        padding = torch.zeros(2, 12, dtype=torch.bool)
        padding[0] = True
        padding[0, real] = False
        logits = model(batch, padding_mask=padding)
        torch.testing.assert_close(logits[:1, real], model(batch[:1, real]), **FP32)
        torch.testing.assert_close(logits[1:], model(batch[1:]), **FP32)

    @STYLES
    def test_a_row_of_padding_gives_no_nan_forward_or_backward(self, make_model, style):
        model = make_model(style=style)
        padding = torch.tensor([[True] * 12, [False] * 12])
        logits = model(tokens(), padding_mask=padding)
        logits.square().sum().backward()
        assert logits.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters())


class TestTraining:
    @STYLES
    def test_learns_a_fixed_batch(self, make_model, style):
        model, batch = make_model(style=style, init_std=0.02), tokens(4, 17)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(30):
            total, count = cross_entropy_sum(model(batch[:, :-1]), batch[:, 1:])
            loss = total / count
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) < 0.4  # from ln 61 = 4.1; 0.07 to 0.17 over four seeds

    @STYLES
    @pytest.mark.parametrize("tie_embeddings", [True, False])
    def test_gradients_reach_every_parameter(self, make_model, style, tie_embeddings):
        model, batch = make_model(style=style, tie_embeddings=tie_embeddings), tokens(4, 17)
        cross_entropy_sum(model(batch[:, :-1]), batch[:, 1:])[0].backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == []

    def test_checkpointed_experts_run_twice_count_once_and_change_no_gradient(self, make_config):
        batch = tokens()
        moe = MoEConfig(num_experts=4, hidden_dim=16, balance=(SwitchLoss(), BiasBalance()))
        plain = Decoder(make_config(moe=moe))
        thrifty = Decoder(make_config(moe=replace(moe, checkpoint_experts=True)))
        thrifty.load_state_dict(plain.state_dict())
        calls = {plain: 0, thrifty: 0}
        for model in calls:

            def count(*_, model=model):
                calls[model] += 1

            model.layers[1].mlp.register_forward_pre_hook(count)
            cross_entropy_sum(model(batch), batch)[0].backward()
            assert int(model.layers[1].mlp.balancer.pending.sum()) == 2 * 12 * 2  # B * S * K
        assert list(calls.values()) == [1, 2]
        assert all(a.grad.equal(b.grad) for a, b in zip(plain.parameters(), thrifty.parameters(), strict=True))

    @STYLES
    def test_bf16_autocast(self, make_model, style):
        model, batch, seen = make_model(style=style), tokens(), []
        for layer in model.moe_layers.values():
            layer.tap.register_forward_hook(lambda _, __, routed: seen.append(routed))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch)
            total, _ = cross_entropy_sum(logits, batch)
        total.backward()
        assert [routed.decision.logits_TE.dtype for routed in seen] == [torch.float32, torch.float32]
        assert logits.dtype == torch.bfloat16
        assert total.dtype == torch.float32
        assert total.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_initial_loss_is_that_of_a_guess(self, make_model):
        total, count = cross_entropy_sum(make_model(init_std=0.02)(tokens()), tokens())
        assert float((total / count).detach()) == pytest.approx(math.log(61), abs=0.1)

    def test_initial_spread(self, make_model):
        # the residual stream is added to 2 * 3 times: 0.1 / sqrt(6) = 0.0408
        model = make_model(dim=128, hidden_dim=256)
        assert float(model.embed_tokens.weight.detach().std()) == pytest.approx(0.1, rel=0.05)
        assert float(model.layers[0].self_attn.o_proj.weight.detach().std()) == pytest.approx(0.0408, rel=0.05)
        assert float(model.layers[0].mlp.down_proj.weight.detach().std()) == pytest.approx(0.0408, rel=0.05)
        assert float(model.layers[1].mlp.experts.down_proj.detach().std()) == pytest.approx(0.0408, rel=0.05)


class TestState:
    @STYLES
    @pytest.mark.parametrize("tie_embeddings", [True, False])
    def test_round_trip_is_bit_equal(self, make_model, tmp_path, style, tie_embeddings):
        model, batch = make_model(style=style, tie_embeddings=tie_embeddings).eval(), tokens()
        safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
        other = Decoder(model.config).eval()
        assert not other(batch).equal(model(batch))
        other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
        assert other(batch).equal(model(batch))

    def test_from_meta(self, make_model):
        model, batch = make_model().eval(), tokens()
        with torch.device("meta"):
            other = Decoder(model.config).eval()
        assert all(p.is_meta for p in other.parameters())
        other = other.to_empty(device="cpu")
        other.load_state_dict(model.state_dict())
        assert other(batch).equal(model(batch))

    def test_names(self, make_model):
        names = make_model(tie_embeddings=False).state_dict().keys()
        attention = {f"layers.1.self_attn.{p}_proj.weight" for p in "qkvo"}
        norms = {"layers.1.input_layernorm.weight", "layers.1.post_attention_layernorm.weight", "norm.weight"}
        experts = {"layers.1.mlp.router.weight", "layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"}
        assert attention | norms | experts | {"embed_tokens.weight", "lm_head.weight"} <= names

    def test_names_gpt2(self, make_model):
        names = make_model(style="gpt2").state_dict().keys()
        assert {"embed_positions.weight", "layers.1.mlp.experts.up_proj", "norm.bias"} <= names
        assert "lm_head.weight" not in names  # tied: safetensors refuses one tensor under two names

    def test_a_count_that_differs_is_an_error(self, make_model):
        model = make_model()
        with pytest.raises(
            RuntimeError, match=r"gives [\d,]+ parameters, the modules have [\d,]+\. .*parameter_counts"
        ):
            check_parameter_count(model, replace(model.config, vocab_size=62))


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((torch.zeros(1, 4),), r"tokens_BS: expected int64 tokens .*got torch.float32 of shape \(1, 4\)"),
            ((torch.zeros(4, dtype=torch.int64),), r"got torch.int64 of shape \(4,\).*tokens\[None\]"),
            ((torch.full((1, 4), 61),), r"expected ids in \[0, vocab_size=61\), got \[61, 61\]"),
            ((torch.full((1, 4), -1),), r"expected ids in \[0, vocab_size=61\), got \[-1, -1\]"),
            ((torch.zeros(1, 33, dtype=torch.int64),), r"at most max_seq_len=32 tokens .*got 33.*max_seq_len >= 33"),
            (
                (torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.bool)),
                r"padding_mask: expected bool of shape \(1, 4\).*got torch.bool of shape \(1, 3\)",
            ),
            (
                (torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4)),
                r"padding_mask: expected bool .*got torch.float32.*True marks padding",
            ),
        ],
    )
    def test_inputs(self, make_model, arguments, message):
        batch, padding = (*arguments, None)[:2]
        with pytest.raises(ValueError, match=message):
            make_model()(batch, padding_mask=padding)

    @torch.inference_mode()
    def test_cached_tokens_count_towards_the_limit(self, make_model):
        model = make_model().eval()
        cache = ContiguousCache(model.config, batch_size=2, max_len=64)
        model(tokens(2, 30), cache=cache)
        with pytest.raises(ValueError, match=r"got 33 \(30 of them cached\)"):
            model(tokens(2, 3), cache=cache)


class TestCrossEntropySum:
    def test_by_hand(self):
        # probabilities 1/2, 1/4, 1/4: targets 0 and 2 cost ln 2 + ln 4; the third row has no target
        logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(3, 3)
        total, count = cross_entropy_sum(logits, torch.tensor([0, 2, -100]))
        assert float(total) == pytest.approx(math.log(2) + math.log(4))
        assert int(count) == 2

    def test_no_targets(self):
        total, count = cross_entropy_sum(torch.randn(2, 3, 5), torch.full((2, 3), -100))
        assert (float(total), int(count)) == (0.0, 0)

    def test_chunks_equal_one_piece(self):
        logits = torch.randn(3, 7, 10, requires_grad=True)
        targets = torch.randint(0, 10, (3, 7))
        targets[0, :2] = -100
        total, count = cross_entropy_sum(logits, targets, max_chunk_elements=40)  # 4 rows of 10
        (gradient,) = torch.autograd.grad(total, logits)
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
        assert int(count) == 19

    def test_softmax_is_fp32(self):
        logits, targets = torch.randn(50, 30).bfloat16(), torch.randint(0, 30, (50,))
        total, _ = cross_entropy_sum(logits, targets)
        assert total.dtype == torch.float32
        torch.testing.assert_close(total, cross_entropy_sum(logits.float(), targets)[0])

    def test_shapes_must_match(self):
        with pytest.raises(ValueError, match=r"targets: expected shape \(2, 3\) .*got \(2, 4\)"):
            cross_entropy_sum(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))
