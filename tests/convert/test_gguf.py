"""GGUF files: a small one written by the `gguf` library, and (slow) SmolLM2 against what transformers makes of it."""

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")

import gguf
import transformers
from tests.convert.families import build
from tests.convert.test_convert import load_ours

from equipoise.convert import export_checkpoint, import_checkpoint
from equipoise.convert.fetch import find
from equipoise.convert.fields import ConversionError
from equipoise.convert.upcycle import Upcycling, upcycle_run
from equipoise.models.generate import generate
from equipoise.models.run_files import load

NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def neighbours(weight, head_dim):
    """Rows of a rotated projection as llama.cpp keeps them: of a head, row 0, half, 1, half + 1, ..."""
    order = torch.arange(head_dim).view(2, -1).t().flatten()
    return weight.view(-1, head_dim, weight.shape[1])[:, order].reshape(weight.shape)


def write(path, model, *, leave_out=(), architecture="llama", **fields):
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    for name, value in fields.items():
        writer.add_uint32(f"llama.{name}", value)
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = "output" if parts[0] == "lm_head" else NAMES[parts[-2]]
        if "layers" in parts:
            theirs = f"blk.{parts[2]}.{theirs}"
        if theirs in leave_out:
            continue
        if theirs.endswith(("attn_q", "attn_k")):
            tensor = neighbours(tensor, config.head_dim)
        writer.add_tensor(f"{theirs}.weight", tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama", "smollm"])
def test_a_small_file_is_the_model_it_was_made_of(name, tmp_path):
    model = build(name)
    done = import_checkpoint(write(tmp_path / "model.gguf", model), tmp_path / "ours")
    assert (done.family, done.tokenizer) == ("llama", False)
    tokens = torch.randint(0, 64, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(load_ours(tmp_path / "ours")(tokens), model(tokens).logits, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leave_out": ("blk.1.ffn_up",)}, r"missing 1 \(model.layers.1.mlp.up_proj.weight\)"),
        ({"leave_out": ("token_embd",)}, "expected a tensor token_embd.weight, found none"),
        ({"expert_count": 4}, "expected a dense model"),
        ({"architecture": "bert"}, "general.architecture: expected llama, got 'bert'"),
    ],
)
def test_refuses(options, message, tmp_path):
    path = write(tmp_path / "model.gguf", build("llama"), **options)
    with pytest.raises(ConversionError, match=message):
        import_checkpoint(path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("cut", [0, 3, 40, 5000])
def test_refuses_a_truncated_file(cut, tmp_path):
    path = write(tmp_path / "model.gguf", build("llama"))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ConversionError, match="expected a GGUF file, can't read it"):
        import_checkpoint(path, tmp_path / "ours")


@pytest.mark.slow
def test_smollm2_for_real(tmp_path):
    path = find("smollm2")
    import_checkpoint(path, tmp_path / "dense")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    dense = load(tmp_path / "dense")
    for text in (
        "The capital of France is",
        "def f(x):\n    return x**2  # 1234567",
        "naïve café — 你好 🙂\n\n\n  it's",
    ):
        assert dense.tokenizer.encode(text).tolist() == words.encode(text, add_special_tokens=False)
        assert dense.tokenizer.decode(dense.tokenizer.encode(text)) == text
    prompt = torch.tensor([dense.tokenizer.encode("The capital of France is").tolist()])
    with torch.no_grad():
        expected = theirs(prompt).logits
        torch.testing.assert_close(dense.model(prompt), expected, rtol=1e-3, atol=1e-3)
    del theirs

    upcycle_run(tmp_path / "dense", tmp_path / "sparse", Upcycling())
    sparse = load(tmp_path / "sparse")
    with torch.no_grad():
        assert (sparse.model(prompt) - expected).abs().max() < 1e-3
    answer = generate(sparse.model, prompt, max_new_tokens=6, temperature=0.0)
    assert "Paris" in sparse.tokenizer.decode(answer[0].tolist())
    del sparse, dense

    done = export_checkpoint(tmp_path / "sparse", tmp_path / "hf", dtype="bf16")
    assert done.family == "mixtral"
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    out = back.generate(**words("The capital of France is", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert "Paris" in words.decode(out[0])
