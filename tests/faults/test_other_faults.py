"""Faults of the monitor, the data and the disk; and requests from other processes, hostile ones among them."""

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.disk.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, save_checkpoint
from equipoise.faults import (
    CheckpointDamage,
    Collapse,
    FaultDesk,
    SkewedInput,
    StaleCounters,
    checkpoint_of,
    damage,
    from_json,
    inject_counters,
    skewed_rows,
)
from equipoise.faults.requests import Inject, Remove, from_record, open_requests, post, take, to_record, wait_for
from equipoise.layer import MoE
from equipoise.monitor.recorder import Recorder
from equipoise.monitor.watch import Watch
from equipoise.recovery.swap import swap

TENSORS = {"model": {"weight": torch.arange(12.0).view(3, 4)}, "optimizer": {"m": torch.ones(5)}}


# ------------------------------------------------------------------------------------------------- counters, data


@pytest.mark.parametrize("attach", [Recorder, lambda layer: Watch(layer, every=1)], ids=["recorder", "watch"])
def test_counters_stand_still_or_forget(attach):
    layer = MoE(8, 8, 4)
    monitor = attach(layer)
    recorder = monitor.recorder if isinstance(monitor, Watch) else monitor

    def count(times):
        for _ in range(times):
            layer(torch.randn(100, 8))
        return recorder.flush(1)[0].num_tokens

    assert count(2) == 200
    stale = inject_counters(monitor, StaleCounters("stale"))
    assert count(2) == 0
    stale.remove()
    assert count(1) == 100
    layer(torch.randn(100, 8))
    reset = inject_counters(monitor, StaleCounters("reset"))  # what was counted is gone
    assert count(1) == 100
    layer(torch.randn(100, 8))
    reset.advance()
    assert count(0) == 0
    reset.remove()
    assert count(1) == 100
    with pytest.raises(ValueError, match=r"StaleCounters\.mode: expected stale or reset, got 'slow'"):
        StaleCounters("slow")


@given(
    domains=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    intensity=st.floats(0.01, 1.0),
    seed=st.integers(0, 1000),
)
def test_only_other_domains_are_replaced_and_only_by_the_domain(domains, intensity, seed):
    fault, domains_B = SkewedInput(domains[0], intensity, seed), torch.tensor(domains)
    rows = skewed_rows(fault, domains_B)
    moved = rows != torch.arange(len(domains))
    others = sum(domain != domains[0] for domain in domains)
    assert int(moved.sum()) == min(others, max(1, round(intensity * others))) if others else not moved.any()
    assert (domains_B[moved] != domains[0]).all()
    assert (domains_B[rows[moved]] == domains[0]).all()
    assert torch.equal(rows, skewed_rows(fault, domains_B[:, None].expand(-1, 5)))


def test_a_domain_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"SkewedInput\.domain: expected a domain of the batch, one of \[1, 2\], got 7"
    ):
        skewed_rows(SkewedInput(7), torch.tensor([1, 2, 1]))


# ------------------------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize("kind", ["flip", "truncate", "missing", "wrong_size"])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_damaged_checkpoint_is_not_loaded_and_is_put_back(kind, seed, tmp_path):
    path = save_checkpoint(tmp_path / "checkpoints", 5, TENSORS, {"note": "x"})
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    injection = damage(checkpoint_of(tmp_path), CheckpointDamage(kind, seed))
    if kind == "wrong_size":  # whole, and of another model
        tensors = load_checkpoint(path).tensors["model"]
        with pytest.raises(ValueError, match=r"weight has shape \(4, 4\), expected \(3, 4\)|expected .*\(3, 4\)"):
            swap(torch.nn.Linear(4, 3, bias=False), tensors)
    else:
        with pytest.raises(CheckpointError, match=r"can't be loaded"):
            load_checkpoint(path)
    with pytest.raises(ValueError, match=r"expected a checkpoint without damage, it has some already"):
        damage(path, CheckpointDamage(kind, seed))
    injection.remove()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert list_checkpoints(tmp_path / "checkpoints") == [path]


@pytest.mark.parametrize("name", ["../../etc", "step-5", "/etc/passwd", "step-000009"])
def test_no_path_leads_out_of_the_run(name, tmp_path):
    save_checkpoint(tmp_path / "checkpoints", 5, TENSORS, {})
    with pytest.raises(
        ValueError, match=r"checkpoint: expected one of step-000005 in|CheckpointDamage\.checkpoint: exp"
    ):
        checkpoint_of(tmp_path, CheckpointDamage("flip", checkpoint=name).checkpoint)


# ------------------------------------------------------------------------------------------------- requests


def test_requests_are_taken_once_in_their_order(tmp_path):
    open_requests(tmp_path)
    requests = [Inject(Collapse("a", number, 5.0)) for number in range(5)] + [Remove(), Remove("a")]
    ids = [post(tmp_path, request) for request in requests]
    assert take(tmp_path) == list(zip(ids, requests, strict=True))
    assert take(tmp_path) == []
    assert oct((tmp_path / "requests").stat().st_mode & 0o777) == "0o700"


def test_a_run_that_takes_none(tmp_path):
    with pytest.raises(ValueError, match=r"this run takes no faults; start it with --accept-faults"):
        post(tmp_path, Remove())


@pytest.mark.parametrize(
    "content",
    [
        b"not json",
        b"[" * 100_000,
        b" " * 10_000_000,
        b"\xff\xfe",
        json.dumps({"request": "run", "code": "import os"}).encode(),
        json.dumps({"request": "inject", "fault": {"fault": "../../x"}}).encode(),
        json.dumps({"request": "inject", "fault": {"fault": "collapse", "layer": 5, "expert": 1}}).encode(),
        json.dumps({"request": "remove", "layer": ["a"]}).encode(),
    ],
)
def test_hostile_files_are_answered_and_harm_nobody(content, tmp_path):
    folder = open_requests(tmp_path)
    id = post(tmp_path, Remove())
    (folder / f"{id}.json").write_bytes(content)
    assert take(tmp_path) == []
    answer = wait_for(tmp_path, id, 1.0)
    assert answer.ok is False
    assert answer.text.startswith("the request was not understood")


def test_links_and_strange_names_are_not_followed(tmp_path):
    folder = open_requests(tmp_path)
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps(to_record(Remove())))
    id = post(tmp_path, Remove())
    os.replace(folder / f"{id}.json", tmp_path / "moved.json")
    (folder / f"{id}.json").symlink_to(secret)
    (folder / "..hidden.json").write_text("{}")
    assert take(tmp_path) == []
    assert wait_for(tmp_path, id, 1.0).ok is False
    assert secret.exists()


def test_the_desk_obeys_answers_and_never_raises(tmp_path):
    layer = MoE(8, 8, 4)
    model = torch.nn.ModuleDict({"a": layer})
    x = torch.randn(200, 8)
    before = layer.router.weight.detach().clone()
    desk = FaultDesk(tmp_path, model, lambda: layer(x), None)
    assert desk.step() == []
    good = post(tmp_path, Inject(Collapse("a", 1, 9.0)))
    bad = post(tmp_path, Inject(Collapse("nowhere", 1, 9.0)))
    none = post(tmp_path, Inject(StaleCounters()))
    said = desk.step()
    assert len(said) == 3
    assert wait_for(tmp_path, good, 1.0).ok
    assert "nowhere" in wait_for(tmp_path, bad, 1.0).text
    assert "no recorder" in wait_for(tmp_path, none, 1.0).text
    assert not torch.equal(layer.router.weight, before)
    gone = post(tmp_path, Remove())
    desk.step()
    assert wait_for(tmp_path, gone, 1.0).text.startswith("taken out: collapse")
    torch.testing.assert_close(layer.router.weight.detach(), before)
    desk.close()
    desk.close()


@given(
    record=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    name=st.sampled_from(["collapse", "drift", "checkpoint-damage", "skewed-input", "meteor"]),
)
def test_any_record_is_a_fault_or_a_value_error(record, name):
    for each in (record, {"fault": name, "layer": record, "expert": record, "intensity": record}):
        assert outcome(from_json, each)
        assert outcome(from_record, {"request": "inject", "fault": each})


def outcome(make, record):
    """What became of it; another error than ValueError is nobody's to catch."""
    try:
        return repr(make(record))
    except ValueError as error:
        return str(error)
