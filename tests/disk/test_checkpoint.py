"""Checkpoints: exact round trips, every kind of damage named, and nothing lost to a kill or a full disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.disk import checkpoint as cp

TENSORS = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "optimizer": {"m": torch.ones(4)}}
STATE = {"loader": {"position": 17}, "note": "ä"}


def equal_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


# ---------------------------------------------------------------------------------------------- round trips

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (2, 0, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_comes_back(tmp_path, dtype, shape):
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    path = cp.save_checkpoint(tmp_path, 1, {"model": {"w": tensor}}, {})
    loaded = cp.load_checkpoint(path).tensors["model"]["w"]
    assert (loaded.dtype, loaded.shape) == (dtype, tensor.shape)
    assert torch.equal(loaded.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_round_trip_of_groups_and_state(tmp_path):
    path = cp.save_checkpoint(tmp_path / "new" / "root", 123, TENSORS, STATE)
    loaded = cp.load_checkpoint(path)
    assert path.name == "step-000123"
    assert (loaded.step, loaded.state, loaded.path) == (123, STATE, path)
    assert loaded.tensors.keys() == TENSORS.keys()
    assert all(equal_bits(loaded.tensors[g][n], TENSORS[g][n]) for g in TENSORS for n in TENSORS[g])


def test_no_groups_and_empty_groups(tmp_path):
    assert cp.load_checkpoint(cp.save_checkpoint(tmp_path, 1, {}, {})).tensors == {}
    assert cp.load_checkpoint(cp.save_checkpoint(tmp_path, 2, {"model": {}}, {})).tensors == {"model": {}}


def test_tied_transposed_and_sliced_tensors(tmp_path):
    base = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    named = {"embed": base, "head": base, "turned": base.T, "row": base[1], "flipped": torch._neg_view(base)}
    loaded = cp.load_checkpoint(cp.save_checkpoint(tmp_path, 1, {"model": named}, {})).tensors["model"]
    assert all(torch.equal(loaded[name], named[name]) for name in named)
    # 12 numbers in three of them and 12 in the transpose and 4 in the row: the slice did not drag its storage along.
    assert (tmp_path / "step-000001" / "model.safetensors").stat().st_size < (4 * 12 + 4) * 4 + 600


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60)
@given(state=st.dictionaries(st.text(), json_values, max_size=4))
def test_any_json_state_comes_back(tmp_path_factory, state):
    path = cp.save_checkpoint(tmp_path_factory.mktemp("json"), 1, {}, state)
    loaded = cp.load_checkpoint(path).state
    assert loaded == state
    assert repr(loaded) == repr(state)  # 1, 1.0 and True are equal, and so are 0.0 and -0.0; they print differently


def test_not_a_number_is_kept(tmp_path):
    path = cp.save_checkpoint(tmp_path, 1, {}, {"loss": float("nan"), "best": float("inf")})
    loaded = cp.load_checkpoint(path).state
    assert loaded["loss"] != loaded["loss"]
    assert loaded["best"] == float("inf")


@pytest.mark.parametrize(
    ("step", "tensors", "state", "message"),
    [
        (-1, {}, {}, r"step must be 0 or more, not -1: give"),
        (1, {"a/b": {}}, {}, r"tensor group 'a/b' becomes a file name: use letters"),
        (
            1,
            {"m": {"w": torch.empty(2, device="meta")}},
            {},
            r"tensor m/w must be dense.*on meta: save its dense parts",
        ),
        (1, {"m": {"w": torch.eye(2).to_sparse()}}, {}, r"tensor m/w must be dense.*sparse_coo on cpu"),
        (1, {"m": {"__metadata__": torch.ones(1)}}, {}, r"tensor m/__metadata__ has a name .*: rename it"),
        (1, {"m": {"w": torch.ones(1, dtype=torch.complex128)}}, {}, r"m/w is complex128.*: use view_as_real"),
        (1, {}, {"a": {"b": [0, (1, 2)]}}, r"state\.a\.b\[1\] is a tuple, which is not JSON: use .*list\(\)"),
        (1, {}, {"a": torch.tensor(1)}, r"state\.a is a Tensor.*tensors under `tensors`"),
        (1, {}, {"a": {3: 1}}, r"state\.a has the key 3, a int: JSON keys are str"),
    ],
)
def test_what_can_not_come_back_is_refused_before_writing(tmp_path, step, tensors, state, message):
    with pytest.raises(ValueError, match=message):
        cp.save_checkpoint(tmp_path, step, tensors, state)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- damage


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def grow(path):
    with (path / "model.safetensors").open("ab") as file:
        file.write(b"x")


def flip(path):
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def flip_state(path):
    file = path / "state.json"
    file.write_text(file.read_text().replace("17", "18"))


def edit_manifest(change):
    def damage(path):
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))

    return damage


DAMAGES = {
    "truncated": (truncate, r"model\.safetensors has 91 bytes, expected 96 \(truncated\)"),
    "grown": (grow, r"model\.safetensors has 97 bytes, expected 96\."),
    "missing": (lambda path: (path / "optimizer.safetensors").unlink(), r"optimizer\.safetensors is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"manifest\.json is missing, so it was never"),
    "cut manifest": (lambda path: (path / "manifest.json").write_text('{"format"'), r"manifest\.json is damaged \("),
    "manifest is a list": (lambda path: (path / "manifest.json").write_text("[]"), r"manifest\.json is damaged \("),
    "manifest leads outside": (
        edit_manifest(lambda m: m["files"].update({"../x.safetensors": m["files"]["state.json"]})),
        r"manifest\.json is damaged \(it lists \['\.\./x\.safetensors'",
    ),
    "newer": (edit_manifest(lambda m: m.update(format=2)), r"it has format 2, this version .* reads format 1; update"),
}
HIDDEN = {
    "flipped bit": (flip, r"model\.safetensors is corrupt: sha256 \w{12}\.\.\., expected \w{12}\.\.\."),
    "edited state": (flip_state, r"state\.json is corrupt: sha256"),
}


@pytest.fixture
def two(tmp_path):
    return [cp.save_checkpoint(tmp_path, step, TENSORS, STATE) for step in (100, 200)]


@pytest.mark.parametrize("name", [*DAMAGES, *HIDDEN])
def test_damage_is_named_with_its_remedy(two, name):
    damage, message = {**DAMAGES, **HIDDEN}[name]
    damage(two[1])
    with pytest.raises(cp.CheckpointError, match=message) as caught:
        cp.load_checkpoint(two[1])
    assert str(two[1]) in str(caught.value)
    assert str(caught.value).endswith(f"Load another whole checkpoint instead: {two[0]}")
    cp.load_checkpoint(two[0])


@pytest.mark.parametrize("name", DAMAGES)
def test_visibly_damaged_checkpoints_are_skipped(two, name):
    assert cp.latest_checkpoint(two[0].parent) == two[1]
    DAMAGES[name][0](two[1])
    assert cp.latest_checkpoint(two[0].parent) == two[0]


def test_remedy_names_a_later_checkpoint_when_there_is_no_earlier_and_says_when_there_is_none(two):
    truncate(two[0])
    with pytest.raises(cp.CheckpointError, match=f"instead: {two[1]}$"):
        cp.load_checkpoint(two[0])
    truncate(two[1])
    with pytest.raises(cp.CheckpointError, match=r"no other whole checkpoint in .*: restore one from a copy"):
        cp.load_checkpoint(two[0])
    with pytest.raises(cp.CheckpointError, match="there is no such folder"):
        cp.load_checkpoint(two[0].parent / "step-000300")


def test_every_single_flipped_byte_is_caught(tmp_path):
    path = cp.save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(2)}}, {"a": 1})
    for file in [path / "model.safetensors", path / "state.json"]:
        whole = file.read_bytes()
        for position in range(len(whole)):
            file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
            with pytest.raises(cp.CheckpointError, match="corrupt"):
                cp.load_checkpoint(path)
        file.write_bytes(whole)
    cp.load_checkpoint(path)


# ---------------------------------------------------------------------------------------------- the root folder


def names(paths):
    return [path.name for path in paths]


def test_saving_a_step_again_overwrites_nothing(tmp_path):
    first = cp.save_checkpoint(tmp_path, 5, TENSORS, {"try": 1})
    content = {file: file.read_bytes() for file in first.iterdir()}
    assert cp.save_checkpoint(tmp_path, 5, TENSORS, {"try": 1}) == first
    second = cp.save_checkpoint(tmp_path, 5, TENSORS, {"try": 2})
    third = cp.save_checkpoint(tmp_path, 5, TENSORS, {"try": 3})
    assert names([second, third]) == ["step-000005-r1", "step-000005-r2"]
    assert {file: file.read_bytes() for file in first.iterdir()} == content
    assert cp.latest_checkpoint(tmp_path) == third
    assert cp.load_checkpoint(third).step == 5
    assert sorted(os.listdir(tmp_path)) == names([first, second, third])


def test_a_damaged_checkpoint_of_the_same_step_is_left_for_a_look(tmp_path):
    first = cp.save_checkpoint(tmp_path, 5, TENSORS, STATE)
    truncate(first)
    assert cp.save_checkpoint(tmp_path, 5, TENSORS, STATE).name == "step-000005-r1"


def test_list_is_by_step_and_ignores_what_is_no_checkpoint(tmp_path):
    assert cp.list_checkpoints(tmp_path / "nowhere") == []
    assert cp.latest_checkpoint(tmp_path) is None
    for step in (1_000_000, 20, 999_999):
        cp.save_checkpoint(tmp_path, step, {}, {})
    (tmp_path / "step-9999999").mkdir()
    (tmp_path / "step-000030").write_text("a file")
    (tmp_path / "notes.txt").write_text("")
    assert names(cp.list_checkpoints(tmp_path)) == ["step-000020", "step-999999", "step-1000000"]


def test_prune_keeps_the_newest_and_the_protected(tmp_path):
    paths = [cp.save_checkpoint(tmp_path, step, {}, {}) for step in range(5)]
    removed = cp.prune_checkpoints(tmp_path, keep=2, protect=[paths[1]])
    assert removed == [paths[0], paths[2]]
    assert sorted(os.listdir(tmp_path)) == names([paths[1], paths[3], paths[4]])
    assert cp.prune_checkpoints(tmp_path, keep=9) == []
    with pytest.raises(ValueError, match="keep must be 1 or more, not 0: without"):
        cp.prune_checkpoints(tmp_path, keep=0)


# ---------------------------------------------------------------------------------------------- kills and full disks

# Forks one child per moment, so that torch is imported once. Prints a line per child: its folder and what it had saved.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from equipoise.disk.checkpoint import save_checkpoint

torch.set_num_threads(1)
base = Path(sys.argv[1])
TENSORS = {"model": {"w": torch.arange(20_000.0)}, "optimizer": {"m": torch.ones(5_000)}}

def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid

def save(root, step):
    save_checkpoint(root, step, TENSORS, {"step": step, "long": "x" * 20_000})

def killed_at(root, event):
    # Saves once, then again with a kill at the event-th call or return, of Python or C, inside the second save.
    save(root, 1)
    seen = 0
    def count(*_):
        nonlocal seen
        seen += 1
        if seen == event:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(count)
    save(root, 2)
    sys.setprofile(None)
    (root.parent / "events").write_text(str(seen))

def endless(root, pipe):
    step = 0
    while True:
        step += 1
        save(root, step)
        os.write(pipe, b"x")

os.waitpid(child(lambda: killed_at(base / "dry", 0)), 0)
events = int((base / "events").read_text())
for i in range(40):
    root = base / f"event{i}"
    _, status = os.waitpid(child(lambda: killed_at(root, 1 + i * (events - 1) // 40)), 0)
    print(root, 1, os.WIFSIGNALED(status))
for num_saves in (1, 2, 5, 9):
    root = base / f"loop{num_saves}"
    reading, writing = os.pipe()
    pid = child(lambda: endless(root, writing))
    for _ in range(num_saves):
        os.read(reading, 1)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    print(root, num_saves, os.WIFSIGNALED(status))
"""


def run_child(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kill_9_at_any_moment_loses_nothing_that_was_saved(tmp_path):
    output = run_child(KILLED, tmp_path)
    lines = [line.rsplit(" ", 2) for line in output.splitlines()]
    assert len(lines) == 44
    num_leftovers = 0
    for root, saved, was_killed in lines:
        assert was_killed == "True", root
        loaded = cp.load_checkpoint(cp.latest_checkpoint(Path(root)))
        assert loaded.step >= int(saved)
        assert loaded.step == loaded.state["step"]
        assert torch.equal(loaded.tensors["model"]["w"], torch.arange(20_000.0))
        num_leftovers += len(cp.clean_leftovers(Path(root)))
        assert names(cp.list_checkpoints(Path(root))) == sorted(os.listdir(root))
    assert num_leftovers > 20  # most kills landed inside a save, as they were meant to


FULL_DISK = """
import json, resource, sys
from pathlib import Path
import torch
from equipoise.disk.checkpoint import CheckpointError, save_checkpoint

root, tensors, text = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
save_checkpoint(root, 1, {"model": {"w": torch.ones(100)}}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))  # Python ignores SIGXFSZ, so writing fails with EFBIG
try:
    save_checkpoint(root, 2, {"model": {"w": torch.ones(tensors)}}, {"text": "x" * text})
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize(("tensors", "text"), [(100_000, 0), (100, 100_000)], ids=["tensors", "state"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path, tensors, text):
    message = run_child(FULL_DISK, tmp_path, tensors, text)
    assert "the checkpoint of step 2 was not written" in message
    needed = tensors * 4 + len(f'{{"text": "{"x" * text}"}}')
    assert f"It needs about {needed:,} bytes, " in message
    assert "File too large" in message
    assert "Earlier checkpoints are untouched; make room" in message
    assert os.listdir(tmp_path) == ["step-000001"]
    assert cp.load_checkpoint(cp.latest_checkpoint(tmp_path)).step == 1


def test_a_root_that_is_a_file_is_named(tmp_path):
    root = tmp_path / "file"
    root.write_text("")
    with pytest.raises(cp.CheckpointError, match=r"was not written to .*/file: .*check the permissions"):
        cp.save_checkpoint(root, 1, {}, {})
