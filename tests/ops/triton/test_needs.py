"""What stands in the way of the Triton backend is named, with a remedy."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from equipoise.layer import MoE


def test_without_triton_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # what an import of something that is not there comes to
    layer = MoE(8, 8, 4, backend="triton")  # constructing is always possible
    message = r"expected the package triton, got none; pip install 'equipoise\[triton\]', or use another backend"
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(1, 3, 8))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_on_a_cpu_the_error_names_the_interpreter():
    code = "import torch; from equipoise.layer import MoE; MoE(8, 8, 4, backend='triton')(torch.randn(1, 3, 8))"
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "expected tensors on a GPU, got cpu; move the layer there, set TRITON_INTERPRET=1" in done.stderr


def test_auto_takes_triton_only_where_it_was_measured():
    from equipoise.layer.experts import Experts, backend_for

    with torch.device("meta"):  # stands for any device that is neither a CPU nor such a GPU
        experts = Experts(4, 8, 8)
    name, _ = backend_for("auto", torch.empty(3, 8, device="meta"), experts.up, experts.down_proj)
    assert name == "grouped"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_of_that_kind_auto_is_triton():
    experts = MoE(64, 64, 4).to("cuda", torch.bfloat16).experts
    measured = torch.cuda.get_device_capability() >= (9, 0)
    assert ("backend=triton" in repr(experts)) == measured
    odd = MoE(60, 64, 4).to("cuda", torch.bfloat16).experts  # 120 bytes
    assert "backend=triton" not in repr(odd)


def test_rows_that_are_not_whole_16_bytes_are_refused():
    from equipoise.ops.triton.needs import require

    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"rows of whole 16 bytes, got a width of 12 in torch.bfloat16; round it up"):
        require(torch.device("cuda"), torch.bfloat16, (16, 12))
