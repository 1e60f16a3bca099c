"""The commands triage and diagnose, as a person calls them."""

import json

import numpy as np
import pytest

from equipoise.cli import main
from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.monitor.store import RunStore

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


def test_triage_says_what_is_wrong_and_exits_with_1(run, capsys):
    assert call("triage", run) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "b has collapsed since step 60." in out
    assert "Did the other layers' loads move" in out


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
