"""The source that follows a run folder: all of its history, what is new, resumed runs, and trouble with the file."""

import os
import threading

import pytest
from tests.monitor.prometheus.cases import alert, scrape, value, window

from equipoise.monitor.prometheus import run_folder
from equipoise.monitor.prometheus.live import LiveSource
from equipoise.monitor.prometheus.run_folder import RunFolderSource
from equipoise.monitor.store import RunStore, StoreError
from equipoise.types import Action

DROPPED = {"capacity": 30, "hard_cap": 0, "tokens": 5}


def write(store, steps, layers=("blocks.0", "blocks.1")):
    for step in steps:
        with store.transaction():
            store.scalars(step, {"loss": 1.0})
            store.routing([window(layer, step, dropped=DROPPED, rerouted={"moved": step}) for layer in layers])


@pytest.fixture
def store(tmp_path):
    with RunStore(tmp_path / "run") as store:
        store.set_meta(name="tiny", status="running")
        yield store


def test_it_exports_what_a_live_source_would(store):
    live = LiveSource("run")
    for step in (5, 10, 15):
        records = [window(layer, step, dropped=DROPPED) for layer in ("b", "a")]
        for sink in (store, live):
            sink.routing(records)
    for sink in (store, live):
        sink.alert(alert())
        sink.alert(alert("drops", severity="info"))
        sink.alert(alert("drops", state="resolved", severity="info"))
        for state in ("applied", "undone", "applied", "kept", "proposed", "failed"):
            sink.action(Action("quantile_bias", "b", 10, "b:collapse", state=state))
    other = ("equipoise_monitor_seconds_total", "equipoise_last_flush_timestamp_seconds")
    scraped, expected = (
        {key: number for key, number in scrape(source, detail="expert").items() if key[0] not in other}
        for source in (RunFolderSource(store.path.parent, run="run"), live)
    )
    assert scraped == expected
    assert list(RunFolderSource(store.path.parent).read().layers) == ["b", "a"]  # the model's order


def test_it_follows_a_run_that_goes_on(store):
    source = RunFolderSource(store.path.parent)
    assert source.read().run == "run"
    assert (source.read().layers, source.read().flushed_at) == ({}, None)
    totals = []
    for steps in ((5,), (), (10, 15, 20)):
        write(store, steps)
        seen = source.read()
        totals.append((seen.num_flushes, seen.step, seen.layers["blocks.1"].num_tokens))
    assert totals == [(1, 5, 1024), (1, 5, 1024), (4, 20, 4 * 1024)]
    assert seen.layers["blocks.1"].rerouted["moved"] == 5 + 10 + 15 + 20
    assert seen.layers["blocks.0"].dropped == {"capacity": 4 * 30, "hard_cap": 0, "tokens": 4 * 5}
    assert seen.running
    store.set_meta(status="finished")
    assert not source.read().running


def test_a_long_history_is_read_in_pages(store, monkeypatch):
    monkeypatch.setattr(run_folder, "PAGE", 3)
    write(store, range(1, 12))
    seen = RunFolderSource(store.path.parent).read()
    assert (seen.num_flushes, seen.step, seen.layers["blocks.0"].num_tokens) == (11, 11, 11 * 1024)


def test_the_time_of_the_newest_flush_is_the_runs(store):
    write(store, (5, 10))
    [(_, _, expected)] = [each for each in store.scalar_history("loss") if each[0] == 10]
    store.scalars(11, {"loss": 1.0})
    source = RunFolderSource(store.path.parent)
    assert source.read().flushed_at == expected
    assert source.read().flushed_at == expected


def test_without_times_in_the_store_it_is_the_files(store):
    store.routing([window(step=5)])
    for name in ("run.sqlite", "run.sqlite-wal"):
        os.utime(store.path.with_name(name), (1_000_000, 1_000_000))
    assert RunFolderSource(store.path.parent).read().flushed_at == 1_000_000


def test_totals_do_not_fall_when_a_run_is_resumed(store):
    """Steps after the checkpoint are taken back and done again. That work was done twice, and counts twice."""
    write(store, (5, 10, 15))
    store.alert(alert())
    store.action(Action("quantile_bias", "blocks.0", 100, "why"))
    source = RunFolderSource(store.path.parent)
    before = source.read()
    store.truncate_after(5)
    back = source.read()
    assert (back.step, back.num_flushes, back.layers["blocks.0"].num_tokens) == (5, 3, 3 * 1024)
    assert (back.fired, back.actions, back.firing) == (before.fired, before.actions, ())
    write(store, (10, 15, 20))
    after = source.read()
    assert (after.step, after.num_flushes, after.layers["blocks.0"].num_tokens) == (20, 6, 6 * 1024)
    fresh = RunFolderSource(store.path.parent).read()
    assert (fresh.num_flushes, fresh.layers["blocks.0"].num_tokens) == (4, 4 * 1024)


def test_each_change_of_a_repair_is_counted_once_however_often_it_is_read(store):
    source = RunFolderSource(store.path.parent)
    counted = []
    for state in ("applied", "undone", "applied", "kept"):
        store.action(Action("quantile_bias", "blocks.0", 100, "why", state=state))
        source.read()
        counted.append(dict(source.read().actions))
    applied, undone, kept = (("quantile_bias", state) for state in ("applied", "undone", "kept"))
    assert counted == [
        {applied: 1},
        {applied: 1, undone: 1},
        {applied: 2, undone: 1},
        {applied: 2, undone: 1, kept: 1},
    ]


def test_rows_from_before_repairs_had_states_count_as_applied(store):
    store._db.execute("INSERT INTO actions (step, kind, layer, reason, detail) VALUES (5, 'bias', 'b', 'why', '{}')")
    assert RunFolderSource(store.path.parent).read().actions == {("bias", "applied"): 1}


def test_a_folder_that_goes_away_and_comes_back(store, tmp_path):
    write(store, (5,))
    source = RunFolderSource(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    scraped = scrape(source)
    assert value(scraped, "equipoise_source_up") == 0
    assert value(scraped, "equipoise_layer_tokens_total", layer="blocks.0") == 1024
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    assert value(scrape(source), "equipoise_source_up") == 1


def test_no_run_there(tmp_path):
    with pytest.raises(StoreError, match=r"expected a run folder with run\.sqlite in it, found none"):
        RunFolderSource(tmp_path)


def test_many_threads_read_while_the_run_writes(store):
    write(store, (1,))
    source, seen, failures, done = RunFolderSource(store.path.parent), [], [], threading.Event()

    def read():
        try:
            while True:
                last = done.is_set()
                seen.append(source.read())
                if last:
                    return
        except Exception as error:  # a thread's error would be lost
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    write(store, range(2, 21))
    done.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(each.readable for each in seen)
    for each in seen:  # both layers of a flush, or none
        assert {layer.num_tokens for layer in each.layers.values()} == {1024 * each.num_flushes}
    assert seen[-1].num_flushes == 20
