"""Damage to a checkpoint: what each kind leaves on the disk, that loading refuses it, and the way back."""

import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.disk.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, save_checkpoint
from equipoise.faults import CheckpointDamage, checkpoint_of, damage
from equipoise.faults.files import put_all_back, put_back

TENSORS = {
    "model": {"weight": torch.arange(12.0).view(3, 4), "bias": torch.ones(3), "scale": torch.tensor(2.0)},
    "optimizer": {"m": torch.ones(5)},
}
KINDS = ["flip", "truncate", "missing", "wrong_size"]
WRITES = ["flip", "truncate", "wrong_size"]


@pytest.fixture
def folder(tmp_path):
    return save_checkpoint(tmp_path / "checkpoints", 5, TENSORS, {"note": "x"})


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def model():
    module = torch.nn.Linear(4, 3)
    module.register_buffer("scale", torch.tensor(0.0))
    return module


# ------------------------------------------------------------------------------------------------ what is left


@settings(max_examples=20)
@given(seed=st.integers(0, 2**63 - 1))
def test_a_flip_is_one_bit_of_one_file(seed, tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints", 5, TENSORS, {})
    before = content(folder)
    injection = damage(folder, CheckpointDamage("flip", seed))
    [name] = [name for name, data in content(folder).items() if data != before[name]]
    pairs = zip(content(folder)[name], before[name], strict=True)
    assert sum((new ^ old).bit_count() for new, old in pairs) == 1
    with pytest.raises(CheckpointError, match=r"step-000005 can't be loaded: .* There is no other whole checkpoint"):
        load_checkpoint(folder)
    injection.remove()
    assert content(folder) == before


@settings(max_examples=20)
@given(seed=st.integers(0, 2**63 - 1), kind=st.sampled_from(["truncate", "missing"]))
def test_less_is_left_of_one_file(seed, kind, tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints", 5, TENSORS, {})
    before = content(folder)
    injection = damage(folder, CheckpointDamage(kind, seed))
    now = content(folder)
    [name] = [name for name, data in before.items() if now.get(name) != data]
    if kind == "missing":
        assert name not in now
    else:
        assert len(now[name]) < len(before[name])
        assert before[name].startswith(now[name])
    told = r"manifest\.json is (missing|damaged)|is missing|has [\d,]+ bytes, expected [\d,]+ \(truncated\)"
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(folder)
    injection.remove()
    assert content(folder) == before


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_may_be_hit_and_the_seed_repeats(kind, folder):
    """By 40 seeds each of the 4 files: a file is missed by all with probability 0.75^40, 1 in 100,000."""
    before, hit = content(folder), set()
    for seed in range(40):
        left = []
        for _ in range(2):
            injection = damage(folder, CheckpointDamage(kind, seed))
            left.append(content(folder))
            injection.remove()
        assert left[0] == left[1]
        hit |= {name for name, data in before.items() if left[0].get(name) != data}
    of_another_model = {"model.safetensors", "manifest.json"}
    assert hit == (of_another_model if kind == "wrong_size" else set(before))


def test_wrong_size_loads_as_a_checkpoint_and_does_not_fit(folder):
    damage(folder, CheckpointDamage("wrong_size"))
    assert list_checkpoints(folder.parent) == [folder]
    loaded = load_checkpoint(folder)
    assert loaded.tensors["model"]["weight"].shape == (4, 4)  # one more row
    assert loaded.tensors["model"]["bias"].shape == (4,)
    assert loaded.tensors["model"]["scale"].item() == 2.0  # has no rows
    assert torch.equal(loaded.tensors["optimizer"]["m"], torch.ones(5))
    assert loaded.state == {"note": "x"}
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: .*\[4, 4\].*\[3, 4\]"):
        model().load_state_dict(loaded.tensors["model"])


def test_wrong_size_needs_a_whole_checkpoint_with_tensors(tmp_path):
    folder = save_checkpoint(tmp_path / "checkpoints", 5, {"model": {"scale": torch.tensor(1.0)}}, {})
    with pytest.raises(ValueError, match=r"^step-000005: expected a checkpoint with tensors of one or more dimensions"):
        damage(folder, CheckpointDamage("wrong_size"))
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"^step-000005: expected a whole checkpoint to make of it one of"):
        damage(folder, CheckpointDamage("wrong_size"))
    assert [path.name for path in folder.parent.iterdir()] == ["step-000005"]


@pytest.mark.parametrize("kind", ["flip", "truncate", "missing"])
def test_an_empty_folder(kind, tmp_path):
    folder = tmp_path / "checkpoints" / "step-000005"
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^step-000005: expected a checkpoint with files, found none; choose another"):
        damage(folder, CheckpointDamage(kind))


# ------------------------------------------------------------------------------------------------ the way back


def test_put_back_in_another_process(folder):
    before = content(folder)
    damage(folder, CheckpointDamage("wrong_size"))
    code = "import sys; from pathlib import Path; from equipoise.faults.files import put_all_back as p;"
    told = subprocess.run(
        [sys.executable, "-c", f"{code} print(p(Path(sys.argv[1])))", str(folder.parent.parent)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout == "['step-000005']\n"
    assert content(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["step-000005"]
    assert put_all_back(folder.parent.parent) == []


@pytest.mark.parametrize("kind", KINDS)
def test_twice_is_once_and_a_new_damage_can_follow(kind, folder):
    before = content(folder)
    first = damage(folder, CheckpointDamage(kind))
    first.remove()
    second = damage(folder, CheckpointDamage(kind, 1))
    damaged = content(folder)
    first.remove()  # not again
    assert content(folder) == damaged
    second.remove()
    assert content(folder) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_killed_in_between(kind, renames, folder, monkeypatch):
    """After so many renames: the originals are home, or in the backup, and put_back finds them."""
    before, rename, left = content(folder), Path.rename, [None] * renames

    def killed(path, target):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return rename(path, target)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        damage(folder, CheckpointDamage(kind))
    put_back(folder)
    assert content(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["step-000005"]


def test_killed_before_anything_was_moved(folder):
    before = content(folder)
    backup = folder.with_name(f".damaged-{folder.name}")
    backup.mkdir()
    (backup / "new-state.json").write_text("half")
    put_back(folder)
    assert content(folder) == before
    assert not backup.exists()


@pytest.mark.parametrize("kind", WRITES)
def test_what_was_saved_again_is_not_overwritten(kind, folder):
    injection = damage(folder, CheckpointDamage(kind))
    shutil.rmtree(folder)
    save_checkpoint(folder.parent, 5, {"model": {"weight": torch.zeros(2)}}, {})
    new = content(folder)
    with pytest.raises(
        ValueError,
        match=r"^step-000005: expected the checkpoint as it was damaged, it was moved, pruned or saved again; its "
        r"original files are in .*\.damaged-step-000005: move them where they belong, or delete that folder$",
    ):
        injection.remove()
    assert injection.in_place
    assert content(folder) == new


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_pruned_is_said(kind, folder):
    injection = damage(folder, CheckpointDamage(kind))
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"it was moved, pruned or saved again"):
        injection.remove()
    assert not folder.exists()


def test_one_that_cannot_be_put_back_does_not_keep_the_others(tmp_path):
    folders = [save_checkpoint(tmp_path / "checkpoints", step, TENSORS, {}) for step in (1, 2, 3)]
    before = [content(folder) for folder in folders]
    for folder in folders:
        damage(folder, CheckpointDamage("flip"))
    shutil.rmtree(folders[1])
    with pytest.raises(ValueError, match=r"^step-000002: expected the checkpoint as it was damaged"):
        put_all_back(tmp_path)
    assert [content(folders[0]), content(folders[2])] == [before[0], before[2]]


def test_damage_that_fails_leaves_nothing(folder, monkeypatch):
    before = content(folder)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("equipoise.faults.files.shutil.copyfile", full)
    with pytest.raises(OSError, match=r"No space left"):
        damage(folder, CheckpointDamage("flip"))
    assert content(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["step-000005"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_backup_is_no_checkpoint(kind, folder):
    """Neither listed nor chosen: the next one to be damaged or loaded is another."""
    other = save_checkpoint(folder.parent, 4, TENSORS, {})
    damage(folder, CheckpointDamage(kind))
    assert [path for path in list_checkpoints(folder.parent) if path != folder] == [other]
    assert checkpoint_of(folder.parent.parent) == folder  # the newest, damaged or not
    with pytest.raises(ValueError, match=r"expected one of step-000004, step-000005 in .*, got '\.damaged-"):
        checkpoint_of(folder.parent.parent, ".damaged-step-000005")


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["../step-000005", "step-000005/../step-000005", "step-000006", "x", "."])
def test_names_that_lead_elsewhere(name, folder):
    with pytest.raises(ValueError, match=r"^checkpoint: expected one of step-000005 in "):
        checkpoint_of(folder.parent.parent, name)


def test_a_very_long_name(folder):
    with pytest.raises(ValueError, match=r"^checkpoint: expected one of step-000005 in .*, got 'step-1{75}'$"):
        checkpoint_of(folder.parent.parent, "step-" + "1" * 5000)


def test_a_run_without_checkpoints(tmp_path):
    with pytest.raises(ValueError, match=r"expected a run with checkpoints, found none in .*; wait until it has"):
        checkpoint_of(tmp_path)


def test_bad_fields():
    with pytest.raises(ValueError, match=r"^CheckpointDamage\.kind: expected flip, .*, wrong_size, got 'x'"):
        CheckpointDamage("x")
    with pytest.raises(ValueError, match=r"^CheckpointDamage\.seed: expected a whole number from 0 to .*, got -1"):
        CheckpointDamage(seed=-1)
