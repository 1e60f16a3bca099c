"""Requests from another process: each taken once, in order; hostile files are answered or left alone."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.faults import (
    Collapse,
    NaNExpert,
    SlowExpert,
)
from equipoise.faults.requests import (
    MAX_BYTES,
    Answer,
    Inject,
    Remove,
    answer,
    from_record,
    listen,
    listening,
    open_requests,
    post,
    take,
    to_record,
    wait_for,
    withdraw,
)

RUN = """
import sys, time
from pathlib import Path
import torch
from torch import nn
from equipoise.faults import FaultDesk
from equipoise.layer import MoE
from equipoise.routing import TopK

layer = MoE(16, 8, 8, router=TopK(k=2))
x_TD = torch.randn(64, 16)
desk = FaultDesk(Path(sys.argv[1]), nn.Sequential(layer), lambda: layer(x_TD))
print("listening", flush=True)
seen, until = 0, time.monotonic() + 60
while seen < int(sys.argv[2]) and time.monotonic() < until:
    for said in desk.step():
        seen += 1
        print(said, flush=True)
"""


@pytest.fixture
def run(tmp_path):
    open_requests(tmp_path)
    return tmp_path


def hostile(run, content=b"{}"):
    """The id of a request of this content."""
    id = post(run, Remove())
    (run / "requests" / f"{id}.json").write_bytes(content)
    return id


# ------------------------------------------------------------------------------------------------ two processes


def test_a_run_in_another_process_obeys_in_order_and_answers(tmp_path):
    asked = [Inject(Collapse("0", 3)), Inject(Collapse("0", 99)), Inject(SlowExpert("0", 1, 0.01)), Remove()]
    open_requests(tmp_path)
    early = post(tmp_path, asked[0])  # before the run has begun
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path), str(len(asked))], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "listening\n"
        ids = [early, *[post(tmp_path, request) for request in asked[1:]]]
        answers = [wait_for(tmp_path, id, 60.0) for id in ids]
        said = process.stdout.read().splitlines()
    assert process.returncode == 0
    assert answers == [
        Answer(True, "fault put in: collapse (layer '0', expert 3, intensity 10.0)"),
        Answer(False, "refused: Collapse.expert: expected 0 to 7, got 99"),
        Answer(True, "fault put in: slow-expert (layer '0', expert 1, seconds 0.01)"),
        Answer(True, "taken out: slow-expert (layer '0', expert 1, seconds 0.01); collapse (layer '0', expert 3, "
                     "intensity 10.0)"),
    ]  # fmt: skip
    assert said == [each.text for each in answers]
    assert not listening(tmp_path)


def test_listening_is_known_across_processes_and_ends_with_the_process(tmp_path):
    open_requests(tmp_path)
    assert not listening(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path), "1"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "listening\n"
        assert listening(tmp_path)
        with pytest.raises(ValueError, match=r"expected to be the only process that takes this run's faults, another"):
            listen(tmp_path, patience_s=0.0)
        process.kill()
    assert not listening(tmp_path)
    os.close(listen(tmp_path))


@pytest.mark.slow
def test_many_senders_at_once_lose_nothing(tmp_path):
    """Two processes post 10 each; all 20 are taken, once, each sender's in the order of its posting."""
    open_requests(tmp_path)
    sender = (
        "import sys; from pathlib import Path; from equipoise.faults import SkewedInput;"
        "from equipoise.faults.requests import Inject, post;"
        "[post(Path(sys.argv[1]), Inject(SkewedInput(int(sys.argv[2]), seed=n))) for n in range(10)]"
    )
    senders = [subprocess.Popen([sys.executable, "-c", sender, str(tmp_path), str(n)]) for n in range(2)]
    taken = []
    while any(process.poll() is None for process in senders):
        taken += take(tmp_path)
    taken += take(tmp_path)
    assert [process.returncode for process in senders] == [0, 0]
    assert len({id for id, _ in taken}) == len(taken) == 20
    for domain in range(2):
        assert [r.fault.seed for _, r in taken if r.fault.domain == domain] == list(range(10))


# ------------------------------------------------------------------------------------------------ post and take


@given(orders=st.permutations(range(6)))
def test_order_is_that_of_posting_whatever_the_folder_lists_first(orders, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    open_requests(run)
    requests = [Inject(Collapse("a", number)) for number in orders]
    ids = [post(run, request) for request in requests]
    assert ids == sorted(ids)
    assert take(run) == list(zip(ids, requests, strict=True))
    assert take(run) == []


def test_order_survives_a_clock_that_goes_backwards(run, monkeypatch):
    now = time.time_ns()
    clock = iter([now, now - 10**9, now - 10**9, now + 5])
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    ids = [post(run, Inject(Collapse("a", number))) for number in range(4)]
    assert [request.fault.expert for _, request in take(run)] == [0, 1, 2, 3]
    assert ids == sorted(ids)


def test_a_file_from_the_future_does_not_push_ours_there(run):
    far = f"{'9' * 20}-00000000"
    (run / "requests" / f"{far}.json").write_text(json.dumps(to_record(Remove("x"))))
    id = post(run, Remove())
    assert abs(int(id[:20]) - time.time_ns()) < 60 * 10**9
    assert [taken for taken, _ in take(run)] == [id, far]


def test_withdrawn_is_not_taken_and_taken_is_not_withdrawn(run):
    first, second = post(run, Remove("a")), post(run, Remove("b"))
    assert withdraw(run, first)
    assert not withdraw(run, first)
    assert take(run) == [(second, Remove("b"))]
    assert not withdraw(run, second)


def test_a_request_that_killed_the_run_is_not_taken_by_the_next(run):
    id = post(run, Remove())
    take(run)
    assert (run / "requests" / "taken" / f"{id}.json").is_file()
    assert take(run) == []
    assert wait_for(run, id, 0) is None


def test_waiting_calls_back_and_gives_up(run):
    id, left = post(run, Remove()), []
    assert wait_for(run, id, 0.05, left.append) is None
    assert left
    assert all(0 < seconds <= 0.05 for seconds in left)
    assert wait_for(run, id, 60.0, lambda left_s: answer(run, id, "done", ok=True)) == Answer(True, "done")


def test_a_posted_file_is_whole_and_private(run):
    id = post(run, Inject(NaNExpert("a", 1)))
    assert json.loads((run / "requests" / f"{id}.json").read_bytes()) == {
        "request": "inject",
        "fault": {"fault": "nan-expert", "layer": "a", "expert": 1, "seed": 0},
    }
    assert stat.S_IMODE((run / "requests").stat().st_mode) == 0o700
    assert {path.name for path in (run / "requests").iterdir()} == {f"{id}.json", "taken", "answers"}


@pytest.mark.parametrize("call", [
    lambda run: post(run, Remove()), take, listening, lambda run: wait_for(run, "0" * 20 + "-00000000", 0),
    lambda run: withdraw(run, "0" * 20 + "-00000000"), lambda run: answer(run, "0" * 20 + "-00000000", "x", ok=True),
])  # fmt: skip
def test_a_run_without_the_folder(call, tmp_path):
    with pytest.raises(ValueError, match=r": this run takes no faults; start it with --accept-faults$"):
        call(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("id", ["", "../../x", "0" * 20, "0" * 20 + "-0000000g", "0" * 20 + "-00000000/../x",
                                "\u0660" * 20 + "-00000000", "0" * 20 + "-00000000\n"])  # fmt: skip
def test_an_id_that_post_did_not_return(id, run):
    for call in (
        lambda: wait_for(run, id, 0),
        lambda: withdraw(run, id),
        lambda: answer(run, id, "x", ok=True),
    ):
        with pytest.raises(ValueError, match=r"^request: expected an id that post returned, got '"):
            call()


def test_what_is_taken_has_nowhere_to_go(run):
    post(run, Remove())
    shutil.rmtree(run / "requests" / "taken")
    with pytest.raises(ValueError, match=r"taken: expected a folder for what is taken, it is gone; make it again"):
        take(run)


# ------------------------------------------------------------------------------------------------ hostile files


HOSTILE = {
    "empty": b"",
    "not json": b"not json",
    "not text": b"\xff\xfe\x00",
    "nested": b"[" * 60_000,
    "nested value": b'{"request": "inject", "fault": {"fault": "collapse", "layer": %s1%s, "expert": 1}}'
    % (b"[" * 800, b"]" * 800),
    "10 MB": b" " * 10_000_000,
    "one byte too many": b'"' + b"x" * (MAX_BYTES - 1) + b'"',
    "long number": b'{"request": "remove", "layer": ' + b"9" * 5000 + b"}",
    "other request": b'{"request": "run", "code": "import os"}',
    "list": b"[]",
    "no request": b"{}",
    "extra field": b'{"request": "remove", "layer": null, "path": "/etc"}',
    "layer of inject": b'{"request": "inject", "layer": "a", "fault": {}}',
    "no fault": b'{"request": "inject"}',
    "nan": b'{"request": "inject", "fault": {"fault": "collapse", "layer": "a", "expert": 1, "intensity": NaN}}',
    "path": b'{"request": "inject", "fault": {"fault": "checkpoint-damage", "checkpoint": "../../x"}}',
    "layer is a list": b'{"request": "remove", "layer": ["a"]}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_request_is_answered_and_the_others_are_taken(content, run):
    before, bad, after = post(run, Remove("a")), hostile(run, content), post(run, Remove("b"))
    assert take(run) == [(before, Remove("a")), (after, Remove("b"))]
    said = wait_for(run, bad, 0)
    assert not said.ok
    assert said.text.startswith("the request was not understood: ")
    assert len(said.text) < 1000
    assert take(run) == []


@given(content=st.binary(max_size=60))
def test_any_bytes_are_a_request_or_answered(content, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    open_requests(run)
    id = hostile(run, content)
    assert take(run) == []
    assert not wait_for(run, id, 0).ok


@given(
    record=st.dictionaries(
        st.sampled_from(["request", "layer", "fault"]) | st.integers() | st.text(max_size=3),
        st.sampled_from(["inject", "remove", "collapse", {}, {"fault": "collapse"}, [], None, 3]),
    )
)
def test_any_record_is_a_request_or_a_value_error(record):
    made = outcome(record)
    assert isinstance(made, Remove) if not isinstance(made, str) else made


def outcome(record):
    """The request, or why there is none; another error than ValueError is nobody's to catch."""
    try:
        return from_record(record)
    except ValueError as error:
        return str(error)


def test_other_names_are_left_alone(run):
    folder = run / "requests"
    good = json.dumps(to_record(Remove()))
    zeros = "0" * 20
    names = ["x.json", "..json", "..x.json", ".hidden.json", f"{zeros}-00000000.json.tmp", f"{zeros[1:]}-00000000.json"]
    names += [f"{zeros}-0000000G.json", f"{chr(0x660) * 20}-00000000.json", f"{zeros}-00000000\n.json"]
    for name in names:
        (folder / name).write_text(good)
    assert take(run) == []
    assert all((folder / name).is_file() for name in names)
    assert list((folder / "answers").iterdir()) == []


def test_links_pipes_and_folders_are_not_read(run):
    folder, secret = run / "requests", run / "secret.json"
    secret.write_text(json.dumps(to_record(Remove())))
    ids = [hostile(run) for _ in range(5)]
    paths = [folder / f"{id}.json" for id in ids]
    for path in paths:
        path.unlink()
    paths[0].symlink_to(secret)
    paths[1].symlink_to(run / "nowhere")
    paths[2].symlink_to("/dev/zero")
    os.mkfifo(paths[3])
    paths[4].mkdir()
    (paths[4] / "x").write_text("x")
    assert take(run) == []
    assert all(wait_for(run, id, 0).text.startswith("the request was not understood: ") for id in ids)
    assert json.loads(secret.read_text()) == to_record(Remove())


def test_what_is_not_read_is_closed_again(run):
    def next_handle():
        os.close(handle := os.dup(0))
        return handle

    before = next_handle()
    for _ in range(3):
        id = hostile(run)
        (run / "requests" / f"{id}.json").unlink()
        (run / "requests" / f"{id}.json").mkdir()
        assert take(run) == []
    assert next_handle() == before


def test_an_answer_that_cannot_be_written_does_not_lose_the_others(run):
    good, bad = post(run, Remove("a")), hostile(run, b"[")
    (run / "requests" / "answers" / f"{bad}.json").mkdir()
    assert take(run) == [(good, Remove("a"))]


@pytest.mark.parametrize("content", [b"", b"[", b"[]", b"{}", b'{"ok": true}', b'{"ok": "yes", "text": "x"}', b"\xff",
                                     b'{"ok": true, "text": 3}', b" " * 10_000_000, b"[" * 60_000])  # fmt: skip
def test_a_damaged_answer(content, run):
    id = post(run, Remove())
    path = run / "requests" / "answers" / f"{id}.json"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{id}\.json: expected the answer of a run, (it can't be read|an object with)"
    ):
        wait_for(run, id, 0)


def test_an_answer_that_is_a_link_or_a_folder(run):
    id = post(run, Remove())
    path = run / "requests" / "answers" / f"{id}.json"
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"expected the answer of a run, it can't be read"):
        wait_for(run, id, 0)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"expected the answer of a run, it can't be read: expected a plain file"):
        wait_for(run, id, 0)


def test_a_long_answer_is_cut_so_that_it_can_be_read(run):
    id = post(run, Remove())
    answer(run, id, "\U0001f4a5" * 100_000, ok=False)
    said = wait_for(run, id, 0)
    assert set(said.text) == {"\U0001f4a5"}
    assert len((run / "requests" / "answers" / f"{id}.json").read_bytes()) <= MAX_BYTES
