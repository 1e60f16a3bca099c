"""What needs a GPU says so at once."""

import sys

import pytest
import torch

from benchmarks import gpu_blocks


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_ends_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_blocks"])
    assert gpu_blocks.main() == 2
    assert "expected a GPU, got none that torch sees" in capsys.readouterr().err
