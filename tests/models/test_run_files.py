"""A run folder gives back the model, tokenizer and held-out text that were put there, or says what is wrong."""

import json

import pytest
import torch

from equipoise import BiasBalance, Decoder, DecoderConfig, MoEConfig, TopK
from equipoise.disk.checkpoint import CheckpointError, save_checkpoint
from equipoise.models.run_files import load, read_held_out, write_held_out
from equipoise.models.tokenizer import Tokenizer, TokenizerError

CONFIG = DecoderConfig(
    vocab_size=300,
    dim=16,
    num_layers=2,
    num_heads=2,
    hidden_dim=32,
    max_seq_len=32,
    moe=MoEConfig(num_experts=4, hidden_dim=8, router=TopK(k=2, score="sigmoid"), balance=(BiasBalance(),)),
)


def bytes_only():
    return Tokenizer("bytes", {bytes([b]): b for b in range(256)} | {b"th": 256})


@pytest.fixture
def run(tmp_path):
    """A run folder with two checkpoints of one model, the newer one with other weights."""
    torch.manual_seed(0)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"name": "x", "model": json.loads(CONFIG.to_json())}))
    bytes_only().save(folder)
    for step in (1, 2):
        model = Decoder(CONFIG)
        with torch.no_grad():
            for layer in model.moe_layers.values():
                layer.balancer.bias_E.uniform_(-1, 1)
        save_checkpoint(folder / "checkpoints", step, {"model": dict(model.state_dict())}, {})
    return folder, model


def test_newest_checkpoint_bit_for_bit(run):
    folder, model = run
    loaded = load(folder)
    assert loaded.checkpoint.name == "step-000002"
    assert loaded.folder == folder
    assert not loaded.model.training
    assert loaded.tokenizer.fingerprint == bytes_only().fingerprint
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.model(tokens), model.eval()(tokens))


def test_what_balancers_gather_begins_empty(run):
    assert all(not layer.balancer.pending_E.any() for layer in load(run[0]).model.moe_layers.values())


def test_a_checkpoint_by_name(run):
    folder, model = run
    older = load(folder / "checkpoints" / "step-000001")
    assert older.folder == folder
    assert not torch.equal(older.model.embed_tokens.weight, model.embed_tokens.weight)


def test_another_type_leaves_routers_and_biases_alone(run):
    folder, model = run
    loaded = load(folder, dtype=torch.bfloat16).model
    assert loaded.embed_tokens.weight.dtype == torch.bfloat16
    for name, layer in loaded.moe_layers.items():
        assert torch.equal(layer.router.weight, model.moe_layers[name].router.weight)
        assert torch.equal(layer.balancer.bias_E, model.moe_layers[name].balancer.bias_E)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens).float(), model.eval()(tokens), rtol=0.05, atol=0.05)


def test_the_type_of_the_checkpoint_is_kept(run):
    folder, model = run
    state = {
        name: t.bfloat16() if "router" not in name and t.is_floating_point() else t
        for name, t in model.state_dict().items()
    }
    save_checkpoint(folder / "checkpoints", 3, {"model": state}, {})
    assert load(folder).model.embed_tokens.weight.dtype == torch.bfloat16


def test_held_out_tokens_come_back(tmp_path):
    tokens_BS = torch.randint(0, 60_000, (3, 9))
    write_held_out(tmp_path, tokens_BS)
    assert torch.equal(read_held_out(tmp_path), tokens_BS)
    assert read_held_out(tmp_path / "nothing") is None


def test_damaged_held_out(run):
    (run[0] / "held_out.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"held_out\.safetensors: is damaged.*restore it"):
        load(run[0])


class TestErrors:
    def test_no_run(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"expected a run folder with config\.json and checkpoints.*equipoise train"
        ):
            load(tmp_path)

    def test_another_config(self, run):
        (run[0] / "config.json").write_text("[1, 2]")
        with pytest.raises(ValueError, match=r"config\.json: expected a run's configuration, got something else"):
            load(run[0])

    def test_no_checkpoint(self, run, tmp_path):
        run[0].joinpath("checkpoints").rename(tmp_path / "away")
        with pytest.raises(CheckpointError, match=r"expected at least one whole checkpoint.*found none"):
            load(run[0])

    def test_damaged_checkpoint_is_refused_by_name_and_passed_over_without(self, run):
        path = run[0] / "checkpoints" / "step-000002"
        (path / "model.safetensors").write_bytes(b"\0" * (path / "model.safetensors").stat().st_size)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt.*step-000001"):
            load(path)

    def test_of_another_model(self, run):
        other = json.loads(CONFIG.to_json()) | {"vocab_size": 301}
        (run[0] / "config.json").write_text(json.dumps({"model": other}))
        with pytest.raises(CheckpointError, match=r"not those of the run's configuration.*size mismatch"):
            load(run[0])

    def test_no_tokenizer(self, run):
        (run[0] / "byte_pairs.json").unlink()
        with pytest.raises(TokenizerError, match=r"expected byte_pairs.json or tokenizer.json, found neither"):
            load(run[0])
