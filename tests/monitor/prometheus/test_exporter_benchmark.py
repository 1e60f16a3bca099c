"""The exporter's benchmark runs, and measures scrapes of the sizes that it names. Its times are not looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.exporter import SIZES, flush_of, scrape_of

from equipoise.monitor.prometheus.live import LiveSource

ROOT = Path(__file__).parents[3]


def test_it_runs():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "benchmarks.exporter", "--smoke", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [table] = json.loads(done.stdout)["tables"]
    series = {row["operation"]: row["series"] for row in table["rows"]}
    assert list(series) == ["flush", "scrape, summary", "scrape, layer", "scrape, expert"]
    assert series["scrape, expert"] - series["scrape, layer"] == 2 * 8


def test_the_largest_size_has_all_its_series():
    source, size = LiveSource("run"), SIZES[-1]
    source.routing(flush_of(size))
    lines = scrape_of(source, "expert")().decode().splitlines()
    assert sum(line.startswith("equipoise_expert_assignments_total{") for line in lines) == 61 * 256
