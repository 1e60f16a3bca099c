"""Attention over blocks where they lie: what torch attends to in copies of them, and nobody else's numbers."""

import pytest
import torch

from equipoise.models.attend import Sight, attend
from equipoise.ops.native import paged
from equipoise.ops.native.paged import Blocks, paged_attention

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
ENDS = (1, 2, 15, 16, 17, 40, 96, 129)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _native():
    if paged._library() is None:
        pytest.skip(paged.load("paged.cpp", paged.NEEDS).reason)


def drawn(dtype, *, heads=6, kv_heads=2, width=64, size=16, ends=ENDS):
    """(queries, cache, where): blocks in any order, and no numbers wherever nothing of a sequence is."""
    draw = torch.Generator().manual_seed(width)
    most = -(-max(ends) // size)
    order = torch.randperm(len(ends) * most, generator=draw).view(len(ends), most)
    cache = torch.full((order.numel() * size, 2, kv_heads, width), torch.nan, dtype=dtype)
    for blocks, end in zip(order, ends, strict=True):
        slots = [int(blocks[at // size]) * size + at % size for at in range(end)]
        cache[slots] = torch.randn(end, 2, kv_heads, width, generator=draw).to(dtype)
    q = torch.randn(len(ends), heads, width, generator=draw).to(dtype)
    return q, cache, Blocks(order, torch.tensor(ends), size)


def twin(q, cache, where, sight=Sight()):  # noqa: B008 - frozen
    """In fp64, one sequence after the other."""
    rows = []
    for n, end in enumerate(where.ends_B.tolist()):
        slots = [int(where.blocks_BM[n, at // where.size]) * where.size + at % where.size for at in range(end)]
        k, v = cache[slots].double().permute(1, 2, 0, 3)[:, None]
        rows.append(attend(q[n, None, :, None].double(), k, v, None, sight)[0, :, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"heads": 4, "kv_heads": 4, "width": 16},
        {"heads": 3, "kv_heads": 1, "width": 80, "size": 5},
        {"heads": 8, "kv_heads": 1, "width": 208, "size": 1},
        {"heads": 2, "kv_heads": 2, "width": 128, "size": 300},
    ],
)
@pytest.mark.parametrize("window", [None, 1, 20, 500])
@pytest.mark.parametrize("sinks", [False, True])
def test_equals_attention_in_fp64(dtype, shape, window, sinks):
    q, cache, where = drawn(dtype, **shape)
    sinks_H = 3 * torch.randn(q.shape[1], generator=torch.Generator().manual_seed(1)) if sinks else None
    y = paged_attention(q, cache, where, window, sinks_H)
    expected = twin(q, cache, where, Sight(window, sinks_H))
    assert y.dtype == dtype
    assert float((y.double() - expected).norm()) < DTYPES[dtype] * float(expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequences_bits_are_its_own(dtype):
    """Alone, among others, on any number of threads, and where another's keys or queries are no numbers."""
    q, cache, where = drawn(dtype)
    together, threads = paged_attention(q, cache, where), torch.get_num_threads()
    for n in range(len(ENDS)):
        alone = Blocks(where.blocks_BM[n : n + 1], where.ends_B[n : n + 1], where.size)
        assert torch.equal(paged_attention(q[n : n + 1], cache, alone), together[n : n + 1])
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert torch.equal(paged_attention(q, cache, where), together)
    finally:
        torch.set_num_threads(threads)
    cache[int(where.blocks_BM[6, 1]) * where.size, 0, 1] = torch.nan  # a key of the second key/value head
    y = paged_attention(q, cache, where)
    assert y[6, 3:].isnan().all()
    y[6, 3:] = together[6, 3:]
    assert torch.equal(y, together)


def test_scores_of_any_size():
    """Where exp would overflow, and where one key has all of the attention."""
    q, cache, where = drawn(torch.float32)
    for factor in (1e-30, 1e3, 1e12):
        y, expected = paged_attention(q * factor, cache, where), twin(q * factor, cache, where)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(paged_attention(q, cache, where, None, torch.full((6,), 1e4)), torch.zeros_like(q))


def test_queries_that_lie_apart_are_read_right():
    q, cache, where = drawn(torch.float32)
    apart = torch.zeros(q.shape[1], q.shape[0], 100).transpose(0, 1)[:, :, 20:84]
    apart.copy_(q)
    assert torch.equal(paged_attention(apart, cache, where), paged_attention(q, cache, where))


def test_reasons():
    assert paged.unsupported(64, torch.float64, CPU) == "no native code for torch.float64"
    assert paged.unsupported(40, torch.float32, CPU) == "the native code takes heads in multiples of 16, got 40"
    assert paged.unsupported(64, torch.float32, torch.device("meta")) == "native code is for the CPU, got meta"
