"""The commands watch, triage and diagnose, as a person calls them."""

import json

import numpy as np
import pytest

from equipoise.cli import main
from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.monitor.store import RunStore
from equipoise.types import Action, Alert, Finding

E, TOKENS = 8, 4000


@pytest.fixture
def run(tmp_path):
    """A run whose second layer collapses at step 60, and stays so."""
    with RunStore(tmp_path / "run") as store:
        store.set_meta(name="night", status="finished")
        for step in range(10, 110, 10):
            flushes = []
            for layer in "ab":
                bad = layer == "b" and step >= 60
                counts_E = np.array([TOKENS, TOKENS] + [0] * 6) if bad else np.full(E, 1000)
                sums = RoutingSums(TOKENS, counts_E, counts_E / 2.0, 0.0, 0.0, TOKENS * E, 2.0 * TOKENS, {}, {})
                flushes.append(routing_stats(layer, step, sums))
            store.routing(flushes)
            store.scalars(step, {"loss": 3.0})
    return tmp_path / "run"


def call(*argv):
    with pytest.raises(SystemExit) as ended:
        main([str(part) for part in argv])
    return ended.value.code


def repair(run):
    """Detected at step 70; a bias is undone at once, spilling is on trial."""
    finding = Finding("collapse", "b", 0, "critical", float("inf"), 0.5, "b has collapsed", "rebalance it")
    begun = Action("quantile_bias", "b", 70, "b:collapse", {"loss_before": 2.3, "loss_after": float("inf")})
    with RunStore(run) as store:
        store.alert(Alert("b:collapse", "firing", 60, 70, finding))
        store.action(begun)
        store.action(Action("quantile_bias", "b", 70, "b:collapse", {"steps": 0.0}, "undone", "the loss rose"))
        store.action(Action("spill", "b", 70, "b:collapse", {"loss_before": 2.3, "loss_after": 2.31}))


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_watch_as_json_has_each_repair_once_and_the_incidents(run, capsys):
    repair(run)
    assert call("watch", run, "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert [each["state"] for each in found["actions"]] == ["applied", "undone", "applied"]
    assert [(each["kind"], each["step"], each["state"], each["note"]) for each in found["repairs"]] == [
        ("quantile_bias", 70, "undone", "the loss rose"),
        ("spill", 70, "applied", ""),
    ]
    assert found["repairs"][0]["detail"] == {"loss_before": 2.3, "loss_after": None, "steps": 0.0}  # infinite
    [incident] = found["incidents"]
    assert (incident["key"], incident["since"], incident["fired"], incident["resolved"]) == ("b:collapse", 60, 70, None)
    assert [each["kind"] for each in incident["actions"]] == ["quantile_bias", "spill"]
    assert [each["state"] for each in incident["changes"]] == ["applied", "undone", "applied"]
    assert incident["finding"]["value"] is None


def test_watch_shows_each_repair_once(run, capsys):
    repair(run)
    assert call("watch", run, "--once") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("quantile_bias on b") == 1
    assert "undone step 70, at once: quantile_bias on b" in out
    assert "applied step 70: spill on b because of b:collapse, perplexity 9.974 → 10.07" in out


def test_triage_says_what_was_done_or_could_be(run, capsys):
    call("triage", run)
    out = " ".join(capsys.readouterr().out.split())
    assert "No repair is recorded." in out
    assert "--recover" in out
    repair(run)
    assert call("triage", run) == 1
    assert "spill on b at step 70, applied" in " ".join(capsys.readouterr().out.split())


def test_triage_says_what_is_wrong_and_exits_with_1(run, capsys):
    assert call("triage", run) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "b has collapsed since step 60." in out
    assert "Did the other layers' loads move" in out
    assert out.count("Rebalance this router") == 2  # beside its check, and in the conclusion; not a third time
    assert out.endswith(f"equipoise watch {run}".replace("\n", " "))


def test_triage_as_json_with_a_report(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert call("triage", run, "--json", "--report", tmp_path / "night") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["healthy"]
    assert found["checks"][1]["layer"] == "b"
    assert [path.rsplit(".")[-1] for path in found["report"]] == ["md", "html"]
    assert "b has collapsed" in (tmp_path / "night.md").read_text()


def test_triage_of_no_run(tmp_path, capsys):
    assert call("triage", tmp_path / "nothing") == 2
    assert "nothing" in capsys.readouterr().err


def test_diagnose(tmp_path, capsys):
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(E), (3000, 3, 1)), axis=2)[:, :, :2]
    np.savez(tmp_path / "healthy.npz", indices=ids)
    assert call("diagnose", tmp_path / "healthy.npz", "--num-experts", E) == 0
    assert "every token counted" in capsys.readouterr().out
    ids[:, 1] = [0, 5]
    np.savez(tmp_path / "broken.npz", indices=ids)
    assert call("diagnose", tmp_path / "broken.npz", "--num-experts", E, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["layers"][1]["counts_E"] == [3000, 0, 0, 0, 0, 3000, 0, 0]
    assert found["layers"][1]["logit_std"] is None  # not in the file
    assert [(f["rule"], f["layer"]) for f in found["findings"]] == [
        ("collapse", "layers.1"),
        ("dead_experts", "layers.1"),
    ]
    assert call("diagnose", tmp_path / "broken.npz") == 2
    assert "num_experts" in capsys.readouterr().err
