"""Parameter arithmetic: against what makers publish, against our own decoder, against what transformers builds."""

import json
import random
from dataclasses import replace

import pytest
import torch

from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.config import Latent as DecoderLatent
from equipoise.models.parameters import parameter_counts
from equipoise.plan.fit.architecture import Architecture, GroupedQuery, Latent, Routed
from equipoise.plan.fit.decoder_file import ROUTERS as PLANNED_ROUTERS
from equipoise.plan.fit.hugging_face import READERS
from equipoise.plan.fit.known import KNOWN
from equipoise.plan.fit.model_file import of_values
from equipoise.plan.fit.parameters import parameters
from equipoise.routing import ROUTERS, Hash, TopK, TwoTier

ROUNDED = {"kimi-k2", "minimax-m2", "glm-4.5"}  # `note` says how


def published_total(known):
    """Of the decoder and of what else is counted."""
    extra = known.extra.parameters if known.extra is not None and known.extra.counted else 0
    return parameters(known.model).total + extra


def test_there_are_eighteen_models():
    assert len(KNOWN) == 18
    assert all(name == known.model.name for name, known in KNOWN.items())


@pytest.mark.parametrize("name", sorted(KNOWN.keys() - ROUNDED))
def test_totals_are_the_published_ones(name):
    known = KNOWN[name]
    assert published_total(known) / 1e9 == pytest.approx(known.total_b, rel=0.005)


@pytest.mark.parametrize("name", sorted(ROUNDED))
def test_where_they_are_not_the_table_says_by_how_much(name):
    known = KNOWN[name]
    off = 1 - published_total(known) / 1e9 / known.total_b
    assert 0.005 < off < 0.014
    assert f"{100 * off:.1f} % less than" in known.note


def test_the_layer_for_prediction_of_glm_closes_the_gap():
    known = KNOWN["glm-4.5"]
    assert (parameters(known.model).total + known.extra.parameters) / 1e9 == pytest.approx(356.8, abs=0.05)


def test_published_active_counts_follow_one_convention_or_the_other():
    for name, known in KNOWN.items():
        counts = parameters(known.model)
        both = (counts.active / 1e9, counts.active_no_embedding / 1e9)
        assert min(abs(each / known.active_b - 1) for each in both) < 0.05, name


def test_mixtral_by_hand():
    # attention 2 * 4096 * (32 + 8) * 128 = 41,943,040 per layer; an expert 3 * 4096 * 14336 = 176,160,768
    counts = parameters(KNOWN["mixtral-8x7b"].model)
    assert counts.attention == 32 * 41_943_040
    assert counts.experts == 32 * 8 * 176_160_768
    assert counts.total == 46_702_792_704
    assert counts.active == counts.total - 32 * 6 * 176_160_768


def test_latent_attention_by_hand():
    # of V3: 7168 * 1536 + 1536 + 1536 * 128 * 192, 7168 * 576 + 512 + 512 * 128 * 256, 128 * 128 * 7168
    layer = 11_010_048 + 1_536 + 37_748_736 + 4_128_768 + 512 + 16_777_216 + 117_440_512
    assert KNOWN["deepseek-v3"].model.attention.parameters(7168) == layer


def test_the_vision_tower_of_llama_4_by_hand():
    layer = 4 * 1408 * 1408 + 4 * 1408 + 2 * 1408 * 5632 + 5632 + 1408 + 4 * 1408  # attention, MLP, norms; with biases
    around = 1408 + 577 * 1408 + 4 * 1408 + 3 * 14 * 14 * 1408  # class, positions, norms, patches
    projector = 5632 * 4096 + 4096 * 4096 + 4096 * 5120
    assert KNOWN["llama-4-scout"].extra.parameters == 34 * layer + around + projector


# ---------------------------------------------------------------------------------------------- our own decoder


def ours(**more):
    sizes = {"vocab_size": 96, "dim": 32, "num_layers": 3, "num_heads": 4, "hidden_dim": 48, "max_seq_len": 40}
    return DecoderConfig(**(sizes | more))


MOE = MoEConfig(num_experts=8, hidden_dim=24, router=TopK(k=2))


@pytest.mark.parametrize(
    "config",
    [
        ours(),
        ours(style="gpt2", moe=MOE),
        ours(num_kv_heads=2, head_dim=6, qk_norm=True, tie_embeddings=False),
        ours(moe=MOE, moe_layers=(1,)),
        ours(moe=MOE, moe_layers=()),
        ours(moe=replace(MOE, shared_experts=2, shared_gate=True)),
        ours(moe=replace(MOE, first_layers=2, first_router=Hash(vocab_size=96, k=4))),
        ours(moe=replace(MOE, router=TwoTier(k=2, num_groups=4))),
        ours(qk_norm="whole", num_kv_heads=2, attention_bias="qkv"),
        ours(sinks=True, window=8, window_layers=(0, 2), attention_bias="qkvo"),
        ours(moe=replace(MOE, expert_bias=True, activation="clamped_swiglu", router=TopK(k=2, linear_bias=True))),
        ours(latent=DecoderLatent(kv_rank=12, q_rank=10, nope_dim=8, rope_dim=4, value_dim=6), attention_bias="qkvo"),
        ours(latent=DecoderLatent(kv_rank=12, nope_dim=8, rope_dim=4, value_dim=6)),
    ],
    ids=str,
)
def test_our_decoders_count_as_they_do_themselves(config):
    same(config)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.__name__)
def test_every_router_is_known(router):
    assert {each.__name__ for each in ROUTERS} == PLANNED_ROUTERS.keys()
    more = {"allow_future": True} if "allow_future" in router.__dataclass_fields__ else {}
    same(ours(moe=MoEConfig(num_experts=8, hidden_dim=24, router=router(**more))))


def same(config):
    mine, theirs = parameters(of_values(json.loads(config.to_json()), "it")), parameter_counts(config)
    for part in theirs.__dataclass_fields__:
        assert getattr(mine, part, 0) == getattr(theirs, part), part  # 0: layers that the planner refuses


# ---------------------------------------------------------------------------------------------- transformers


def sizes_of(kind, dice):
    """Random small sizes of a family, in the words of its configuration."""
    heads = dice.choice((2, 4, 6))
    kv_heads = dice.choice([n for n in (1, 2, 3) if heads % n == 0])
    head_dim, experts, layers = 2 * dice.randint(2, 6), dice.choice((4, 6, 8)), dice.randint(2, 5)
    flip = lambda: dice.random() < 0.5  # noqa: E731
    found = {
        "vocab_size": dice.randint(20, 90),
        "hidden_size": heads * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": dice.randint(5, 40),
        "tie_word_embeddings": flip(),
        "num_experts_per_tok": dice.randint(1, 3),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    small = {"moe_intermediate_size": dice.randint(5, 30)}
    shared = {"n_shared_experts": dice.randint(1, 2), "first_k_dense_replace": dice.randint(0, layers - 1)}
    latent = {
        "kv_lora_rank": dice.randint(4, 12),
        "q_lora_rank": dice.choice((None, 8)),
        "qk_nope_head_dim": 2 * dice.randint(2, 5),
        "qk_rope_head_dim": 2 * dice.randint(1, 4),
        "v_head_dim": 2 * dice.randint(2, 5),
        "n_routed_experts": experts,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": heads,
        "attention_bias": flip(),
    }
    steps = {"decoder_sparse_step": dice.randint(1, 2), "mlp_only_layers": [layers - 1] if flip() else []}
    more = {
        "llama": {"attention_bias": flip(), "mlp_bias": flip()},
        "mistral": {"sliding_window": dice.choice((None, 8))},
        "qwen2": {},
        "qwen3": {"attention_bias": flip(), "head_dim": head_dim + 2},
        "mixtral": {"num_local_experts": experts, "head_dim": dice.choice((None, head_dim + 2))},
        "olmoe": {"num_experts": experts, "attention_bias": flip()},
        "granitemoe": {"num_local_experts": experts, "attention_bias": flip()},
        "qwen2_moe": small
        | steps
        | {"num_experts": experts, "shared_expert_intermediate_size": 11, "qkv_bias": flip()},
        "qwen3_moe": small | steps | {"num_experts": experts, "head_dim": head_dim + 2, "attention_bias": flip()},
        "deepseek_v2": small | shared | latent,
        "deepseek_v3": small | shared | latent,
        "glm4_moe": small | shared | {"n_routed_experts": experts, "use_qk_norm": flip(), "attention_bias": flip()},
        "gpt_oss": {"num_local_experts": experts, "head_dim": head_dim + 2},
        "llama4_text": {
            "num_local_experts": experts,
            "head_dim": head_dim + 2,
            "intermediate_size_mlp": dice.randint(5, 40),
            "interleave_moe_layer_step": dice.randint(1, 2),
            "attention_bias": flip(),
        },
        "phimoe": {"num_local_experts": experts, "attention_bias": flip(), "lm_head_bias": flip()},
        "minimax_m2": {"num_local_experts": experts, "head_dim": head_dim + 2},
    }
    if kind == "dbrx":
        attention = {"kv_n_heads": kv_heads, "rope_theta": 5e5}
        feed_forward = {"moe_num_experts": experts, "moe_top_k": 2}
        return {
            "vocab_size": found["vocab_size"],
            "d_model": heads * head_dim,
            "n_heads": heads,
            "n_layers": layers,
            "attn_config": attention,
            "ffn_config": feed_forward | {"ffn_hidden_size": 14, "hidden_size": heads * head_dim},
        }
    return found | more[kind]


@pytest.mark.parametrize("kind", sorted(READERS.keys() - {"kimi_k2"}))  # which is deepseek_v3 by another name
def test_small_models_have_what_transformers_builds(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    for seed in range(3):
        config = AutoConfig.for_model(kind, **sizes_of(kind, random.Random(f"{kind} {seed}")))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        built = sum(parameter.numel() for parameter in model.parameters())
        built += sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
        read = of_values(json.loads(config.to_json_string()), kind)
        assert parameters(read).total == built, config


# ---------------------------------------------------------------------------------------------- what is refused

ATTENTION = GroupedQuery(heads=4, kv_heads=2, head_dim=8)
ROUTED = Routed(num=4, k=2, hidden_dim=8, router_parameters=128)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GroupedQuery(heads=4, kv_heads=3, head_dim=8), "kv_heads: expected a divisor of heads = 4, got 3"),
        (lambda: GroupedQuery(heads=0, kv_heads=3, head_dim=8), "heads: expected 1 to 1,000,000,000, got 0"),
        (lambda: GroupedQuery(heads=4, kv_heads=4, head_dim=2.5), "head_dim: expected a whole number, got 2.5"),
        (lambda: GroupedQuery(heads=True, kv_heads=1, head_dim=2), "heads: expected a whole number, got True"),
        (lambda: Latent(heads=4, q_rank=-1, kv_rank=4, nope_dim=4, rope_dim=2, value_dim=4), "q_rank: expected 1 to"),
        (lambda: replace(ROUTED, k=5), "k: expected at most the 4 experts, got 5 per token"),
        (lambda: replace(ROUTED, groups=2, top_groups=3), "top_groups: expected 1 to groups = 2, got 3"),
        (lambda: made(layers=10**6), "layers: expected at most 100000, got 1000000"),
        (lambda: made(vocab=10**10), "vocab: expected 1 to 1,000,000,000, got 10000000000"),
        (lambda: made(dim=float("nan")), "dim: expected a whole number, got nan"),
        (lambda: made(moe_layers=(0, 2)), "moe_layers: expected numbers below layers = 2, got 0 to 2"),
        (lambda: made(moe_layers=(), hidden_dim=8), "moe_layers: expected some together with experts"),
        (lambda: made(moe_layers=(0,)), "hidden_dim: expected 1 to 1,000,000,000, got 0"),
        (lambda: made(attention=replace(ATTENTION, windowed=3, window=8)), "windowed: expected at most layers = 2"),
    ],
)
def test_absurd_sizes_are_refused(make, says):
    with pytest.raises(ValueError, match=r".*") as caught:
        make()
    assert says in str(caught.value)


def made(**more):
    sizes = {"vocab": 10, "dim": 32, "layers": 2, "attention": ATTENTION, "routed": ROUTED, "moe_layers": (0, 1)}
    return Architecture(name="it", **(sizes | more))
