"""Checkpoints of transformers in and out: the same logits, and after a round trip the same bits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")

import transformers
from tests.convert.families import MODELS, saved

from equipoise.convert import FAMILIES, export_checkpoint, import_checkpoint
from equipoise.convert.essence import essence
from equipoise.disk.checkpoint import CHECKPOINTS, load_checkpoint
from equipoise.models.cache import ContiguousCache
from equipoise.models.decoder import Decoder
from equipoise.models.run_files import fill, read_config

TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}  # of logits of size 10: products in another order


def load_ours(folder: Path) -> Decoder:
    """Of a folder without a tokenizer."""
    model = Decoder(read_config(folder)).eval()
    fill(model, load_checkpoint(folder / CHECKPOINTS / "step-000000").tensors["model"], folder)
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_and_bits_come_back(name, tmp_path):
    theirs = saved(name, tmp_path / "theirs")
    reference = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32).eval()
    done = import_checkpoint(theirs, tmp_path / "ours")
    assert (done.family, done.num_tensors) == (MODELS[name][0], len(tensors_of(theirs)))
    ours = load_ours(tmp_path / "ours")
    tokens = torch.randint(0, 64, (2, 40))
    with torch.no_grad():
        expected, got = reference(tokens).logits, ours(tokens)
        cache = ContiguousCache(ours.config, 2, 40)
        stepwise = torch.cat([ours(piece, cache=cache) for piece in tokens.split([30, *[1] * 10], dim=1)], dim=1)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(got, expected, **TOLERANCE)
    torch.testing.assert_close(stepwise, expected, **TOLERANCE)

    again = export_checkpoint(tmp_path / "ours", tmp_path / "back", shard_bytes=20_000)
    assert again.family == MODELS[name][0]
    assert again.num_shards > 1
    before, after = tensors_of(theirs), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    with torch.no_grad():
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
        assert torch.equal(back(tokens).logits, expected)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_bf16_keeps_its_bits(name, tmp_path):
    theirs = saved(name, tmp_path / "theirs", torch.bfloat16)
    import_checkpoint(theirs, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    before, after = tensors_of(theirs), tensors_of(tmp_path / "back")
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_every_family_has_a_model_here():
    assert {kind for kind, _ in MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_a_family_writes_what_it_reads(name, tmp_path):
    theirs = saved(name, tmp_path)
    family = FAMILIES[MODELS[name][0]]
    config = family.read(json.loads((theirs / "config.json").read_text()))
    assert essence(family.read(family.write(config))) == essence(config)
    others = [each.name for each in FAMILIES.values() if each is not family and each.why_not(config) is None]
    assert len(others) <= 1, others  # OLMoE without its norm, and the like


def test_fused_experts_are_known_too(tmp_path):
    from safetensors.torch import save_file

    theirs = saved("qwen3_moe", tmp_path / "theirs", shard="1GB")
    import_checkpoint(theirs, tmp_path / "ours")
    tensors, fused = tensors_of(theirs), {}
    for layer in (0, 2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}.{e}.{each}_proj.weight") for e in range(4)])
            for each in ("gate", "up", "down")
        )
        fused |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}.down_proj": down}
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "config.json").write_bytes((theirs / "config.json").read_bytes())
    save_file(tensors | fused, tmp_path / "fused" / "model.safetensors")
    import_checkpoint(tmp_path / "fused", tmp_path / "other")
    one, other = (load_ours(tmp_path / name).state_dict() for name in ("ours", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)
