"""The benchmark of other layers runs, and compares before it times."""

import json
import sys

from benchmarks import alternatives


def test_it_runs(monkeypatch, tmp_path):
    path = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks.alternatives", "--smoke", "--json", str(path)])
    alternatives.main()
    tables = json.loads(path.read_text())["tables"]
    assert [len(table["rows"]) for table in tables] == [2, 1]
