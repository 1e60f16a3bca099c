"""Packed weights are the numbers that transformers reads from them; a folder with them is read as a plain one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from tests.convert.families import saved

from equipoise.convert import import_checkpoint
from equipoise.convert.packed import from_blocks, from_mxfp4


def random_mxfp4(E=4, R=6, G=1):
    blocks = torch.randint(0, 256, (E, R, G, 16), dtype=torch.uint8)
    return blocks, torch.randint(120, 130, (E, R, G), dtype=torch.uint8)


def test_mxfp4_is_what_transformers_reads():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_mxfp4(G=3)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    got = from_mxfp4(blocks, scales)
    assert got.shape == (4, 96, 6)
    assert torch.equal(got, expected)


def test_mxfp4_by_hand():
    # 0x7F: lower four bits 15 = -6, upper four 7 = 6; 0x21: 1 = 0.5, 2 = 1; exponent 128 doubles
    blocks = torch.tensor([0x7F, 0x21] + [0] * 14, dtype=torch.uint8).view(1, 1, 1, 16)
    got = from_mxfp4(blocks, torch.full((1, 1, 1), 128, dtype=torch.uint8))
    assert got.flatten()[:5].tolist() == [-12.0, 12.0, 1.0, 2.0, 0.0]


def test_fp8_blocks_one_by_one():
    weight = torch.randn(200, 130).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2) + 0.5
    got = from_blocks(weight, scale)
    for i, j in [(0, 0), (127, 128), (128, 127), (199, 129)]:
        expected = (weight[i, j].float() * scale[i // 128, j // 128]).bfloat16()
        assert got[i, j] == expected


def test_a_folder_of_gpt_oss_in_mxfp4(tmp_path):
    theirs = saved("gpt_oss", tmp_path / "theirs", torch.bfloat16, shard="1GB")
    file = theirs / "model.safetensors"
    tensors = load_file(file)
    plain = dict(tensors)
    for name in [each for each in tensors if each.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, into, out = tensors.pop(name).shape
        if into % 32:
            pytest.fail(f"{into} rows are no whole blocks")
        blocks, scales = random_mxfp4(E, out, into // 32)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = from_mxfp4(blocks, scales)
    save_file(tensors, file)
    import_checkpoint(theirs, tmp_path / "packed")
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, file)
    import_checkpoint(theirs, tmp_path / "plain")
    one, other = (
        load_file(tmp_path / name / "checkpoints" / "step-000000" / "model.safetensors") for name in ("packed", "plain")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["model"]["sinks"] is True
