"""A run's model, made small while it is loaded: the same as made small afterwards, and files made once."""

import os

import pytest
import torch
from tests.small.models import EXPERTS, LAYERS, PER_EXPERT, logits, said

from equipoise.disk.checkpoint import CheckpointError
from equipoise.layer import Experts
from equipoise.models.run_files import cast, load
from equipoise.small import SmallConfig, bytes_of, expert_bytes, load_small, quantize_experts
from equipoise.small.experts import Resident, StoredExperts, packing, sizes_of
from equipoise.small.quantise import format_of, put_in

NAMES = {"int8": (8, 64), "int4-32": (4, 32)}
ONE = 4 * PER_EXPERT


@pytest.fixture
def small(run):
    """Loads; offloads are closed in the end."""
    made = []

    def make(config=SmallConfig(), path=run, **options):  # noqa: B008 - frozen
        made.append(load_small(path, config, **options))
        return made[-1]

    yield make
    for each in made:
        if each.offload is not None:
            each.offload.close()


def quantised(model, name, dtype):
    """Of the weights as they were trained, for activations of another type: nothing is rounded twice."""
    new = {}
    for layer_name, layer in model.moe_layers.items():
        sizes, format = sizes_of(layer), format_of(name, dtype)
        source = Resident(sizes, format, packing(format, layer.experts.weights_of))
        new[layer_name] = StoredExperts(sizes, format, source, dtype)
    put_in(model.moe_layers, new)
    cast(model, dtype)
    return model


def test_in_fp32_it_is_what_quantize_experts_does(small, run):
    for name, (bits, group) in NAMES.items():
        twin = load(run).model
        quantize_experts(twin, bits, group)
        assert torch.equal(logits(small(SmallConfig(name)).loaded.model), logits(twin))


@pytest.mark.parametrize("memory", [None, 2 * ONE], ids=["resident", "offloaded"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_as_made_small_afterwards(small, run, name, memory, dtype):
    loaded = small(SmallConfig(name, memory), dtype=dtype).loaded
    twin = quantised(load(run).model, name, dtype or torch.float32)
    assert torch.equal(logits(loaded.model), logits(twin))
    assert said(loaded.model) == said(twin)
    assert expert_bytes(loaded.model) == (expert_bytes(twin) if memory is None else 0)
    assert (loaded.folder, loaded.checkpoint.name) == (run, "step-000002")
    assert loaded.held_out_BS is not None
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_in_full_it_is_the_checkpoint_itself_that_is_read(small, run):
    made = small(SmallConfig(memory=2 * ONE))
    assert made.offload.file.path == run / "checkpoints" / "step-000002" / "model.safetensors"
    twin = load(run).model
    for layer in twin.moe_layers.values():
        layer.experts.backend = "lean"
    assert torch.equal(logits(made.loaded.model), logits(twin))
    assert not (run / "experts").exists()


def test_cast_experts_have_a_file_of_their_own(small, run):
    made = small(SmallConfig(memory=2 * ONE), dtype=torch.bfloat16)
    assert made.offload.file.path == run / "experts" / "step-000002-full-bfloat16.safetensors"
    twin = load(run, dtype=torch.bfloat16).model
    for layer in twin.moe_layers.values():
        layer.experts.backend = "lean"
    assert torch.equal(logits(made.loaded.model), logits(twin))


def test_without_options_it_is_the_model_as_ever(small):
    made = small()
    assert made.offload is None
    assert all(isinstance(layer.experts, Experts) for layer in made.loaded.model.moe_layers.values())


def test_a_file_is_made_once_and_again_for_other_weights(small, run):
    config = SmallConfig("int8", 2 * ONE)
    path = small(config).offload.file.path
    first = path.stat()
    before = logits(small(config).loaded.model)
    assert path.stat() == first
    other = small(config, run / "checkpoints" / "step-000001")
    assert other.offload.file.path != path
    os.replace(other.offload.file.path, path)  # the name of one, the content of another
    assert torch.equal(logits(small(config).loaded.model), before)
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name]
    path.write_bytes(b"half a file")
    assert torch.equal(logits(small(config).loaded.model), before)


def test_a_damaged_checkpoint_is_refused_before_anything_is_made(run):
    path = run / "checkpoints" / "step-000002" / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt.*step-000001"):
        load_small(run / "checkpoints" / "step-000002", SmallConfig("int8", 2 * ONE))
    assert not (run / "experts").exists()


def test_what_can_not_be_is_said_before_anything_is_made(run):
    least = PER_EXPERT + 2 * 128
    with pytest.raises(ValueError, match=rf"at least one expert, {least:,} bytes, got {least - 1:,}"):
        load_small(run, SmallConfig("int8", least - 1))
    with pytest.raises(ValueError, match=r"int4-128: .*take groups of (32|64)"):
        load_small(run, SmallConfig("int4-128", 2 * ONE))
    with pytest.raises(ValueError, match=r"expert_precision: expected one of full, int8, int4, .*, got 'int2'"):
        SmallConfig("int2")
    assert not (run / "experts").exists()


def test_memory_in_words():
    assert [bytes_of(text) for text in ("64M", "1.5g", "2K", "100")] == [64 * 2**20, 3 * 2**29, 2048, 100]
    for text in ("", "M", "64X", "lots", "1e999"):
        with pytest.raises(ValueError, match=r"memory: expected a number of bytes such as 64M or 1\.5G, got"):
            bytes_of(text)


def test_least_memory_is_one_expert(small):
    made = small(SmallConfig(memory=ONE))
    said(made.loaded.model)
    counts = made.offload.counts()
    assert counts.most_bytes == ONE
    assert counts.bytes_read > ONE * LAYERS * EXPERTS / 4


def test_experts_with_biases_are_refused():
    from equipoise.layer import MoE
    from equipoise.small.experts import sizes_of

    with pytest.raises(ValueError, match=r"expected none with biases \(as gpt-oss has\)"):
        sizes_of(MoE(16, 8, 4, expert_bias=True))
