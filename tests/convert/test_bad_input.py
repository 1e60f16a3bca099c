"""What is wrong is refused with its name and the reason, and nothing is left on the disk."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from tests.convert.families import saved

from equipoise.convert import export_checkpoint, import_checkpoint
from equipoise.convert.families import FAMILIES
from equipoise.convert.fetch import find
from equipoise.convert.fields import ConversionError
from equipoise.convert.read import write_config
from equipoise.disk.checkpoint import save_checkpoint
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.routing import BiasBalance


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return saved("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    target = tmp_path / "theirs"
    target.mkdir()
    for file in whole.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def refused(folder, message, tmp_path, **options):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConversionError, match=message):
        import_checkpoint(folder, tmp_path / "ours", **options)
    assert sorted(tmp_path.iterdir()) == before  # nothing half-written


def config_with(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder, change):
    """Change one shard's tensors, and forget the index."""
    (folder / "model.safetensors.index.json").unlink()
    file = max(folder.glob("*.safetensors"), key=lambda each: each.stat().st_size)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


class TestFiles:
    def test_truncated(self, folder, tmp_path):
        file = sorted(folder.glob("*.safetensors"))[1]
        file.write_bytes(file.read_bytes()[:-100])
        refused(folder, r"can't be read .*damaged", tmp_path)

    def test_cut_in_the_header(self, folder, tmp_path):
        file = sorted(folder.glob("*.safetensors"))[0]
        file.write_bytes(file.read_bytes()[:40])
        refused(folder, r"its header says \d+ bytes, the file has 40", tmp_path)

    def test_header_of_an_impossible_size(self, folder, tmp_path):
        sorted(folder.glob("*.safetensors"))[0].write_bytes(struct.pack("<Q", 2**40) + b"{}")
        refused(folder, "its header says 1099511627776 bytes", tmp_path)

    def test_header_that_claims_more_than_there_is(self, folder, tmp_path):
        header = json.dumps({"x": {"dtype": "F32", "shape": [2**30, 2**10], "data_offsets": [0, 2**42]}}).encode()
        sorted(folder.glob("*.safetensors"))[0].write_bytes(struct.pack("<Q", len(header)) + header)
        refused(folder, "can't be read", tmp_path)

    def test_pickles(self, folder, tmp_path):
        for file in folder.glob("*.safetensors"):
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        refused(folder, r"expected \*.safetensors, found pickles \(pytorch_model.bin\), which can run code", tmp_path)

    def test_no_weights_and_no_folder(self, tmp_path):
        (tmp_path / "empty").mkdir()
        refused(tmp_path / "empty", r"config.json: expected a file, found none", tmp_path)
        (tmp_path / "empty" / "config.json").write_text('{"model_type": "mixtral"}')
        refused(tmp_path / "empty", r"expected \*.safetensors, found none", tmp_path)

    def test_a_shard_is_missing(self, folder, tmp_path):
        sorted(folder.glob("*.safetensors"))[0].unlink()
        refused(folder, r"index.json: \d+ tensors are not where it says", tmp_path)

    def test_the_same_tensor_twice(self, folder, tmp_path):
        file = sorted(folder.glob("*.safetensors"))[0]
        (folder / "again.safetensors").write_bytes(file.read_bytes())
        refused(folder, r"is in again.safetensors too", tmp_path)

    @pytest.mark.parametrize("text", ["", "[1]", '{"a":', "[" * 5000, "x" * (2**20 + 1)])
    def test_config_that_is_none(self, folder, tmp_path, text):
        (folder / "config.json").write_text(text)
        refused(folder, r"config.json: expected", tmp_path)


class TestTensors:
    def test_missing(self, folder, tmp_path):
        rewrite(folder, lambda tensors: tensors.pop(next(iter(tensors))))
        refused(folder, r"missing 1 \(.*\), not expected 0", tmp_path)

    def test_foreign_and_left_out_on_purpose(self, folder, tmp_path):
        rewrite(folder, lambda tensors: tensors.update({"model.layers.9.extra": torch.zeros(2)}))
        refused(folder, r"missing 0, not expected 1 \(model.layers.9.extra\)", tmp_path)
        done = import_checkpoint(folder, tmp_path / "ours", drop=("model.layers.9.*",))
        assert done.dropped == ("model.layers.9.extra",)

    def test_of_another_dtype(self, folder, tmp_path):
        (folder / "model.safetensors.index.json").unlink()
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            for name in tensors:
                if name.endswith("layers.1.block_sparse_moe.experts.2.w1.weight"):
                    tensors[name] = tensors[name].half()
            save_file(tensors, file)
        refused(
            folder,
            r"w1.weight is torch.float16, other tensors that go into .*gate_up_proj are torch.float32|"
            r"is torch.float32, other tensors that go into .*gate_up_proj are torch.float16",
            tmp_path,
        )

    def test_of_whole_numbers(self, folder, tmp_path):
        def change(tensors):
            name = next(iter(tensors))
            tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int8)

        rewrite(folder, change)
        refused(folder, r"expected fp32, bf16 or fp16 numbers", tmp_path)


class TestConfig:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"hidden_size": 64}, r"expected shape .* by its config.json, got"),
            ({"num_local_experts": 5}, r"missing \d+ "),
            ({"num_hidden_layers": 2}, r"not expected \d+ "),
            ({"num_hidden_layers": 10**9}, r"num_hidden_layers: expected a whole number from 1 to"),
            ({"num_hidden_layers": -1}, r"num_hidden_layers: expected a whole number"),
            ({"vocab_size": "64"}, r"vocab_size: expected a whole number from 1 to \d+, got '64'"),
            ({"rms_norm_eps": float("nan")}, r"rms_norm_eps: expected a positive number, got nan"),
            ({"num_experts_per_tok": 9}, r"describes no mixtral model: .*k: expected at most num_experts"),
            ({"hidden_act": "relu"}, r"hidden_act: expected 'silu', got 'relu', which this decoder does not compute"),
            ({"model_type": "bert"}, r"model_type: expected one of llama, mixtral, .*, got 'bert'"),
            ({"rope_parameters": {"rope_type": "longrope"}}, r"rope_type: expected default, linear, llama3 or yarn"),
            ({"tie_word_embeddings": True}, r"tie_word_embeddings is true, but lm_head.weight differs"),
        ],
    )
    def test_that_lies(self, folder, tmp_path, fields, message):
        config_with(folder, **fields)
        refused(folder, message, tmp_path)

    @pytest.mark.parametrize(
        ("family", "fields", "message"),
        [
            ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: expected None, got 8.0"),
            ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window: expected False, got True"),
            ("qwen2_moe", {"shared_expert_intermediate_size": 33}, "expected a multiple of moe_intermediate_size=16"),
            ("deepseek_v3", {"rope_interleave": False}, "rope_interleave: expected True"),
            ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit: expected 7.0, got 5.0"),
        ],
    )
    def test_of_what_is_not_computed(self, family, fields, message, tmp_path):
        raw = json.loads((saved(family, tmp_path) / "config.json").read_text()) | fields
        with pytest.raises(ConversionError, match=message):
            FAMILIES[family].read(raw)


def test_a_folder_that_is_taken_is_left_alone(folder, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("mine")
    refused(folder, "ours: expected a new or empty folder", tmp_path)
    assert (tmp_path / "ours" / "mine.txt").read_text() == "mine"


def test_a_write_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("equipoise.convert.read.publish", full)
    refused(folder, "No space left on device", tmp_path)


def test_names_that_are_nothing(tmp_path):
    with pytest.raises(ConversionError, match=r"expected a folder, a .gguf file, 'smollm2' or owner/name"):
        find(str(tmp_path / "none.gguf"))


class TestExport:
    def test_a_bias_is_not_lost_unsaid(self, tmp_path):
        saved("deepseek_v3", tmp_path / "theirs")
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
        with pytest.raises(ConversionError, match=r"no family of checkpoints has all .*mixtral: some of its layers"):
            export_checkpoint(tmp_path / "ours", tmp_path / "back", family="mixtral")
        assert not (tmp_path / "back").exists()

    def test_the_state_of_training_is_left_and_named_a_bias_in_force_refused(self, tmp_path):
        config = DecoderConfig(
            vocab_size=64, dim=32, num_layers=2, num_heads=4, hidden_dim=48, max_seq_len=32,
            moe=MoEConfig(num_experts=4, hidden_dim=48, balance=(BiasBalance(),)),
        )  # fmt: skip
        model = Decoder(config)
        (tmp_path / "ours").mkdir()
        write_config(tmp_path / "ours", config)
        save_checkpoint(tmp_path / "ours" / "checkpoints", 0, {"model": model.state_dict()}, {})
        done = export_checkpoint(tmp_path / "ours", tmp_path / "back")
        assert done.family == "mixtral"
        state = {name.split(".balancer.")[1] for name in done.left}
        assert state == {"bias_E", "frozen", "momentum_E"}
        model.layers[1].mlp.balancer.bias_E[2] = 0.5
        save_checkpoint(tmp_path / "ours" / "checkpoints", 1, {"model": model.state_dict()}, {})
        with pytest.raises(ConversionError, match=r"layers.1.mlp.balancer.bias_E is a selection bias"):
            export_checkpoint(tmp_path / "ours", tmp_path / "again")
        assert not (tmp_path / "again").exists()

    def test_no_run_folder(self, tmp_path):
        with pytest.raises(ValueError, match="expected a run folder"):
            export_checkpoint(tmp_path, tmp_path / "back")

    def test_a_damaged_checkpoint(self, folder, tmp_path):
        import_checkpoint(folder, tmp_path / "ours")
        file = tmp_path / "ours" / "checkpoints" / "step-000000" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(ConversionError, match=r"can't be loaded|expected a whole checkpoint"):
            export_checkpoint(tmp_path / "ours", tmp_path / "back")
