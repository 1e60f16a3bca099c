"""The commands for Prometheus print what it reads."""

import json
import shlex
import subprocess
import sys

import pytest

from equipoise.cli import main


def printed(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_export(capsys):
    yaml = pytest.importorskip("yaml")
    groups = yaml.safe_load(printed(capsys, "export", "rules", "--runbooks", "https://example.org/runbooks"))["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert alerts
    assert all(rule["annotations"]["runbook_url"].startswith("https://example.org/runbooks#") for rule in alerts)
    assert json.loads(printed(capsys, "export", "grafana"))["panels"]
    assert "inhibit_rules" in yaml.safe_load(printed(capsys, "export", "alertmanager"))


def test_a_reader_that_goes_away_is_no_error():
    command = f"{shlex.quote(sys.executable)} -m equipoise export grafana | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{", "")


def test_exporter_of_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["exporter", str(tmp_path / "nothing")])
    assert ended.value.code == 2
    assert "nothing" in capsys.readouterr().err
