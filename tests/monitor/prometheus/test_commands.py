"""What the command line calls: files on stdout, and a server that ends when it is told to."""

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request

import pytest
import yaml
from tests.monitor.prometheus.cases import samples, value, window

from equipoise.monitor.baseline import baselines_of, to_json
from equipoise.monitor.prometheus.commands import export, serve
from equipoise.monitor.prometheus.rules import export_rules
from equipoise.monitor.store import RunStore, StoreError


@pytest.fixture
def run(tmp_path):
    with RunStore(tmp_path / "run") as store:
        store.set_meta(name="tiny", status="running")
        store.routing([window("blocks.0"), window("blocks.1")])
    return tmp_path / "run"


def test_export():
    assert export("rules") == export_rules("relative")
    assert export("rules", "absolute", runbooks="https://x") == export_rules("absolute", runbooks="https://x")
    assert json.loads(export("grafana"))["title"] == "equipoise: routing"
    assert list(yaml.safe_load(export("alertmanager"))) == ["inhibit_rules"]
    with pytest.raises(ValueError, match="kind: expected rules, grafana or alertmanager, got 'dashboard'"):
        export("dashboard")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serving_a_run_folder_until_a_signal(run, number):
    code = f"import sys; from equipoise.monitor.prometheus.commands import serve; sys.exit(serve({str(run)!r}, 0))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        [url] = re.findall(r"http://\S+/metrics", process.stdout.readline())
        with urllib.request.urlopen(url, timeout=20) as answer:
            scraped = samples(answer.read().decode())
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
    assert value(scraped, "equipoise_layer_tokens_total", run="run", layer="blocks.1") == 1024


def test_serving_in_a_thread_with_baselines(run, capsys, tmp_path):
    (tmp_path / "baselines.json").write_text(json.dumps(to_json(baselines_of([window("blocks.0", logit_std=2.5)]))))
    stop, codes = threading.Event(), []
    options = {"stop": stop, "baselines": tmp_path / "baselines.json", "max_series": 500}
    thread = threading.Thread(target=lambda: codes.append(serve(run, 0, "expert", **options)))
    thread.start()
    printed = ""
    while thread.is_alive() and "\n" not in printed:
        thread.join(0.01)
        printed += capsys.readouterr().out
    [url] = re.findall(r"http://\S+/metrics", printed)
    with urllib.request.urlopen(url, timeout=20) as answer:
        scraped = samples(answer.read().decode())
    stop.set()
    thread.join(20)
    assert codes == [0]
    assert value(scraped, "equipoise_layer_baseline_logit_std", layer="blocks.0") == pytest.approx(2.5)
    assert value(scraped, "equipoise_expert_assignments_total", layer="blocks.1", expert="3") == 548
    assert value(scraped, "equipoise_series_limit") == 500


def test_signal_handlers_are_put_back(run):
    before = signal.getsignal(signal.SIGTERM)
    stop = threading.Event()
    stop.set()
    assert serve(run, 0, stop=stop) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_run(tmp_path):
    with pytest.raises(StoreError, match=r"expected a run folder with run\.sqlite in it"):
        serve(tmp_path, 0)
