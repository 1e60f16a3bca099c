"""The commands: what they print, what they leave, and mistakes."""

import json
from typing import get_args

import pytest
import torch

pytest.importorskip("transformers")

from tests.convert.families import saved

from equipoise.cli import main
from equipoise.commands.convert import FamilyName
from equipoise.convert import FAMILIES
from equipoise.convert.read import write_config
from equipoise.disk.checkpoint import save_checkpoint
from equipoise.models.config import DecoderConfig
from equipoise.models.decoder import Decoder
from equipoise.models.run_files import load
from equipoise.models.tokenizers import publish_tokenizer
from equipoise.train.tokenizer import train_bpe


def run(capsys, *args):
    """(exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in args])
    return ended.value.code, *capsys.readouterr()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run folder whose tokenizer fits."""
    folder = tmp_path_factory.mktemp("dense")
    tokenizer = train_bpe(["some prose to learn a few pairs of letters from " * 40], 300)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, dim=32, num_layers=2, num_heads=4, hidden_dim=48, max_seq_len=160
    )
    write_config(folder, config)
    torch.manual_seed(0)
    save_checkpoint(folder / "checkpoints", 0, {"model": Decoder(config).state_dict()}, {})
    tokenizer.save(folder)
    return folder


def test_there_and_back(capsys, dense, tmp_path):
    code, out, _ = run(capsys, "convert", dense, tmp_path / "hf", "--to", "hf", "--dtype", "bf16")
    assert code == 0
    assert "tensors as llama in 1 files" in out
    code, out, _ = run(capsys, "convert", tmp_path / "hf", tmp_path / "ours", "--json")
    assert code == 0
    assert json.loads(out)["family"] == "llama"
    loaded = load(tmp_path / "ours")
    assert loaded.held_out_BS.shape == (8, 129)
    assert next(loaded.model.parameters()).dtype == torch.bfloat16


def test_upcycling_says_how_near_it_is(capsys, dense, tmp_path):
    code, out, _ = run(capsys, "upcycle", dense, tmp_path / "sparse", "--experts", "4", "--json")
    result = json.loads(out)
    assert code == 0
    assert 0 <= result["largest_logit_difference"] < 1e-4
    assert (result["num_experts"], result["keeps_the_function"]) == (4, True)
    assert result["total"] - result["active"] == 2 * 2 * 3 * 32 * 48  # two of four experts, two layers
    code, out, _ = run(capsys, "upcycle", dense, tmp_path / "other", "--reinit", "0.5")
    assert code == 0
    assert "largest difference of a logit" in out


def test_upcycling_from_a_published_checkpoint(capsys, tmp_path):
    theirs = saved("llama", tmp_path / "theirs")
    publish_tokenizer(train_bpe(["ab " * 50], 257), theirs)  # of more ids than the model has: not usable
    (theirs / "tokenizer.json").unlink()
    code, out, _ = run(capsys, "upcycle", theirs, tmp_path / "sparse", "--experts", "4")
    assert code == 0
    assert "could not be compared: there is no tokenizer" in out
    assert sorted(each.name for each in tmp_path.iterdir()) == ["sparse", "theirs"]


def test_the_families_of_the_command_are_the_families():
    assert set(get_args(FamilyName)) == set(FAMILIES)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("convert", "nowhere/at/all", "OUT"), "expected a folder, a .gguf file"),
        (("convert", "DENSE", "OUT"), "got a run folder, which needs no conversion"),
        (("convert", "DENSE", "OUT", "--family", "mixtral"), "--family and --dtype go with --to hf"),
        (("convert", "DENSE", "OUT", "--to", "hf", "--family", "olmoe"), "olmoe: it has no MoE layers"),
        (("upcycle", "DENSE", "OUT", "--top-k", "1"), "top_k: expected 2 or more"),
        (("upcycle", "DENSE", "DENSE"), "expected a new or empty folder"),
    ],
)
def test_mistakes(capsys, dense, tmp_path, args, message):
    places = {"DENSE": dense, "OUT": tmp_path / "out"}
    code, _, err = run(capsys, *(places.get(each, each) for each in args))
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()
