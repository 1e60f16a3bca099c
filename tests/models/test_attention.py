import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from equipoise.models.attend import attention_mask, token_positions
from equipoise.models.attention import Attention
from equipoise.models.cache import ContiguousCache
from equipoise.models.rope import rotary_tables, rotate

CPU = torch.device("cpu")


def padding(*rows: str) -> torch.Tensor:
    """One string per sequence: '.' is a token, 'x' is padding."""
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


class TestPositions:
    def test_counts_on_from_the_cache(self):
        assert token_positions(3, 4, None, CPU).tolist() == [[4, 5, 6]]

    def test_padding_does_not_move_real_tokens(self):
        # real tokens count 0, 1, 2 wherever the padding is
        positions = token_positions(5, 0, padding("xx...", "...xx"), CPU)
        assert positions[0, 2:].tolist() == [0, 1, 2]
        assert positions[1, :3].tolist() == [0, 1, 2]
        assert positions.min() >= 0

    def test_padding_in_the_cache(self):
        # slots: two padding, two cached tokens (0, 1), one new token, which is the third: position 2
        assert token_positions(1, 4, padding("xx..."), CPU).tolist() == [[2]]


class TestMask:
    @pytest.mark.parametrize(("queries", "past"), [(5, 0), (1, 0), (1, 7)])
    def test_none_where_the_flag_says_it_all(self, queries, past):
        assert attention_mask(queries, past, None, CPU) is None

    def test_chunk_on_a_filled_cache(self):
        # two new tokens after three: the first sees keys 0..3, the second 0..4
        expected = [[True, True, True, True, False], [True, True, True, True, True]]
        assert attention_mask(2, 3, None, CPU)[0, 0].tolist() == expected

    def test_padding_is_hidden_but_sees_itself(self):
        # query 0 is padding and sees only itself; query 1 and 2 see the tokens from 1 on
        expected = [[True, False, False], [False, True, False], [False, True, True]]
        assert attention_mask(3, 0, padding("x.."), CPU)[0, 0].tolist() == expected


class TestRotary:
    def test_angles_by_hand(self):
        # head_dim 4, theta 100: frequencies 100^0 = 1 and 100^(-2/4) = 0.1; at position 3 the angles are 3 and 0.3
        cos, sin = rotary_tables(torch.tensor([[3]]), head_dim=4, theta=100.0)
        assert cos.flatten().tolist() == pytest.approx(2 * [math.cos(3), math.cos(0.3)], abs=1e-6)
        expected = [-math.sin(3), -math.sin(0.3), math.sin(3), math.sin(0.3)]
        assert sin.flatten().tolist() == pytest.approx(expected, abs=1e-6)

    def test_turns_the_halves_as_pairs(self):
        # pair (x0, x2) turns by 90 degrees: (1, 0) -> (0, 1); pair (x1, x3) by 0
        cos, sin = torch.tensor([[0.0, 1.0, 0.0, 1.0], [-1.0, 0.0, 1.0, 0.0]]).view(2, 1, 1, 1, 4)
        turned = rotate(torch.tensor([1.0, 5.0, 0.0, 7.0]).view(1, 1, 1, 4), (cos, sin))
        torch.testing.assert_close(turned.flatten(), torch.tensor([0.0, 5.0, 1.0, 7.0]))

    def test_scores_depend_on_distance_only(self):
        q, k = torch.randn(2, 1, 1, 1, 8)

        def score(query_at: int, key_at: int) -> float:
            q_turned = rotate(q, rotary_tables(torch.tensor([[query_at]]), 8, 10000.0))
            k_turned = rotate(k, rotary_tables(torch.tensor([[key_at]]), 8, 10000.0))
            return float((q_turned * k_turned).sum())

        assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
        assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)

    def test_tables_are_fp32_under_autocast(self):
        with torch.autocast("cpu", torch.bfloat16):
            cos, _ = rotary_tables(torch.tensor([[1001]]), 8, 10000.0)
        assert cos.dtype == torch.float32
        assert float(cos[0, 0, 0, 0]) == pytest.approx(math.cos(1001), abs=1e-5)


def naive_attention(attention: Attention, x: torch.Tensor, config, positions: torch.Tensor) -> torch.Tensor:
    """One sequence, one head and one query at a time."""
    rotary = rotary_tables(positions, config.head_size, config.rope_theta)
    heads = []
    for head in range(config.num_heads):
        q, k, v = (
            linear(x)[0].unflatten(-1, (-1, config.head_size))[:, index]
            for linear, index in (
                (attention.q_proj, head),
                (attention.k_proj, head * config.kv_heads // config.num_heads),
                (attention.v_proj, head * config.kv_heads // config.num_heads),
            )
        )
        if config.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = (rotate(y[None, None], rotary)[0, 0] for y in (q, k))
        rows = []
        for t in range(len(q)):
            weights = (k[: t + 1] @ q[t] / math.sqrt(config.head_size)).softmax(0)
            rows.append(weights @ v[: t + 1])
        heads.append(torch.stack(rows))
    return F.linear(torch.cat(heads, dim=-1), attention.o_proj.weight)[None]


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_naive_loop(make_config, kv_heads, qk_norm):
    config = make_config(num_kv_heads=kv_heads, qk_norm=qk_norm, head_dim=6)
    attention = Attention(config, layer=0)
    attention.init_weights(std=0.3, output_std=0.3)
    x, positions = torch.randn(1, 7, config.dim), torch.arange(7)[None]
    rotary = rotary_tables(positions, config.head_size, config.rope_theta)
    torch.testing.assert_close(
        attention(x, rotary), naive_attention(attention, x, config, positions), rtol=1e-5, atol=1e-5
    )


class TestCache:
    def keys(self, config, length=3, batch=2, dtype=torch.float32):
        return torch.randn(batch, config.kv_heads, length, config.head_size, dtype=dtype)

    def test_returns_all_so_far_and_keeps_its_length_until_told(self, make_config):
        config = make_config()
        cache = ContiguousCache(config, batch_size=2, max_len=5)
        first, second = self.keys(config), self.keys(config, length=2)
        cache.update(0, first, -first)
        cache.update(1, 2 * first, first)
        assert cache.length == 0
        cache.advance(3)
        keys, values = cache.update(0, second, -second)
        assert keys.equal(torch.cat((first, second), dim=2))
        assert values.equal(-keys)

    def test_full(self, make_config):
        config = make_config()
        cache = ContiguousCache(config, batch_size=2, max_len=2)
        with pytest.raises(ValueError, match=r"cache: 3 slots needed, 2 allocated. Make .* max_len >= 3"):
            cache.update(0, self.keys(config), self.keys(config))

    def test_wrong_batch(self, make_config):
        config = make_config()
        cache = ContiguousCache(config, batch_size=1, max_len=8)
        with pytest.raises(ValueError, match=r"cache: expected keys of .*\(1, 2, 8\), got \(2, 2, 8\)"):
            cache.update(0, self.keys(config), self.keys(config))

    def test_wrong_dtype(self, make_config):
        config = make_config()
        cache = ContiguousCache(config, batch_size=2, max_len=8, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"expected keys in torch.bfloat16, got torch.float32. .* dtype=torch.f"):
            cache.update(0, self.keys(config), self.keys(config))

    def test_gradients(self, make_config):
        config = make_config()
        cache = ContiguousCache(config, batch_size=2, max_len=8)
        with pytest.raises(ValueError, match=r"expected keys without gradients.*inference_mode"):
            cache.update(0, self.keys(config).requires_grad_(), self.keys(config))
