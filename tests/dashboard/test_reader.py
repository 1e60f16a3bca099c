"""Reading a run for the pages: the same as the store says, bounded, and errors that name the remedy."""

import json
import math
import sqlite3

import numpy as np
import pytest
from tests.dashboard.stores import collapse, record, together, window, write_ladder, write_run

from equipoise.dashboard import reader
from equipoise.dashboard.run_data import Choice, read_run, thinned
from equipoise.dashboard.runs import run_ref
from equipoise.monitor.store import RunStore, StoreError


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", incident=True)


class TestAgreesWithTheStore:
    def test_routing(self, run):
        with RunStore.open_readonly(run) as store, reader.reading(run) as db:
            for ours, theirs in zip(reader.frame(db).layers, store.latest_routing(), strict=True):
                assert {**vars(ours), "counts_E": None} == {**vars(theirs), "counts_E": None}
                np.testing.assert_array_equal(ours.counts_E, theirs.counts_E)
            assert db.layers() == store.layers()
            steps = [stats.step for stats in store.routing_history("layers.0.mlp")]
            assert reader.flush_steps(db) == steps
            assert [stats.step for stats in reader.history(db, "layers.0.mlp", steps)] == steps

    def test_scalars_alerts_and_actions(self, run):
        with RunStore.open_readonly(run) as store, reader.reading(run) as db:
            expected = tuple((step, value) for step, value, _ in store.scalar_history("loss"))
            assert reader.scalar(db, "loss").points == expected
            assert reader.scalar_names(db) == ["grad_norm", "loss", "val_perplexity"]
            assert reader.alerts(db) == store.alerts()
            assert reader.actions(db) == store.actions()

    def test_times_of_experts_are_the_newest_and_hide_no_other_scalar(self, tmp_path):
        run = write_run(tmp_path / "run")
        with RunStore(run) as store:
            for step in (10, 20):
                store.scalars(step, {f"experts_ms.a/{e}.{q}": step + e for e in range(1, 40) for q in ("p50", "p99")})
            store.scalars(20, {"experts_ms.a/2.p99": float("inf"), "experts_ms.a.p99": 5.0})
        with reader.reading(run) as db:
            times = reader.expert_times(db, "a", 4)
            assert times.p50 == (None, 21.0, 22.0, 23.0)
            assert times.p99 == (None, 21.0, None, 23.0)
            assert times.slowest == 3
            assert reader.expert_times(db, "b", 2).slowest is None
            assert reader.scalar_names(db) == ["experts_ms.a.p99", "grad_norm", "loss", "val_perplexity"]

    def test_evenness_is_effective_experts_over_experts(self, run):
        with RunStore.open_readonly(run) as store, reader.reading(run) as db:
            even = reader.evenness(db, reader.flush_steps(db), store.layers())
            for row, layer in enumerate(even.layers):
                expected = [stats.effective_experts / 8 for stats in store.routing_history(layer)]
                np.testing.assert_allclose(even.share_LS[row], expected)

    def test_a_frame_is_the_newest_flush_not_after_the_step(self, run):
        with reader.reading(run) as db:
            assert reader.frame(db, 10**6).step == 120
            assert reader.frame(db, 59).step == 50
            assert reader.frame(db, 9) is None

    def test_one_moment_for_all_that_is_read(self, run):
        with reader.reading(run) as db, RunStore(run) as store:
            assert reader.frame(db).step == 120
            store.routing(window(["layers.0.mlp", "layers.1.mlp"], 130))
            assert reader.frame(db).step == 120

    def test_what_is_chosen_together_follows_layer_and_step(self, run):
        with reader.reading(run) as db:
            assert read_run(db, run_ref(run), Choice()).together is None
        with RunStore(run) as store:
            for step in (50, 100):
                store.co_selection([together("layers.0.mlp", step), together("layers.1.mlp", step, k=3)])
        with reader.reading(run) as db:
            for choice, expected in (
                (Choice("layers.1.mlp"), ("layers.1.mlp", 100)),
                (Choice("layers.0.mlp", 99), ("layers.0.mlp", 50)),
            ):
                found = read_run(db, run_ref(run), choice).together
                assert (found.layer, found.step) == expected
            assert read_run(db, run_ref(run), Choice("layers.0.mlp", 49)).together is None


class TestBounded:
    def test_a_long_curve_keeps_its_lowest_and_highest_points(self, tmp_path):
        values = np.random.default_rng(0).normal(size=20_000)
        values[[7_777, 12_345]] = 50.0, -50.0  # one step each: an average would lose them
        with RunStore(tmp_path) as store, store.transaction():
            for step, value in enumerate(values):
                store.scalars(step, {"loss": value})
        with reader.reading(tmp_path) as db:
            points = reader.scalar(db, "loss").points
        assert 200 <= len(points) <= reader.MAX_POINTS
        assert (7_777, 50.0) in points
        assert (12_345, -50.0) in points
        assert [step for step, _ in points] == sorted({step for step, _ in points})
        assert all(value == values[step] for step, value in points)

    def test_a_long_curve_shows_where_it_was_not_finite(self, tmp_path):
        with RunStore(tmp_path) as store, store.transaction():
            for step in range(2_000):
                store.scalars(step, {"loss": {777: math.nan, 1_555: math.inf}.get(step, 1.0 + step)})
        with reader.reading(tmp_path) as db:
            points = dict(reader.scalar(db, "loss").points)
        assert points[777] is None
        assert points[1_555] is None
        assert len(points) <= 2 * reader.MAX_POINTS

    def test_short_curves_are_whole(self, tmp_path):
        with RunStore(tmp_path) as store:
            for step, value in enumerate([1.0, math.nan, -math.inf, 4.0]):
                store.scalars(step, {"loss": value})
        with reader.reading(tmp_path) as db:
            assert reader.scalar(db, "loss").points == ((0, 1.0), (1, None), (2, None), (3, 4.0))
            assert reader.scalar(db, "unknown").points == ()

    def test_flushes_are_thinned_and_those_of_alerts_kept(self, tmp_path):
        with RunStore(tmp_path) as store, store.transaction():
            for step in range(1, 1_001):
                store.routing([record("a", step, np.array([5, 5]))])
        with reader.reading(tmp_path) as db:
            steps = reader.flush_steps(db, 100, keep=[334, 5_000])
            assert 64 <= len(steps) <= 130
            assert {1, 334, 1_000} <= set(steps)  # the first, the alert's, the last
            fewer = reader.flush_steps(db, 50)
            assert set(fewer[:-1]) <= set(steps)  # a longer run drops every other one, and moves none

    def test_thinning_for_a_map(self):
        assert thinned(range(10), 5) == [0, 2, 4, 6, 8, 9]
        assert thinned(range(10), 5, keep=[3, 99]) == [0, 2, 3, 4, 6, 8, 9]
        assert thinned([], 5) == []

    def test_the_page_of_a_big_model_is_bounded(self, tmp_path):
        layers = [f"model.layers.{i}.mlp" for i in range(61)]
        write_run(tmp_path, layers=layers, num_experts=256, flushes=6, incident=True)
        with reader.reading(tmp_path) as db:
            data = read_run(db, run_ref(tmp_path), Choice())
        assert len(data.frame.layers) == 61
        assert data.layer == layers[-1]  # the one with the alert
        assert data.evenness.share_LS.size <= reader.MAX_CELLS
        assert sum(stats.num_experts for stats in data.map_history) <= reader.MAX_CELLS
        assert 40 in [stats.step for stats in data.map_history]  # when the alert fired


class TestServer:
    """A server's folder is a run whose steps are the engine's."""

    @pytest.fixture
    def served(self, tmp_path):
        run = write_run(tmp_path / "serving")
        with RunStore(run) as store:
            store.set_meta(kind="server", status="running")
            speed = {"tokens_per_s": 733.0, "time_to_first_token_ms.p99": 21.5, "queue_depth": 4.0}
            many = {f"distinct_experts.layers.{i}.mlp": float(i) for i in range(100)}
            store.scalars(120, speed | {"experts_ms.layers.1.mlp.p99": 2.5} | many)
        return run

    def test_its_head_and_its_speed(self, served):
        with reader.reading(served) as db:
            data = read_run(db, run_ref(served), Choice("layers.1.mlp"))
        assert data.head.is_server
        assert (data.head.tokens_per_s, data.head.first_token_ms, data.head.queue_depth) == (733.0, 21.5, 4.0)
        assert data.scalars["experts_ms.layers.1.mlp.p99"].points == ((120, 2.5),)
        assert data.scalars["distinct_experts.layers.1.mlp"].points == ((120, 1.0),)  # though 64 names are listed
        assert data.scalars["inter_token_ms.p50"].points == ()

    def test_a_run_is_none(self, run):
        with reader.reading(run) as db:
            data = read_run(db, run_ref(run), Choice())
        assert not data.head.is_server
        assert "queue_depth" not in data.scalars


class TestHead:
    def test_a_run_at_a_glance(self, run):
        with reader.reading(run) as db:
            head = reader.head(db, run)
        assert (head.name, head.status, head.step, head.total_steps) == ("demo", "finished", 120, 120)
        assert (head.num_layers, head.num_repairs, head.firing) == (2, 1, ())
        assert head.val_perplexity == 80.0
        assert head.worst.layer in ("layers.0.mlp", "layers.1.mlp")
        assert len(head.spark) == 12

    def test_firing_alerts_and_the_worst_layer(self, run):
        with RunStore(run) as store:
            store.routing(window(["layers.0.mlp", "layers.1.mlp"], 130, broken="layers.0.mlp"))
            store.alert(collapse("layers.0.mlp", "firing", 130, since=120))
        with reader.reading(run) as db:
            head = reader.head(db, run)
        assert [incident.key for incident in head.firing] == ["layers.0.mlp:collapse"]
        assert head.worst.layer == "layers.0.mlp"
        assert head.worst.effective_experts < 1.5

    def test_repairs_that_were_applied_are_counted_once(self, tmp_path):
        """Four: quantile_bias and router_rollback (undone), spill (kept), boost; no failure, proposal or page."""
        write_ladder(tmp_path)
        with reader.reading(tmp_path) as db:
            assert reader.head(db, tmp_path).num_repairs == 4
            data = read_run(db, run_ref(tmp_path), Choice())
        assert [(a.kind, a.step, a.state) for a in data.repairs] == [
            ("quantile_bias", 70, "undone"),
            ("spill", 70, "kept"),
            ("reseed", 190, "failed"),
            ("router_rollback", 190, "undone"),
            ("look_at_input", 210, "proposed"),
            ("boost", 340, "applied"),
        ]
        assert {70, 90, 190, 230, 340} <= set(data.steps)  # the slider stops at each change

    def test_repairs_from_before_they_had_states_are_counted(self, run):
        query = "INSERT INTO actions (step, kind, layer, reason, detail) VALUES (1, 'bias', 'a', 'why', ?)"
        _execute(run, query, '{"max_violation": 3.0}')
        with reader.reading(run) as db:
            assert reader.head(db, run).num_repairs == 2

    def test_an_empty_run(self, tmp_path):
        RunStore(tmp_path / "empty").close()
        with reader.reading(tmp_path / "empty") as db:
            head = reader.head(db, tmp_path / "empty")
            data = read_run(db, run_ref(tmp_path / "empty"), Choice())
        assert (head.name, head.status, head.step, head.worst, head.loss) == ("empty", "running", 0, None, None)
        assert (data.frame, data.layer, data.history, data.steps) == (None, "", (), ())

    def test_a_loss_that_is_not_finite(self, tmp_path):
        with RunStore(tmp_path) as store:
            store.scalars(1, {"loss": math.nan})
        with reader.reading(tmp_path) as db:
            assert math.isnan(reader.head(db, tmp_path).loss)


class TestErrors:
    def test_no_file(self, tmp_path):
        with (
            pytest.raises(StoreError, match=r"with run\.sqlite in it, found none; .* wait until the run has written"),
            reader.reading(tmp_path),
        ):
            pass

    def test_a_corrupt_file(self, tmp_path):
        (tmp_path / "run.sqlite").write_bytes(b"certainly not SQLite" * 100)
        with (
            pytest.raises(StoreError, match="not a database; this is no run store, or it is damaged"),
            reader.reading(tmp_path),
        ):
            pass

    def test_another_programs_file(self, tmp_path):
        with sqlite3.connect(tmp_path / "run.sqlite") as other:
            other.execute("CREATE TABLE bookmarks (url TEXT)")
        other.close()
        with pytest.raises(StoreError, match="an SQLite file of something else"), reader.reading(tmp_path):
            pass

    def test_a_newer_schema(self, run):
        _execute(run, "PRAGMA user_version = 7")
        with (
            pytest.raises(StoreError, match="expected schema version 1, got 7; it was written by another version"),
            reader.reading(run),
        ):
            pass

    def test_a_locked_file_is_given_up_soon(self, run):
        holder = sqlite3.connect(run / "run.sqlite", isolation_level=None)
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("INSERT INTO meta VALUES ('held', '1')")
        try:
            with pytest.raises(StoreError, match="locked; another process holds it"), reader.reading(run) as db:
                reader.head(db, run)
        finally:
            holder.close()

    @pytest.mark.parametrize("text", ['{"layer": 1', "[]", "{}", '{"dead_experts": 3}'])
    def test_a_damaged_record(self, run, text):
        _execute(run, "UPDATE routing SET stats = ?", text)
        with pytest.raises(StoreError, match="a record cannot be read"), reader.reading(run) as db:
            reader.frame(db)

    def test_fields_of_a_later_version_are_passed_over(self, run):
        _execute(run, "UPDATE routing SET stats = json_set(stats, '$.novelty', 1)")
        with reader.reading(run) as db:
            assert len(reader.frame(db).layers) == 2

    def test_it_cannot_write(self, run):
        with pytest.raises(StoreError, match="readonly"), reader.reading(run) as db:
            db.rows("DELETE FROM meta")


def _execute(run, query, *values):
    db = sqlite3.connect(run / "run.sqlite")
    with db:
        db.execute(query, values)
    db.close()


def test_json_of_the_store_is_plain():
    """json_extract, which the map over time relies on, is there in this SQLite."""
    db = sqlite3.connect(":memory:")
    assert db.execute("SELECT json_extract(?, '$.a')", (json.dumps({"a": 2.5}),)).fetchone() == (2.5,)
    db.close()
