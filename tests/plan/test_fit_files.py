"""Which model is meant: names, files of three kinds, and what is wrong with others."""

import json

import pytest

from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.plan.fit.known import KNOWN
from equipoise.plan.fit.model_file import find_model, of_values
from equipoise.plan.fit.parameters import parameters

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 131072,
}
LLAMA4 = {
    "model_type": "llama4",
    "vision_config": {"hidden_size": 1408},
    "text_config": {
        "model_type": "llama4_text",
        "vocab_size": 202048,
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 128,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8192,
        "max_position_embeddings": 1048576,
    },
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
}


@pytest.mark.parametrize(
    ("values", "name"),
    [(MIXTRAL, "mixtral-8x7b"), (DEEPSEEK, "deepseek-v3"), (LLAMA4, "llama-4-maverick"), (GPT_OSS, "gpt-oss-20b")],
)
def test_published_files_are_the_models_of_the_table(values, name, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    read = find_model(str(path))
    assert parameters(read) == parameters(KNOWN[name].model)
    for field in ("attention", "moe_layers", "context", "tied"):
        assert getattr(read, field) == getattr(KNOWN[name].model, field)
    assert find_model(str(tmp_path)) == read  # of its folder


def test_names_are_in_any_case():
    assert find_model("DeepSeek-V3") is KNOWN["deepseek-v3"].model


def test_a_run_and_its_model(tmp_path):
    config = DecoderConfig(
        vocab_size=64,
        dim=32,
        num_layers=2,
        num_heads=4,
        hidden_dim=48,
        max_seq_len=16,
        moe=MoEConfig(num_experts=4, hidden_dim=8),
    )
    alone = tmp_path / "model.json"
    alone.write_text(config.to_json())
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"type": "TrainConfig", "model": json.loads(config.to_json())}))
    assert parameters(find_model(str(alone))) == parameters(find_model(str(run)))


def without(values, name):
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "it: expected a JSON object with a model's configuration, got list"),
        ({"a": 1}, "it: expected a field model_type (Hugging Face) or type = DecoderConfig (equipoise), found neither"),
        (MIXTRAL | {"model_type": "mamba"}, "it: model_type: expected one of dbrx, deepseek_v2"),
        (MIXTRAL | {"model_type": 7}, "it: model_type: expected a word, got 7"),
        (without(MIXTRAL, "hidden_size"), "it: expected a field hidden_size, found none of it"),
        (without(MIXTRAL, "num_local_experts"), "num_local_experts or num_experts or n_routed_experts, found none"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "it: k: expected at most the 8 experts, got 9 per token"),
        (MIXTRAL | {"num_attention_heads": 7}, "num_attention_heads: expected a divisor of hidden_size = 4096"),
        (MIXTRAL | {"num_key_value_heads": 5}, "it: kv_heads: expected a divisor of heads = 32, got 5"),
        (MIXTRAL | {"hidden_size": -4096}, "it: hidden_size: expected 1 to 1,000,000,000, got -4096"),
        (MIXTRAL | {"hidden_size": 4e20}, "it: hidden_size: expected 1 to 1,000,000,000, got 4e+20"),
        (MIXTRAL | {"hidden_size": "4096"}, "it: hidden_size: expected a whole number, got '4096'"),
        (MIXTRAL | {"vocab_size": True}, "it: vocab_size: expected a whole number, got True"),
        (MIXTRAL | {"tie_word_embeddings": "no"}, "it: tie_word_embeddings: expected true or false, got 'no'"),
        (MIXTRAL | {"num_hidden_layers": 10**6}, "it: layers: expected at most 100000"),
        (DEEPSEEK | {"first_k_dense_replace": 62}, "first_k_dense_replace: expected at most num_hidden_layers = 61"),
        (DEEPSEEK | {"topk_group": 9}, "it: top_groups: expected 1 to groups = 8, got 9"),
        (LLAMA4 | {"text_config": 3}, "it: text_config: expected an object, got 3"),
        (
            LLAMA4 | {"text_config": LLAMA4["text_config"] | {"moe_layers": [1, 60]}},
            "moe_layers: expected numbers below layers = 48, got 1 to 60",
        ),
        (
            LLAMA4 | {"text_config": LLAMA4["text_config"] | {"moe_layers": "all"}},
            "moe_layers: expected a list of layer numbers, got 'all'",
        ),
        ({"type": "DecoderConfig", "dim": 32}, "it: expected a field num_layers, found none of it"),
    ],
)
def test_what_is_wrong_is_named(values, says):
    with pytest.raises(ValueError, match=r".*") as caught:
        of_values(values, "it")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "expected JSON, but it cannot be read"),
        ('{"model_type": "mixtral", "hidden_size": NaN}', "NaN is not a number"),
        ('{"hidden_size": Infinity}', "Infinity is not a number"),
        ("[" * 100_000, "expected JSON, but it cannot be read"),
        (" " * (4 * 2**20 + 1), "expected a configuration of at most 4 MiB"),
    ],
)
def test_files_that_are_none(text, says, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r".*") as caught:
        find_model(str(path))
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_no_text_at_all(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="expected JSON, but it cannot be read"):
        find_model(str(path))


def test_a_wrong_name_is_answered_with_close_ones():
    with pytest.raises(ValueError, match=r"mixtral-8x7: expected a known model .* did you mean mixtral-8x7b"):
        find_model("mixtral-8x7")


def test_an_unknown_router_of_ours():
    config = DecoderConfig(
        vocab_size=64,
        dim=32,
        num_layers=1,
        num_heads=4,
        hidden_dim=48,
        max_seq_len=16,
        moe=MoEConfig(num_experts=4, hidden_dim=8),
    )
    values = json.loads(config.to_json())
    values["moe"]["router"]["type"] = "Oracle"
    with pytest.raises(ValueError, match=r"it: moe: router: type: expected one of TopK, .*, got 'Oracle'"):
        of_values(values, "it")
