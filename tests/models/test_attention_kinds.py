"""Windows, sinks, biases, whole norms and latents against loops over heads and queries, with and without a cache."""

import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from equipoise.models.attend import Sight, attend
from equipoise.models.cache import ContiguousCache
from equipoise.models.config import Latent
from equipoise.models.decoder import Decoder
from equipoise.models.latent_attention import LatentAttention
from equipoise.models.rope import LinearScaling, Llama3Scaling, YarnScaling, rotary_tables, rotate

KINDS = {
    "window": {"window": 3},
    "window in one layer": {"window": 4, "window_layers": (1,)},
    "sinks": {"sinks": True},
    "gpt-oss": {"sinks": True, "window": 3, "window_layers": (0,), "attention_bias": "qkvo", "qk_norm": False},
    "whole norm": {"qk_norm": "whole"},
    "biases": {"attention_bias": "qkv"},
    "latent": {
        "latent": Latent(kv_rank=12, q_rank=10, nope_dim=8, rope_dim=4, value_dim=6),
        "num_kv_heads": None,
        "qk_norm": False,
    },
    "latent, no query rank": {
        "latent": Latent(kv_rank=12, nope_dim=8, rope_dim=4, value_dim=6),
        "num_kv_heads": None,
        "qk_norm": False,
        "rope_scaling": YarnScaling(factor=4.0, original_max_seq_len=8, mscale=1.0, mscale_all_dim=1.0),
    },
}
EXACT = {"rtol": 1e-4, "atol": 1e-5}


def model_of(make_config, **kind) -> Decoder:
    model = Decoder(make_config(**kind)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", ".sinks")):
                torch.nn.init.normal_(parameter)
    return model


def naive_attend(q, k, v, window, sinks):
    """(H, S, D) of one sequence, one head and query at a time; queries are the last of the keys."""
    H, S, D = q.shape
    past = k.shape[1] - S
    out = torch.zeros(H, S, v.shape[-1])
    for h in range(H):
        kv = h * k.shape[0] // H
        for s in range(S):
            first = 0 if window is None else max(0, past + s + 1 - window)
            scores = k[kv, first : past + s + 1] @ q[h, s] / math.sqrt(D)
            if sinks is not None:
                scores = torch.cat([scores, sinks[h : h + 1]])
            weights = scores.softmax(0)
            out[h, s] = (weights if sinks is None else weights[:-1]) @ v[kv, first : past + s + 1]
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 99])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_attend_equals_the_loop(window, has_sinks):
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    sinks = torch.randn(4) if has_sinks else None
    expected = naive_attend(q[0], k[0], v[0], window, sinks)
    torch.testing.assert_close(attend(q, k, v, None, Sight(window, sinks))[0], expected, **EXACT)
    last = attend(q[:, :, -1:], k, v, None, Sight(window, sinks))  # one query, as in decoding
    torch.testing.assert_close(last[0, :, 0], expected[:, -1], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_one_by_one_through_a_cache_equals_all_at_once(make_config, kind):
    model = model_of(make_config, **KINDS[kind])
    tokens = torch.randint(0, 61, (2, 12))
    with torch.inference_mode():
        whole = model(tokens)
        cache = ContiguousCache(model.config, 2, 12)
        parts = [model(piece, cache=cache) for piece in tokens.split([5, 1, 1, 3, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(make_config, kind):
    model = model_of(make_config, **KINDS[kind])
    tokens = torch.randint(0, 61, (1, 8))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens], dim=1)
    with torch.inference_mode():
        got = model(padded, padding_mask=torch.arange(11)[None] < 3)[:, 3:]
        torch.testing.assert_close(got, model(tokens), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(make_config, kind):
    model = model_of(make_config, **KINDS[kind]).train()
    model(torch.randint(0, 61, (2, 12))).square().mean().backward()
    assert [name for name, each in model.named_parameters() if each.grad is None] == []
    if model.config.sinks:
        assert all(block.self_attn.sinks.grad.abs().sum() > 0 for block in model.layers)


def test_latent_attention_equals_the_loop(make_config):
    kind = KINDS["latent, no query rank"]
    config = make_config(**kind)
    layer = LatentAttention(config, 0)
    layer.init_weights(0.3, 0.3)
    latent, x = config.latent, torch.randn(1, 7, config.dim)
    rotary = rotary_tables(torch.arange(7)[None], latent.rope_dim, config.rope_theta, config.rope_scaling)
    both = layer.kv_a_proj_with_mqa(x)[0]
    content, turned = both[:, : latent.kv_rank], rotate(both[None, None, :, latent.kv_rank :], rotary)[0, 0]
    kv = layer.kv_b_proj(layer.kv_a_layernorm(content)).view(7, config.num_heads, -1)
    q = layer.q_proj(x)[0].view(7, config.num_heads, -1)
    heads = []
    for head in range(config.num_heads):
        q_turned = rotate(q[None, None, :, head, latent.nope_dim :], rotary)[0, 0]
        queries = torch.cat([q[:, head, : latent.nope_dim], q_turned], dim=1)
        keys = torch.cat([kv[:, head, : latent.nope_dim], turned], dim=1)
        mscale = (
            0.1 * math.log(4.0) + 1
        )  # arXiv 2309.00071, section 3.4, as DeepSeek applies it: squared, in the scores
        scores = queries @ keys.t() * mscale**2 / math.sqrt(latent.nope_dim + latent.rope_dim)
        weights = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1)
        heads.append(weights @ kv[:, head, latent.nope_dim :])
    expected = F.linear(torch.cat(heads, dim=1), layer.o_proj.weight)
    torch.testing.assert_close(layer(x, rotary)[0], expected, **EXACT)


SCALINGS = {
    "linear": (LinearScaling(factor=4.0), {"factor": 4.0}),
    "llama3": (
        Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64),
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "yarn": (
        YarnScaling(factor=32.0, original_max_seq_len=128, truncate=False),
        {"factor": 32.0, "original_max_position_embeddings": 128, "truncate": False},
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_transformers(name):
    modeling = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    scaling, parameters = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": name, "rope_theta": 10000.0} | parameters,
    )
    frequencies, factor = modeling.ROPE_INIT_FUNCTIONS[name](config, device="cpu")
    angles = torch.arange(300)[:, None].float() * frequencies
    cos, sin = rotary_tables(torch.arange(300)[None], 32, 10000.0, scaling)
    torch.testing.assert_close(cos[0, 0, :, :16], angles.cos() * factor, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(sin[0, 0, :, 16:], angles.sin() * factor, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"qk_norm": "half"}, "qk_norm: expected False, True or 'whole', got 'half'"),
        ({"window": 0}, "window: expected at least 1 token"),
        ({"window_layers": (1,)}, "window_layers: expected None without a window"),
        ({"latent": Latent(kv_rank=4, nope_dim=4, rope_dim=4, value_dim=4)}, "latent: expected neither num_kv_heads"),
    ],
)
def test_refuses(make_config, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_config(**wrong)
    with pytest.raises(ValueError, match="latent: expected an even rope_dim"):
        Latent(kv_rank=4, nope_dim=4, rope_dim=3, value_dim=4)
