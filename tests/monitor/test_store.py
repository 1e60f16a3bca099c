"""The run store: what goes in comes out, in order, across processes, restarts and failures."""

import math
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.monitor.store import RunStore, StoreError
from equipoise.types import Action, Alert, Finding


def record(layer="blocks.0.moe", step=50, counts_E=(10, 0, 5, 1), **changes):
    counts_E = np.array(counts_E, dtype=np.int64)
    sums = {"token_entropy_sum": 1.5, "logit_sum": 3.0, "logit_sq_sum": 80.0, "logsumexp_sum": 9.0, "dropped": {}}
    sums.update(losses={"switch": 17.5}, **changes)
    return routing_stats(layer, step, RoutingSums(16, counts_E, counts_E.astype(float), **sums))


def alert(step=100, state="firing", value=0.9, expert=3):
    finding = Finding("collapse", "blocks.0.moe", expert, "critical", value, 0.5, "it has collapsed", "repair it")
    return Alert("blocks.0.moe:collapse", state, 50, step, finding)


def assert_same_record(ours, theirs):
    assert ours.counts_E.dtype == np.int64
    assert ours.counts_E.tolist() == theirs.counts_E.tolist()
    for name in (name for name in vars(theirs) if name != "counts_E"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), nan_ok=True), name
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name


@pytest.fixture
def store(tmp_path):
    with RunStore(tmp_path / "run") as store:
        yield store


class TestRoundTrip:
    def test_scalars(self, store):
        for step in (1, 2, 3):
            store.scalars(step, {"loss": 4.0 / step, "lr": np.float32(0.5)})
        assert [(step, value) for step, value, _ in store.scalar_history("loss")] == [(1, 4.0), (2, 2.0), (3, 4 / 3)]
        assert [step for step, _, _ in store.scalar_history("loss", last=2)] == [2, 3]
        assert store.scalar_history("loss")[0][2] <= store.scalar_history("loss")[1][2]
        assert store.scalar_history("lr")[0][1] == 0.5
        assert store.scalar_history("unknown") == []

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_diverged_loss_is_kept_too(self, store, value):
        store.scalars(1, {"loss": value})
        assert store.scalar_history("loss")[0][1] == pytest.approx(value, nan_ok=True)

    def test_routing(self, store):
        first = [record("blocks.10.moe", dropped={"capacity": 3, "tokens": 1}), record("blocks.2.moe")]
        second = [record("blocks.10.moe", 100), record("blocks.2.moe", 100, (400, 0, 400, 2))]
        store.routing(first)
        store.routing(second)
        assert store.layers() == ["blocks.10.moe", "blocks.2.moe"]  # as they came, not as they sort
        for ours, theirs in zip(store.latest_routing(), second, strict=True):
            assert_same_record(ours, theirs)
        for ours, theirs in zip(store.routing_history("blocks.10.moe"), (first[0], second[0]), strict=True):
            assert_same_record(ours, theirs)
        assert store.latest_routing()[1].dead_experts == (1, 3)

    def test_flushes_after_a_step(self, store):
        for step in (50, 100, 150, 200):
            store.routing([record("b", step), record("a", step)])
        for page in (1, 2, 64):
            flushes = list(store.routing_after(50, page))
            assert [[(s.step, s.layer) for s in flush] for flush in flushes] == [
                [(step, "b"), (step, "a")] for step in (100, 150, 200)
            ]
        assert list(store.routing_after(200)) == []
        assert store.flush_steps(after=50, at_most=2) == [100, 150]

    def test_a_flush_and_a_history_at_steps(self, store):
        for step in (50, 100, 150):
            store.routing([record("a", step)])
        assert [stats.step for stats in store.latest_routing(at=149)] == [100]
        assert store.latest_routing(at=49) == []
        assert [stats.step for stats in store.routing_history("a", [150, 50, 70])] == [50, 150]
        assert store.routing_history("a", [70]) == []

    def test_the_newest_changes(self, store):
        for step in (50, 100, 150):
            store.alert(alert(step))
            store.action(Action("quantile_bias", "blocks.0.moe", step, "why"))
        assert (
            [each.step for each in store.alerts(last=2)] == [each.step for each in store.actions(last=2)] == [100, 150]
        )

    def test_when_a_flush_was_written(self, store):
        store.scalars(50, {"loss": 1.0})
        [(_, _, when)] = store.scalar_history("loss")
        assert store.flushed_at(50) == when
        newest = max(file.stat().st_mtime for file in store.path.parent.iterdir() if not file.name.endswith("-shm"))
        assert store.flushed_at(51) == newest  # routing without a loss: the file's

    def test_diverged_routing_is_kept_too(self, store):
        store.routing([record(logit_sum=math.nan, logsumexp_sum=math.inf)])
        (ours,) = store.latest_routing()
        assert math.isnan(ours.logit_mean)
        assert ours.logit_logsumexp == math.inf

    def test_alerts_and_actions(self, store):
        alerts = [alert(), alert(200, "resolved", value=math.inf, expert=None)]
        actions = [Action("quantile_bias", "blocks.0.moe", 150, "blocks.0.moe:collapse", {"max_violation": 2.5})]
        for each in alerts:
            store.alert(each)
        store.action(actions[0])
        assert store.alerts() == alerts
        assert store.actions() == actions

    def test_meta(self, store):
        store.set_meta(name="demo", total_steps=600, status="running")
        store.set_meta(status="finished")
        assert store.meta() == {"name": "demo", "total_steps": 600, "status": "finished"}

    def test_an_empty_store_has_nothing(self, store):
        assert (store.latest_routing(), store.layers(), store.alerts(), store.actions()) == ([], [], [], [])
        assert store.meta() == {}


class TestRestart:
    def test_reopening_goes_on(self, tmp_path):
        with RunStore(tmp_path) as store:
            store.scalars(1, {"loss": 4.0})
        with RunStore(tmp_path) as store:
            store.scalars(2, {"loss": 3.0})
            assert [step for step, _, _ in store.scalar_history("loss")] == [1, 2]

    def test_truncating_forgets_later_steps_only(self, store):
        for step in (50, 100, 150):
            store.scalars(step, {"loss": 1.0})
            store.routing([record(step=step)])
            store.alert(alert(step))
            store.action(Action("quantile_bias", "blocks.0.moe", step, "why"))
        store.set_meta(name="demo")
        store.truncate_after(100)
        assert [step for step, _, _ in store.scalar_history("loss")] == [50, 100]
        assert [stats.step for stats in store.routing_history("blocks.0.moe")] == [50, 100]
        assert [alert.step for alert in store.alerts()] == [50, 100]
        assert [action.step for action in store.actions()] == [50, 100]
        assert store.meta() == {"name": "demo"}

    def test_the_same_step_again_replaces(self, store):
        for counts_E in ([1, 1, 1, 1], [4, 0, 0, 0]):
            store.scalars(50, {"loss": float(counts_E[0])})
            store.routing([record(counts_E=counts_E)])
        assert [value for _, value, _ in store.scalar_history("loss")] == [4.0]
        assert [stats.counts_E.tolist() for stats in store.routing_history("blocks.0.moe")] == [[4, 0, 0, 0]]

    def test_closing_twice_is_fine(self, tmp_path):
        store = RunStore(tmp_path)
        store.close()
        store.close()
        with pytest.raises(StoreError, match="closed database; open the run again"):
            store.meta()


WRITER = """
import sys
from equipoise.monitor.store import RunStore
store = RunStore(sys.argv[1])
store.scalars(1, {"loss": 4.0})
print("written", flush=True)
for line in sys.stdin:  # one step per line that the test sends
    store.scalars(int(line), {"loss": 1.0})
    print("written", flush=True)
"""


class TestProcesses:
    @pytest.fixture
    def writer(self, tmp_path):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], **pipes) as process:
            assert process.stdout.readline() == "written\n"
            yield process

    def test_a_reader_follows_a_writer_in_another_process(self, tmp_path, writer):
        with RunStore.open_readonly(tmp_path) as reader:
            assert [step for step, _, _ in reader.scalar_history("loss")] == [1]
            writer.stdin.write("2\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == "written\n"
            assert [step for step, _, _ in reader.scalar_history("loss")] == [1, 2]

    def test_a_killed_writer_loses_nothing_it_has_committed(self, tmp_path, writer):
        writer.kill()
        writer.wait()
        with RunStore(tmp_path) as store:
            assert [step for step, _, _ in store.scalar_history("loss")] == [1]

    def test_a_reader_mid_transaction_does_not_stop_the_writer(self, tmp_path, writer):
        with RunStore.open_readonly(tmp_path) as reader, reader.snapshot():
            assert len(reader.scalar_history("loss")) == 1
            writer.stdin.write("2\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == "written\n"
            assert len(reader.scalar_history("loss")) == 1  # one moment for all that is read inside
        with RunStore.open_readonly(tmp_path) as reader:
            assert len(reader.scalar_history("loss")) == 2


class TestTransactions:
    def test_all_or_nothing(self, store):
        store.scalars(1, {"loss": 4.0})

        def write_and_fail():
            with store.transaction():
                store.scalars(2, {"loss": 3.0})
                store.routing([record()])
                raise RuntimeError("the process is interrupted here")

        with pytest.raises(RuntimeError, match="interrupted"):
            write_and_fail()
        assert [step for step, _, _ in store.scalar_history("loss")] == [1]
        assert store.latest_routing() == []
        store.scalars(3, {"loss": 2.0})  # and it goes on
        assert [step for step, _, _ in store.scalar_history("loss")] == [1, 3]


class TestErrors:
    def test_not_a_run_folder(self, tmp_path):
        with pytest.raises(
            StoreError, match=r"expected a run folder with run\.sqlite in it, found none; check the path"
        ):
            RunStore.open_readonly(tmp_path)

    def test_the_folder_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(StoreError, match=r"cannot make the run folder: .*; choose another path"):
            RunStore(tmp_path / "file" / "run")

    def test_a_corrupt_file(self, tmp_path):
        (tmp_path / "run.sqlite").write_bytes(b"certainly not SQLite" * 100)
        for open_store in (RunStore, RunStore.open_readonly):
            with pytest.raises(StoreError, match=r"run\.sqlite: file is not a database; this is no run store"):
                open_store(tmp_path)

    def test_a_damaged_page(self, tmp_path):
        with RunStore(tmp_path) as store:
            store.scalars(1, {f"scalar {i}": 1.0 for i in range(2000)})
        whole = (tmp_path / "run.sqlite").read_bytes()
        (tmp_path / "run.sqlite").write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
        with (
            RunStore.open_readonly(tmp_path) as store,
            pytest.raises(StoreError, match="malformed; the file is damaged; move it away"),
        ):
            store.scalar_history("scalar 1")

    def test_an_sqlite_file_of_something_else(self, tmp_path):
        with sqlite3.connect(tmp_path / "run.sqlite") as other:
            other.execute("CREATE TABLE bookmarks (url TEXT)")
        other.close()
        for open_store in (RunStore, RunStore.open_readonly):
            with pytest.raises(StoreError, match="expected a run store of equipoise, got an SQLite file of something"):
                open_store(tmp_path)

    def test_a_newer_schema(self, tmp_path):
        RunStore(tmp_path).close()
        other = sqlite3.connect(tmp_path / "run.sqlite")
        other.execute("PRAGMA user_version = 7")
        other.close()
        for open_store in (RunStore, RunStore.open_readonly):
            with pytest.raises(StoreError, match="expected schema version 1, got 7; it was written by another version"):
                open_store(tmp_path)

    def test_a_reader_cannot_write(self, tmp_path):
        RunStore(tmp_path).close()
        with (
            RunStore.open_readonly(tmp_path) as reader,
            pytest.raises(StoreError, match=r"readonly database; open it with RunStore\.open_readonly, or make"),
        ):
            reader.scalars(1, {"loss": 1.0})

    def test_a_full_disk_keeps_what_was_there(self, tmp_path):
        with RunStore(tmp_path) as store:
            store.scalars(1, {"loss": 4.0})
            pages = store._db.execute("PRAGMA page_count").fetchone()[0]
            store._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to run out of space
            with pytest.raises(StoreError, match="disk is full; free some space and go on from the last checkpoint"):
                store.scalars(2, {f"scalar {i}": 1.0 for i in range(5000)})
            assert [step for step, _, _ in store.scalar_history("loss")] == [1]

    def test_a_damaged_record(self, store):
        store.routing([record()])
        store._db.execute("UPDATE routing SET stats = '[]'")
        with pytest.raises(
            StoreError, match=r"a record cannot be read \(AttributeError\); the file is damaged, or newer"
        ):
            store.latest_routing()

    def test_an_unknown_layer_names_the_known_ones(self, store):
        store.routing([record("a"), record("b")])
        with pytest.raises(StoreError, match=r"layer: expected one of the recorded layers \(a, b\), got 'c'"):
            store.routing_history("c")
