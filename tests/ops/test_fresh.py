"""Memory for large results: what is asked for, where it is asked for."""

import pytest
import torch

from equipoise.ops.fresh import fresh


@pytest.mark.parametrize("rows", [3, 2**19])  # below and above where it takes another way: 4 MiB
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_was_asked_and_can_be_written(rows, dtype):
    made = fresh((rows, 5), torch.zeros(1, dtype=dtype))
    assert (made.shape, made.dtype, made.is_contiguous()) == ((rows, 5), dtype, True)
    assert rows == 3 or made.data_ptr() % 64 == 0  # a cache line
    made.fill_(1.0)
    assert made.float().sum() == rows * 5
    made[-1] = 2.0
    assert made[-1].tolist() == [2.0] * 5


def test_it_is_where_the_other_is():
    assert fresh((2**21, 3), torch.zeros(1, device="meta")).device.type == "meta"


def test_the_memory_lives_as_long_as_the_tensor():
    """It belongs to an array of NumPy's, which nobody else holds."""
    kept = [fresh((2**20, 2), torch.zeros(1)).fill_(float(n)) for n in range(4)]
    assert [tensor[0, 0].item() for tensor in kept] == [0.0, 1.0, 2.0, 3.0]
    assert all((tensor == n).all() for n, tensor in enumerate(kept))
