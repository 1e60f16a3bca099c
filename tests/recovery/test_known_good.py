"""The registry of known-good records: who is admitted, what stays, what damage is found, and many writers at once."""

import dataclasses
import hashlib
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.recovery.crash_jobs import Zygote, some_baselines

from equipoise.disk.atomic import DiskError
from equipoise.monitor.baseline import Baseline
from equipoise.recovery.known_good import KnownGood, KnownGoodError, Record, RefusedError
from equipoise.types import Finding


def finding(severity):
    return Finding("hot_expert", "layers.1.mlp", 3, severity, 0.9, 0.5, "expert 3 takes 90%", "lower it")


def tensors(value=0.0):
    return {"router.weight": torch.full((4, 3), value), "active": torch.tensor(True)}


def put(registry, step=1, value=None, loss=1.0, **options):
    value = float(step) if value is None else value
    return registry.put(
        **{"step": step, "tensors": tensors(value), "baselines": some_baselines(), "loss": loss} | options
    )


def steps(registry):
    return [record.step for record in registry.records]


def files(folder):
    """All names below the folder."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def registry(tmp_path):
    return KnownGood(tmp_path)


# ------------------------------------------------------------------------------------------------- who is admitted


@pytest.mark.parametrize("severity", ["warning", "critical"])
def test_a_moment_with_a_finding_is_refused_with_its_message(registry, tmp_path, severity):
    with pytest.raises(RefusedError, match=r"hot_expert in layers\.1\.mlp: expert 3 takes 90%"):
        put(registry, findings=[finding("info"), finding(severity)])
    assert files(tmp_path) == []


def test_information_is_no_reason_to_refuse(registry):
    assert put(registry, findings=[finding("info")]).step == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused(registry, tmp_path, loss):
    with pytest.raises(RefusedError, match=f"held-out loss is {loss}"):
        put(registry, loss=loss)
    assert files(tmp_path) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_refused_by_name(registry, bad):
    broken = tensors()
    broken["router.weight"][3, 2] = bad
    with pytest.raises(RefusedError, match=r"router\.weight is not finite"):
        put(registry, tensors=broken)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (torch.tensor([0.5]).to(torch.float8_e4m3fn), torch.tensor([math.nan]).to(torch.float8_e4m3fn)),
        (torch.tensor([1j]), torch.tensor([complex(0, math.nan)])),
        (torch.tensor([2**62]), torch.tensor([math.inf], dtype=torch.float64)),
    ],
    ids=["float8", "complex", "int64 and float64"],
)
def test_tensors_of_any_type_are_kept_if_finite(registry, good, bad):
    assert torch.equal(
        registry.load(put(registry, tensors={"scale": good}))["scale"].view(torch.uint8), good.view(torch.uint8)
    )
    with pytest.raises(RefusedError, match="scale is not finite"):
        put(registry, 2, tensors={"scale": bad})


@pytest.mark.parametrize("nothing", ["tensors", "baselines"])
def test_without_tensors_or_baselines_there_is_nothing_to_keep(registry, nothing):
    with pytest.raises(RefusedError, match="no tensors or no baselines"):
        put(registry, **{nothing: {}})


def test_worse_than_the_best_by_more_than_the_tolerance_is_refused(tmp_path):
    registry = KnownGood(tmp_path, keep=1, tolerance=0.25)
    put(registry, 1, loss=1.0)
    put(registry, 2, loss=1.25)  # exactly as much as allowed
    with pytest.raises(RefusedError, match=r"held-out loss is 1\.2656, the best record's 1\.0000"):
        put(registry, 3, loss=1.265625)  # allowed beside the newest, not beside the best
    assert steps(registry) == [1, 2]
    assert put(registry, 4, loss=0.5) == registry.best()
    assert steps(registry) == [4]  # the newest and the best in one


@pytest.mark.parametrize(("keep", "tolerance"), [(0, 0.1), (-1, 0.1), (1, -0.1), (1, math.nan)])
def test_bad_limits_are_refused(tmp_path, keep, tolerance):
    with pytest.raises(ValueError, match=f"keep of 1 or more and tolerance of 0 or more, got {keep}, {tolerance}"):
        KnownGood(tmp_path, keep=keep, tolerance=tolerance)


# ---------------------------------------------------------------------------------------------------- what is kept


def test_the_name_is_the_hash_of_the_bytes_and_the_tensors_come_back(registry):
    kept = tensors(0.1) | {"half": torch.tensor([1.5], dtype=torch.bfloat16), "empty": torch.zeros(0, 3)}
    record = put(registry, tensors=kept, checkpoint="step-000001", note="after warmup")
    assert registry.path(record).name == f"{record.id}.safetensors"
    assert hashlib.sha256(registry.path(record).read_bytes()).hexdigest() == record.id
    loaded = registry.load(record)
    assert loaded.keys() == kept.keys()
    for name, tensor in kept.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert registry.checkpoints() == {"step-000001"}


def test_views_transposes_and_tied_tensors_are_kept_in_full(registry):
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    kept = {"transposed": base.T, "row": base[1], "tied": base, "tied too": base}
    loaded = registry.load(put(registry, tensors=kept))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in kept.items())


def test_a_record_is_not_changed_by_what_happens_to_its_tensors_later(registry):
    kept = tensors(1.0)
    record = put(registry, tensors=kept)
    kept["router.weight"].fill_(7.0)
    assert registry.load(record)["router.weight"].eq(1.0).all()


def test_the_same_content_of_the_same_step_is_the_record_that_is_there(registry, tmp_path):
    first = put(registry, 5)
    before = (tmp_path / "known_good.json").read_bytes()
    backwards = dict(reversed(tensors(5.0).items()))
    assert put(registry, 5, tensors=backwards) == first
    assert (tmp_path / "known_good.json").read_bytes() == before


def test_the_same_content_of_another_step_is_another_record_with_one_file(registry, tmp_path):
    first = put(registry, 1, value=0.0)
    written = registry.path(first).stat()
    second = put(registry, 2, value=0.0)
    assert first.id == second.id
    after = registry.path(first).stat()
    assert (after.st_ino, after.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)  # it is used again as it is
    assert steps(registry) == [1, 2]
    assert files(tmp_path) == sorted([f"{first.id}.safetensors", "known_good.json"])
    registry.truncate_after(1)
    assert registry.load(first)["router.weight"].eq(0.0).all()  # the file stays while one record names it


def test_the_same_content_with_another_checkpoint_is_another_record(registry):
    put(registry, 5)
    put(registry, 5, checkpoint="step-000005")
    put(registry, 5, checkpoint="step-000005-r1")
    assert [record.checkpoint for record in registry.records] == [None, "step-000005", "step-000005-r1"]
    assert registry.checkpoints() == {"step-000005", "step-000005-r1"}


def test_the_same_content_again_mends_a_damaged_file(registry):
    record = put(registry, 5)
    registry.path(record).write_bytes(b"damaged")
    assert put(registry, 5) == record
    assert registry.load(record)["router.weight"].eq(5.0).all()


def test_the_newest_are_kept_and_the_best_is_never_dropped(tmp_path):
    registry = KnownGood(tmp_path, keep=2, tolerance=10.0)
    for step, loss in enumerate([3.0, 1.0, 4.0, 2.0, 5.0], start=1):
        put(registry, step, loss=loss)
    assert steps(registry) == [2, 4, 5]
    assert registry.best().step == 2
    assert registry.latest().step == 5
    assert len(files(tmp_path / "known_good")) == 3
    put(registry, 6, loss=0.5)  # a new best: the old one has only its age
    assert steps(registry) == [5, 6]
    assert len(files(tmp_path / "known_good")) == 2


@settings(max_examples=20)  # each puts up to eight files down to the disk
@given(losses=st.lists(st.sampled_from([1.0, 1.5, 2.0, 2.5]), min_size=1, max_size=8), keep=st.integers(1, 3))
def test_kept_are_the_newest_and_the_first_best_for_any_losses(tmp_path_factory, losses, keep):
    registry = KnownGood(tmp_path_factory.mktemp("run"), keep=keep, tolerance=10.0)
    for step, loss in enumerate(losses):
        put(registry, step, loss=loss)
    best = losses.index(min(losses))  # the first of equals
    newest = range(max(0, len(losses) - keep), len(losses))
    assert steps(registry) == sorted({best, *newest})
    assert registry.best().loss == min(losses)
    assert {path.stem for path in (registry._blobs).iterdir()} == {record.id for record in registry.records}


def test_truncate_after_forgets_later_steps_and_their_files(registry, tmp_path):
    for step in (1, 2, 3):
        put(registry, step, loss=1.0 - step / 10)
    registry.truncate_after(1)
    assert steps(registry) == [1]
    assert len(files(tmp_path / "known_good")) == 1
    put(registry, 2, value=20.0, loss=0.91)  # judged beside the records that are left
    assert steps(registry) == [1, 2]
    registry.truncate_after(5)
    assert steps(registry) == [1, 2]
    registry.truncate_after(0)
    assert steps(registry) == []


def test_truncating_what_is_not_there_writes_nothing(registry, tmp_path):
    registry.truncate_after(3)
    assert files(tmp_path) == []


def test_an_empty_registry_says_what_to_do(registry):
    assert registry.records == ()
    assert registry.checkpoints() == set()
    for ask in (registry.latest, registry.best):
        with pytest.raises(KnownGoodError, match="no known-good record; let the run save a checkpoint first"):
            ask()


def test_a_second_object_sees_the_same_records(registry, tmp_path):
    record = put(registry)
    assert KnownGood(tmp_path).records == (record,)


numbers = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(max_size=5)
baselines = st.builds(
    Baseline, names, st.integers(0, 9), st.lists(st.integers(0, 9)).map(tuple), numbers, numbers, numbers, numbers
)
records = st.builds(
    Record,
    id=st.binary(max_size=9).map(lambda content: hashlib.sha256(content).hexdigest()),
    step=st.integers(0),
    checkpoint=st.none() | names,
    loss=numbers,
    baselines=st.lists(baselines, max_size=2).map(lambda made: {each.layer: each for each in made}),
    recorded_at=numbers,
    note=names,
)


@given(record=records)
def test_a_record_survives_json(record):
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


# --------------------------------------------------------------------------------------------------------- damage


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {"flipped bit": (flip_a_bit, "is damaged, sha256"), "truncated": (truncate, "is damaged, sha256"),
          "missing": (lambda path: path.unlink(), "can't be read.*No such file")}  # fmt: skip


@pytest.mark.parametrize(("damage", "problem"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_with_the_record_to_use_instead(registry, damage, problem):
    older, newer = put(registry, 1), put(registry, 2)
    damage(registry.path(newer))
    with pytest.raises(
        KnownGoodError, match=f"{newer.id}.*{problem}.*Use the record of step 1 instead, {older.id[:12]}"
    ):
        registry.load(newer)
    assert registry.load(older)["router.weight"].eq(1.0).all()


@pytest.mark.parametrize(("damage", "problem"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_is_never_proposed_instead(registry, damage, problem):
    oldest, middle, newest = (put(registry, step) for step in (1, 2, 3))
    damage(registry.path(newest))
    with pytest.raises(KnownGoodError, match=f"Use the record of step 2 instead, {middle.id[:12]}"):
        registry.load(newest)  # the newest of the others
    damage(registry.path(middle))
    with pytest.raises(KnownGoodError, match=f"Use the record of step 1 instead, {oldest.id[:12]}"):
        registry.load(newest)
    damage(registry.path(oldest))
    with pytest.raises(KnownGoodError, match="There is no other whole record: go back to a checkpoint"):
        registry.load(newest)


LENGTHS = {
    "missing": lambda path: path.unlink(), "truncated": truncate, "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "no header": lambda path: path.write_bytes(bytes(len(path.read_bytes()))),
}  # fmt: skip


@pytest.mark.parametrize("damage", LENGTHS.values(), ids=LENGTHS)
def test_a_record_whose_file_is_not_all_there_is_passed_over_and_forgotten(registry, tmp_path, damage):
    older, newer = put(registry, 1, loss=1.0, checkpoint="old"), put(registry, 2, loss=0.5, checkpoint="new")
    damage(registry.path(newer))
    assert registry.records == (older,)
    assert registry.latest() == registry.best() == older
    assert registry.checkpoints() == {"old"}
    put(registry, 3)
    named = json.loads((tmp_path / "known_good.json").read_text())["records"]
    assert [record["step"] for record in named] == [1, 3]


GOOD = Record("0" * 64, 1, None, 1.0, some_baselines(), 0.0).to_json()
GARBAGE = {
    "empty": b"", "half": b'{"format": 1, "rec', "not utf-8": b"\xff\xfe{", "a list": b"[]", "null": b"null",
    "no records": b'{"format": 1}', "records of null": b'{"format": 1, "records": null}',
    "records of text": b'{"format": 1, "records": ["a"]}', "later format": b'{"format": 2, "records": []}',
    **{
        f"{field} is {value!r}": json.dumps({"format": 1, "records": [{**GOOD, field: value}]}).encode()
        for field, value in (
            ("step", "1"), ("loss", "good"), ("id", 5), ("id", "../../secret"), ("checkpoint", 5), ("note", None),
            ("baselines", None), ("recorded_at", None), ("extra", 1), ("baselines", [{"layer": "a"}]),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("with_blobs", [False, True])
def test_a_damaged_registry_is_named_and_left_alone(registry, tmp_path, content, with_blobs):
    if with_blobs:
        put(registry)
    index = tmp_path / "known_good.json"
    index.write_bytes(content)
    before = files(tmp_path)
    for ask in (
        lambda: registry.records,
        registry.latest,
        lambda: put(registry, 2),
        lambda: registry.truncate_after(0),
    ):
        with pytest.raises(KnownGoodError, match=r"known_good\.json: .*Restore it from a copy"):
            ask()
    assert index.read_bytes() == content
    assert files(tmp_path) == before


def test_a_missing_registry_beside_tensors_is_an_error_and_without_them_a_beginning(registry, tmp_path):
    record = put(registry)
    (tmp_path / "known_good.json").unlink()
    for ask in (lambda: registry.records, lambda: put(registry, 2), lambda: registry.truncate_after(0)):
        with pytest.raises(
            KnownGoodError, match=r"is missing, and .* holds 1 records' tensors\. Restore it from a copy"
        ):
            ask()
    registry.path(record).rename(tmp_path / "known_good" / "copy of a record.safetensors")  # not a name of ours
    assert registry.records == ()
    assert put(registry, 3).step == 3


def test_a_registry_that_cannot_be_read_is_a_known_good_error(registry, tmp_path):
    (tmp_path / "known_good.json").mkdir()
    with pytest.raises(KnownGoodError, match=r"known_good\.json: can't be read: .*Is a directory"):
        registry.latest()


def test_a_system_that_refuses_to_write_leaves_the_registry_as_it_was(registry, tmp_path):
    record = put(registry, 1)
    before = files(registry._blobs)
    in_the_way = registry._blobs / f"{put(KnownGood(tmp_path / 'other'), 2).id}.safetensors"
    in_the_way.mkdir()  # where the new file should get its name
    with pytest.raises(DiskError, match="could not write"):
        put(registry, 2)
    in_the_way.rmdir()
    assert files(registry._blobs) == before
    assert registry.records == (record,)
    assert put(registry, 2).step == 2


# ------------------------------------------------------------------------------------------- killed and many writers


def test_what_killed_writers_left_is_cleaned_and_what_others_put_there_is_not(registry, tmp_path):
    put(registry, 1)
    orphan, name = "a" * 64, "b" * 64
    inside = tmp_path / "known_good"
    left = [inside / f"{orphan}.safetensors", inside / f".{name}.safetensors.0f3c.tmp"]
    left.append(tmp_path / ".known_good.json.0f3c.tmp")
    foreign = [inside / "notes.txt", inside / ".hidden.tmp", tmp_path / ".other.tmp"]
    for path in left + foreign:
        path.write_bytes(b"half")
    assert steps(registry) == [1]  # neither counts
    put(registry, 2)
    assert [path for path in left if path.exists()] == []
    assert [path for path in foreign if not path.exists()] == []
    assert [registry.load(record) is not None for record in registry.records] == [True, True]


def test_killed_before_the_first_record_was_named(registry, tmp_path):
    """The empty registry is there before the first file, so a file without a name is no lost record."""
    put(registry, 1)
    (tmp_path / "known_good.json").write_text(json.dumps({"format": 1, "records": []}))
    assert registry.records == ()
    put(registry, 2)
    assert steps(registry) == [2]
    assert len(files(tmp_path / "known_good")) == 1


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    with Zygote() as zygote:
        pids = [zygote.start("put_many", str(tmp_path), f"writer {i}", 100 * i, 10) for i in range(3)]
        assert [zygote.wait(pid) for pid in pids] == [0, 0, 0]
    registry = KnownGood(tmp_path)
    assert sorted(steps(registry)) == [*range(10), *range(100, 110), *range(200, 210)]
    for record in registry.records:
        (tensor,) = registry.load(record).values()
        assert tensor.eq(record.step // 2).all()
    assert len(files(tmp_path / "known_good")) == 15  # every second step has the content of the one before


def test_a_record_is_plain_frozen_data():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Record.from_json(GOOD).step = 2
