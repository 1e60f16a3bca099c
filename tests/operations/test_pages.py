"""The operations pages are true: their tables are what the code exports, configurations pass the servers' checks.

The slow tests follow each page to the letter, with the real Prometheus and Alertmanager.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.monitor.debian import binary, relocated
from tests.operations.tables import PAGES, TABLE, TABLES, renewed
from tests.test_tutorials import Terminal, blocks

from equipoise.monitor.prometheus.commands import export
from equipoise.routing import BALANCERS, LOSSES, ROUTERS

ROOT = Path(__file__).parents[2]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md"))}
FOLLOWED = [path for path in sorted(PAGES.glob("*.md")) if path.stem != "ray-serve"]  # tests/serve/live/test_ray.py
FILE = re.compile(r"^cat > (\S+) <<'END'\n(.*?)^END$", re.MULTILINE | re.DOTALL)
TEMPLATES = "usr/share/prometheus/alertmanager"


def files(page):
    """What a page's `cat > NAME` blocks write."""
    return dict(FILE.findall(TEXTS[page]))


def check(folder, *command):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("page", TEXTS)
def test_tables_are_what_the_code_has(page):
    assert renewed(TEXTS[page]) == TEXTS[page], "write them with: python -m tests.operations.tables"


def test_every_table_is_on_a_page():
    assert sorted(name for text in TEXTS.values() for _, name, _ in TABLE.findall(text)) == sorted(TABLES)


def test_a_metric_that_is_gone_would_be_noticed():
    text = TEXTS["prometheus.md"]
    assert renewed(text.replace("`equipoise_layer_gini_ratio`", "`equipoise_layer_gini`")) == text


@pytest.mark.parametrize("page", [page for page in TEXTS if "prometheus.yml" in files(page)])
def test_promtool_takes_the_configuration(page, tmp_path):
    (tmp_path / "prometheus.yml").write_text(files(page)["prometheus.yml"])
    for profile in ("relative", "absolute"):
        (tmp_path / "equipoise.rules.yml").write_text(export("rules", profile))
        assert "SUCCESS" in check(
            tmp_path, binary("prometheus", "usr/bin/promtool"), "check", "config", "prometheus.yml"
        )


def test_promtool_takes_the_rules_of_the_page(tmp_path):
    rules = files("prometheus.md")["serving.rules.yml"]
    (tmp_path / "rules.yml").write_text(rules)
    said = check(tmp_path, binary("prometheus", "usr/bin/promtool"), "check", "rules", "rules.yml")
    assert "SUCCESS: 2 rules found" in said
    told = {f"equipoise_serve_{name}" for name in ("last_step_timestamp_seconds", "open_requests")}
    known = set(re.findall(r"\| `(equipoise_serve_\w+)` \|", TEXTS["prometheus.md"]))
    used = set(re.findall(r"equipoise_serve_\w+?(?=_bucket|\W)", rules))
    assert told < used <= known


@pytest.mark.parametrize("page", ["alertmanager.md", "pagerduty.md"])
def test_amtool_takes_the_configuration(page, tmp_path):
    (tmp_path / "alertmanager.yml").write_text(files(page)["alertmanager.yml"] + export("alertmanager"))
    said = check(tmp_path, binary("prometheus-alertmanager", "usr/bin/amtool"), "check-config", "alertmanager.yml")
    assert "10 inhibit rules" in said


def test_amtool_would_refuse_a_wrong_one(tmp_path):
    wrong = files("alertmanager.md")["alertmanager.yml"].replace("receiver: people", "receiver: nobody")
    (tmp_path / "alertmanager.yml").write_text(wrong)
    amtool = binary("prometheus-alertmanager", "usr/bin/amtool")
    done = subprocess.run([amtool, "check-config", "alertmanager.yml"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode != 0


def test_the_server_gets_what_it_can_repair():
    """The route to the admin port takes alerts of layers, and the verb knows their names."""
    from equipoise.monitor.alert_names import RULES
    from equipoise.recovery.policy import SERVING_RUNGS

    config = yaml.safe_load(files("alertmanager.md")["alertmanager.yml"])
    [route] = config["route"]["routes"]
    assert 'layer!=""' in route["matchers"]
    [receiver] = [each for each in config["receivers"] if each["name"] == route["receiver"]]
    assert receiver["webhook_configs"][0]["url"].endswith("/admin/alerts")
    assert all(name in TEXTS["alertmanager.md"] for name, rule in RULES.items() if rule in SERVING_RUNGS)


def test_grafanas_provisioning_is_of_the_shape_that_it_reads():
    """github.com/grafana/grafana: pkg/services/provisioning, by the keys of its documentation."""
    written = files("grafana.md")
    [source] = yaml.safe_load(written["provisioning/datasources/prometheus.yml"])["datasources"]
    assert (source["type"], source["access"]) == ("prometheus", "proxy")
    [provider] = yaml.safe_load(written["provisioning/dashboards/equipoise.yml"])["providers"]
    assert provider["type"] == "file"
    assert provider["options"].keys() == {"path"}


def test_what_is_counted_in_prose():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{len(ROUTERS)} routers, {len(LOSSES)} losses, {len(BALANCERS)} balancers" in readme
    compared = (ROOT / "docs" / "compared.md").read_text(encoding="utf-8")
    [number] = re.findall(r"\[(\d+) metrics per layer\]", compared)
    assert int(number) == len(TABLES["layer"]()[1])


@pytest.fixture
def servers(tmp_path):
    """A folder with their programs, for the path. Alertmanager finds its templates in its working folder."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("prometheus", "promtool"):
        (folder / name).symlink_to(binary("prometheus", f"usr/bin/{name}"))
    (folder / "amtool").symlink_to(binary("prometheus-alertmanager", "usr/bin/amtool"))
    program = relocated("prometheus-alertmanager", "usr/bin/prometheus-alertmanager", folder=f"/{TEMPLATES}")
    (folder / "prometheus-alertmanager").symlink_to(program)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", FOLLOWED, ids=lambda path: path.stem)
def test_to_the_letter(page, tmp_path, servers):
    work = tmp_path / "work"
    work.mkdir()
    for name in ("default.tmpl", "email.tmpl"):
        shutil.copy(binary("prometheus-alertmanager", f"{TEMPLATES}/{name}"), work)
    terminal = Terminal(work)
    terminal.environment["PATH"] = f"{servers}:{terminal.environment['PATH']}"
    try:
        for block in blocks(page):
            terminal.run(block)
    finally:
        terminal.end()


def test_outputs_in_the_pages_are_json_where_they_look_like_it():
    for page, text in TEXTS.items():
        for found in re.findall(r"^```text\n(\{\n.*?^\}\n)```", text, re.MULTILINE | re.DOTALL):
            if "..." not in found:
                assert json.loads(found), page
