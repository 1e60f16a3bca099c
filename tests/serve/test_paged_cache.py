"""Pieces of many sequences in one row of tokens see exactly their own past, wherever its blocks lie."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.serve.small import tiny_model

from equipoise.ops.native.paged import unsupported
from equipoise.serve import paged_cache
from equipoise.serve.paged_cache import PagedKV, Ragged, Span

MODEL = tiny_model()
WIDE = tiny_model(dim=64, window=5, window_layers=(0,)).float()  # heads of 16, as native code takes them


@st.composite
def plans(draw):
    """(block size, (blocks, cuts) of each sequence): scattered blocks, each sequence computed in pieces."""
    size = draw(st.sampled_from([1, 3, 8]))
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    numbers = draw(st.permutations(range(1, 1 + sum(-(-length // size) for length in lengths))))  # 0 is nobody's
    plan = []
    for length in lengths:
        count = -(-length // size)
        blocks, numbers = numbers[:count], numbers[count:]
        cuts = sorted(draw(st.sets(st.integers(1, length), max_size=4)) | {length})
        plan.append((blocks, cuts))
    return size, plan


@given(plans(), st.booleans(), st.sampled_from([1, 4, 1000]))
def test_each_sequence_as_if_alone(drawn, dirty, most_blocks):
    """However many blocks are copied together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_cache, "_most_blocks", lambda kv: most_blocks)
        compare(*drawn, dirty)


@given(plans(), st.booleans())
def test_each_sequence_as_if_alone_where_its_keys_lie(drawn, dirty):
    """The same in native code, which reads keys and values where they are."""
    if reason := unsupported(16, torch.float32, torch.device("cpu")):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_cache, "_copied", lambda *args: pytest.fail("blocks were copied"))
        compare(*drawn, dirty, WIDE, rtol=1e-3, atol=1e-3)


def compare(size, plan, dirty, model=MODEL, **tolerance):
    kv = PagedKV(model.config, 1 + sum(len(blocks) for blocks, _ in plan), size, model.embed_tokens.weight.dtype)
    if dirty:  # whoever had the blocks has left what is not a number
        kv.keys_LSHD.fill_(torch.nan)
        kv.values_LSHD.fill_(torch.nan)
    tokens = [[(37 * n + 11 * at) % 257 for at in range(cuts[-1])] for n, (_, cuts) in enumerate(plan)]
    done, got = [0] * len(plan), [[] for _ in plan]
    with torch.inference_mode():
        while any(done[n] < cuts[-1] for n, (_, cuts) in enumerate(plan)):
            going = [n for n, (_, cuts) in enumerate(plan) if done[n] < cuts[-1]]
            ends = [next(cut for cut in plan[n][1] if cut > done[n]) for n in going]
            spans = [Span(plan[n][0], done[n], end - done[n]) for n, end in zip(going, ends, strict=True)]
            row = [token for n, end in zip(going, ends, strict=True) for token in tokens[n][done[n] : end]]
            logits = model(torch.tensor([row]), cache=Ragged(kv, spans))[0]
            for n, end, part in zip(going, ends, logits.split([span.num_tokens for span in spans]), strict=True):
                got[n].append(part)
                done[n] = end
        for n, parts in enumerate(got):
            torch.testing.assert_close(torch.cat(parts), model(torch.tensor([tokens[n]]))[0], **tolerance)


def test_where_a_shorter_one_ends_nothing_of_others_is_read():
    """Two answers of 2 and 3 blocks go on together; whose block 0 is has left what is not a number."""
    kv = PagedKV(MODEL.config, 6, 4, torch.float64)
    kv.keys_LSHD[:, :4] = kv.values_LSHD[:, :4] = torch.nan
    tokens = [list(range(8)), list(range(20, 32))]
    with torch.inference_mode():
        for starts, counts in (((0, 0), (7, 11)), ((7, 11), (1, 1))):
            spans = [Span(blocks, *part) for blocks, *part in zip(([2, 1], [3, 5, 4]), starts, counts, strict=True)]
            row = [token for n, span in enumerate(spans) for token in tokens[n][span.start : span.end]]
            logits = MODEL(torch.tensor([row]), cache=Ragged(kv, spans))[0]
        for n in range(2):
            torch.testing.assert_close(logits[n], MODEL(torch.tensor([tokens[n]]))[0, -1])


def test_other_tokens_than_those_of_the_spans():
    cache = Ragged(PagedKV(MODEL.config, 2, 4), [Span([0], 0, 3)])
    with pytest.raises(ValueError, match="Ragged: expected the 3 tokens of its spans without padding, got 2"):
        cache.place(2, None, torch.device("cpu"))


def test_memory_of_a_block():
    kv = PagedKV(MODEL.config, 3, 4, torch.float64)
    expected = kv.keys_LSHD.nbytes + kv.values_LSHD.nbytes
    assert 3 * PagedKV.bytes_per_block(MODEL.config, 4, torch.float64) == expected
