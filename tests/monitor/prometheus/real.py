"""The real Prometheus with the exported rules, started by a test; everything listens on 127.0.0.1."""

import contextlib
import json
import socket
import subprocess
import urllib.parse
import urllib.request

import yaml
from tests.monitor.debian import binary

from equipoise.monitor.prometheus.rules import export_rules
from equipoise.monitor.prometheus.timing import Timing

TIMING = Timing(window=5, hold=1, stalled=900, evaluate=1)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(command, folder):
    """A server of ours, ended by its own id."""
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def prometheus(folder, targets, alerts_to=None):
    """The URL of one that scrapes the targets, "host:port", each second. alerts_to: URL of an Alertmanager."""
    folder.mkdir()
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "equipoise", "static_configs": [{"targets": targets}]}],
    }
    if alerts_to is not None:
        to = {"targets": [alerts_to.removeprefix("http://")]}
        config["alerting"] = {"alertmanagers": [{"static_configs": [to]}]}
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    (folder / "rules.yml").write_text(export_rules("relative", timing=TIMING))
    address = f"127.0.0.1:{free_port()}"
    program = binary("prometheus", "usr/bin/prometheus")
    options = [f"--web.listen-address={address}", f"--storage.tsdb.path={folder}/data"]
    with running([program, "--config.file=config.yml", *options], folder):
        yield f"http://{address}"


def firing(url):
    """The labels of the alerts that fire."""
    query = urllib.parse.urlencode({"query": 'ALERTS{alertstate="firing"}'})
    with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=10) as answer:
        return [each["metric"] for each in json.load(answer)["data"]["result"]]
