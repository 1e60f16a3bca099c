"""Checkpoints of ranks: one format, whatever their number, with and without sharded dense weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.ranks import run_ranks

from equipoise.disk.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from equipoise.disk.rows import lay_out, read_rows, shapes, write_rows

WORKER = Path(__file__).with_name("reshard_worker.py")
CHAIN = (  # (ranks, shard, from, to)
    (4, "whole", "nothing", "four"),
    (1, "whole", "four", "one"),
    (2, "whole", "one", "two"),
    (4, "shard", "two", "sharded"),
    (4, "whole", "sharded", "again"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reshard")
    for world, shard, source, target in CHAIN:
        run_ranks(WORKER, folder, world, shard, source, target)
    return folder


@pytest.mark.parametrize("target", [target for *_, target in CHAIN[1:]])
def test_resharding_keeps_every_bit(target, folder):
    first, then = (load_checkpoint(latest_checkpoint(folder / name)) for name in ("four", target))
    assert then.step == first.step == 1
    for group, named in first.tensors.items():
        assert named.keys() == then.tensors[group].keys()
        for name, value in named.items():
            assert torch.equal(value, then.tensors[group][name]), (group, name)
    moments = [value for name, value in first.tensors["optimizer"].items() if name.endswith("exp_avg")]
    assert len(moments) > 10
    assert all(value.abs().max() > 0 for value in moments)


def test_a_rank_holds_its_own_experts_only(folder):
    whole = json.loads((folder / "one.0.json").read_text())["expert_bytes"]
    for target, world, expert_ranks in (("two", 2, 2), ("four", 4, 2)):
        held = [json.loads((folder / f"{target}.{rank}.json").read_text())["expert_bytes"] for rank in range(world)]
        assert held == [whole / expert_ranks] * world


def test_what_ranks_wrote_one_process_reads(folder):
    tensors = load_checkpoint(latest_checkpoint(folder / "four")).tensors["model"]
    assert tensors["layers.0.mlp.experts.gate_up_proj"].shape == (6, 32, 32)


def test_a_damaged_checkpoint_is_refused_by_all_ranks(folder):
    path = latest_checkpoint(folder / "again")
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(AssertionError, match=r"model\.safetensors is corrupt") as failed:
        run_ranks(WORKER, folder, 2, "whole", "again", "never")
    assert str(failed.value).count("CheckpointError: checkpoint") == 2
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_rows_are_written_where_they_belong(tmp_path):
    path = tmp_path / "x.safetensors"
    whole = torch.arange(24.0).view(6, 4)
    lay_out(path, {"a": (torch.float32, (6, 4)), "b": (torch.bfloat16, ()), "c": (torch.int64, (3,))})
    write_rows(path, {"a": (whole[[4, 0, 1]], (4, 0, 1)), "b": (torch.tensor(1.5, dtype=torch.bfloat16), None)})
    write_rows(path, {"a": (whole[[2, 3, 5]], (2, 3, 5)), "c": (torch.tensor([7, 8, 9]), None)})
    assert shapes(path) == {"a": (6, 4), "b": (), "c": (3,)}
    read = load_file(path)
    assert torch.equal(read["a"], whole)
    assert read["b"] == 1.5
    assert read["c"].tolist() == [7, 8, 9]
    assert torch.equal(read_rows(path, "a", (5, 0, 1, 2)), whole[[5, 0, 1, 2]])
    assert read_rows(path, "a", ()).shape == (0, 4)
    with pytest.raises(KeyError):
        read_rows(path, "d", None)


def test_a_type_that_the_format_has_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tensor a: expected one of F64, .* got torch.complex64"):
        lay_out(tmp_path / "x.safetensors", {"a": (torch.complex64, (1,))})
