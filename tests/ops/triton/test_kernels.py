"""Runs check_*.py in processes of their own: Triton's interpreter has to be chosen before triton is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'equipoise[triton]'"
)


def pytest_in_a_process(file: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpret)), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / file)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("file", "interpret"),
    [
        pytest.param("check_kernels.py", True, id="interpreted"),
        pytest.param("check_compilation.py", False, id="compiled"),
        pytest.param(
            "check_kernels.py",
            False,
            id="on a gpu",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
        ),
    ],
)
def test_kernels(file, interpret):
    done = pytest_in_a_process(file, interpret)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout.splitlines()[-1])
