"""Experts in a file: the same bits whatever is in memory, never more memory than allowed, from several threads too."""

import os
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.small.models import EXPERTS, LAYERS, PER_EXPERT, logits, model, said, tokens

from equipoise.disk.row_file import RowFileError
from equipoise.ops.packed import Full, Int8
from equipoise.ops.ragged import ragged_plan
from equipoise.small import expert_bytes, offload_experts, offload_of, quantize_experts
from equipoise.small.expert_file import ExpertFile, made_places

ONE = 4 * PER_EXPERT  # bytes of an expert
ALL = LAYERS * EXPERTS * ONE


@pytest.fixture
def offloaded(tmp_path):
    """Makes a model whose experts are in a file; all are closed in the end."""
    made = []

    def make(memory=ALL // 4, small=None, **options):
        small = small or model()
        made.append(offload_experts(small, tmp_path / f"{len(made)}.safetensors", memory, **options))
        return small, made[-1]

    yield make
    for each in made:
        each.close()


def lean():
    """The model as it is, with the backend whose bits are promised."""
    resident = model()
    for layer in resident.moe_layers.values():
        layer.experts.backend = "lean"
    return resident


@pytest.mark.parametrize("memory", [ONE, ONE + 1, ALL // 4, ALL // 2, ALL], ids=["one", "one+", "1/4", "1/2", "all"])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("prefetch", [True, False], ids=["ahead", "not ahead"])
def test_the_same_bits_and_tokens_in_less_memory(offloaded, memory, policy, prefetch):
    small, offload = offloaded(memory, policy=policy, prefetch=prefetch)
    resident = lean()
    assert torch.equal(logits(small), logits(resident))
    assert said(small) == said(resident) == said(model())
    counts = offload.counts()
    assert counts.most_bytes <= memory
    assert counts.bytes_read == ONE * (counts.misses + counts.prefetched)
    assert expert_bytes(small) == 0
    assert (counts.prefetched > 0) <= prefetch
    if memory == ALL:
        assert counts.evicted == 0
        assert counts.misses + counts.prefetched <= LAYERS * EXPERTS


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_quantised_ones_too(offloaded, bits, group, dtype):
    resident, small = model(dtype=dtype), model(dtype=dtype)
    for each in (resident, small):
        quantize_experts(each, bits, group)
    small, offload = offloaded(expert_bytes(resident) // 4, small)
    assert torch.equal(logits(small), logits(resident))
    assert said(small) == said(resident)
    assert offload.counts().evicted > 0


def test_the_file_is_an_ordinary_one(offloaded):
    small, offload = offloaded()
    named = load_file(offload.file.path)
    assert torch.equal(named["layers.1.mlp.experts.up_weight"], model().moe_layers["layers.1.mlp"].experts.up)
    assert torch.equal(
        small.moe_layers["layers.1.mlp"].experts.weights_of(3)[1], named["layers.1.mlp.experts.down_weight"][3]
    )


def test_too_little_for_one_expert_is_refused_and_writes_nothing(tmp_path):
    small = model()
    with pytest.raises(ValueError, match=rf"expected room for at least one expert, {ONE:,} bytes, got {ONE - 1:,}"):
        offload_experts(small, tmp_path / "e.safetensors", ONE - 1)
    assert list(tmp_path.iterdir()) == []
    assert offload_of(small) is None
    assert torch.equal(logits(small), logits(model()))


def test_twice_is_refused(offloaded):
    small, offload = offloaded()
    assert offload_of(small) is offload
    with pytest.raises(ValueError, match="they are in a file already"):
        offload_experts(small, offload.file.path, ALL)


def test_a_file_cut_short_meanwhile_ends_it_with_its_name(offloaded):
    small, offload = offloaded(ONE)
    logits(small)
    os.truncate(offload.file.path, 1000)
    with pytest.raises(RowFileError, match=r"0\.safetensors: changed while it was in use: .* and has 1,000"):
        logits(small)


def test_a_file_written_to_meanwhile_ends_it_too(offloaded):
    small, offload = offloaded(ONE)
    logits(small)
    os.utime(offload.file.path, ns=(1, 1))
    with pytest.raises(RowFileError, match="it was written to"):
        logits(small)


def test_a_file_replaced_meanwhile_is_read_on(offloaded, tmp_path):
    small, offload = offloaded(ONE)
    before = logits(small)
    save_file({"other": torch.zeros(3)}, tmp_path / "other")
    os.replace(tmp_path / "other", offload.file.path)
    assert torch.equal(logits(small), before)


def test_another_models_file_is_refused(offloaded):
    _, offload = offloaded()
    sizes = {f"layers.{n}.mlp": place.sizes for n, place in enumerate(offload.file.places)}
    with pytest.raises(RowFileError, match=r"expected layers\.0\.mlp\.experts\.up_values .* got none: it is of"):
        ExpertFile(offload.file.path, Int8(), made_places(sizes, Int8()))
    wrong = {name.replace("layers.2", "layers.7"): each for name, each in sizes.items()}
    with pytest.raises(RowFileError, match=r"expected layers\.7\.mlp\.experts\.up_weight"):
        ExpertFile(offload.file.path, Full(), made_places(wrong, Full()))


def test_after_close_it_says_so(offloaded):
    small, offload = offloaded(ONE)
    with offload:
        logits(small)
    with pytest.raises(RowFileError, match="is closed; what it belonged to has ended"):
        logits(small)


@pytest.mark.parametrize("memory", [ONE, ALL // 4], ids=["one", "1/4"])
def test_several_threads_compute_the_same(offloaded, memory):
    small, offload = offloaded(memory)
    expected, wrong = logits(lean()), []

    def compute():
        for _ in range(4):
            if not torch.equal(logits(small), expected):
                wrong.append(1)

    threads = [threading.Thread(target=compute, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert offload.counts().most_bytes <= memory


def test_what_follows_is_read_ahead_once_it_is_known(offloaded):
    """Expert e is followed by e + 1 in the next layer: after a few tokens nothing has to be waited for."""
    _, offload = offloaded(6 * ONE)

    def step(start):
        misses = offload.counts().misses
        for layer in range(LAYERS):
            expert = (start + layer) % EXPERTS
            plan = ragged_plan(torch.zeros(1, dtype=torch.int64), torch.tensor([expert]), torch.ones(1), EXPERTS)
            offload.begin(layer, plan, 1, [expert])
            offload.cache.take((layer, expert))
            offload.cache.give_back((layer, expert))
            following = (layer + 1) % LAYERS, (expert + 1) % EXPERTS
            until = time.monotonic() + 5
            while known and following not in offload.cache.held() and time.monotonic() < until:
                time.sleep(0.001)
        return offload.counts().misses - misses

    known = False
    for start in range(0, 2 * EXPERTS * LAYERS, LAYERS):
        step(start)
    known = True
    step(0)
    assert [step(LAYERS * n) for n in range(1, 6)] == [0] * 5
    counts = offload.counts()
    assert counts.used >= 15
    assert counts.prefetch_precision > 0.7


def test_a_larger_prompt_than_fits_is_computed_piece_by_piece(offloaded):
    """All experts of a layer are busy, one fits."""
    small, offload = offloaded(ONE)
    with torch.inference_mode():
        assert torch.equal(small(tokens(4, 40)), lean()(tokens(4, 40)))
    assert offload.counts().most_bytes == ONE


def test_memory_is_used_again(offloaded, monkeypatch):
    """However many experts come and go, they lie in the same few blocks, where one was read after another."""
    small, offload = offloaded(3 * ONE)
    blocks, read = set(), offload.cache._read

    def noted(key):
        (up,), (down,) = read(key)
        blocks.update((up.data_ptr(), down.data_ptr()))
        return (up,), (down,)

    monkeypatch.setattr(offload.cache, "_read", noted)
    assert torch.equal(logits(small), logits(lean()))
    said(small)
    assert offload.counts().evicted > 30
    assert len(blocks) == 2 * 3


def test_weights_that_were_looked_at_are_nobody_elses(offloaded):
    small, offload = offloaded(ONE)
    experts = small.moe_layers["layers.0.mlp"].experts
    first = experts.weights_of(0)
    kept = [each.clone() for each in first]
    for expert in range(1, EXPERTS):
        experts.weights_of(expert)
    assert all(torch.equal(one, other) for one, other in zip(first, kept, strict=True))
    assert offload.counts().evicted == EXPERTS - 1
