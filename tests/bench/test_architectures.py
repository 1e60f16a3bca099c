"""The comparison of architectures: equal arithmetic is counted, verdicts are the intervals', what is done is kept."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from equipoise.bench.architectures.arms import ARMS, BASELINE
from equipoise.bench.architectures.compare import Comparison, base_run, verdict
from equipoise.bench.architectures.count import fitted, flops_per_token
from equipoise.bench.architectures.quality import outcome
from equipoise.commands.architectures import architectures
from equipoise.models.config import DecoderConfig
from equipoise.models.decoder import Decoder
from equipoise.models.parameters import parameter_counts
from equipoise.train.recipes import recipe
from equipoise.train.run import open_data

BASE = base_run(1).model


def test_flops_by_hand():
    """Per token: 2 per weight of each product, and 2 * 2 * S * dim for scores and their sums, S all 64 keys."""
    config = DecoderConfig(vocab_size=50, dim=16, num_layers=1, num_heads=2, hidden_dim=24, max_seq_len=64)
    weights = 4 * 16 * 16 + 3 * 16 * 24 + 16 * 50
    assert flops_per_token(config) == 2 * weights + 4 * 64 * 16


def of_experts(x_TD, weights_R, up_eHD, down_eDF, token_ids_R, rows_TK, counts_e, *_, **__):
    return 2 * int(counts_e.sum()) * (up_eHD[0].numel() + down_eDF[0].numel())


of_experts._get_raw = True  # tensors, not their shapes


def of_bag(weight, ids, offsets, by_freq=False, mode=0, sparse=False, weights=None, *rest, **options):
    return 0 if weights is None else 2 * ids[0] * weight[1]


def counted(config, seq_len=64):
    """By torch, as the model runs."""
    if config.moe is not None:
        config = replace(config, moe=replace(config.moe, backend="lean"))
    torch.manual_seed(0)
    model = Decoder(config).eval()
    bags = {torch.ops.aten._embedding_bag: of_bag, torch.ops.aten._embedding_bag_forward_only: of_bag}
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.equipoise.lean_forward: of_experts, **bags})
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.randint(config.vocab_size, (4, seq_len)))
    return counter.get_total_flops() / (4 * seq_len)


@pytest.mark.parametrize("name", ARMS)
def test_flops_are_what_torch_counts(name):
    """Zero-computation experts: what the balancing loss asks for, and what a random router does comes near."""
    config = ARMS[name].of(BASE)
    rel = 0.15 if config.moe and config.moe.zero_experts else 1e-9
    assert counted(config) == pytest.approx(flops_per_token(config), rel=rel)


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.is_fitted])
def test_arms_have_the_baselines_arithmetic(name):
    """To half a step of the width."""
    assert flops_per_token(ARMS[name].of(BASE)) == pytest.approx(flops_per_token(ARMS[BASELINE].of(BASE)), rel=0.03)


def test_the_larger_dense_one_has_all_the_parameters():
    dense, sparse = (parameter_counts(ARMS[name].of(BASE)).total for name in ("dense, equal parameters", BASELINE))
    assert dense == pytest.approx(sparse, rel=0.01)


def test_a_width_that_can_not_be_is_refused():
    with pytest.raises(ValueError, match="width: expected one that makes 1000 FLOPs per token, but everything else"):
        fitted(lambda width: ARMS["dense, equal FLOPs"].build(BASE, width), 1000.0, 64)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(-0.2, -0.1, "better"), (-0.01, 0.019, "not worse"), (0.001, 0.03, "worse"), (-0.1, 0.1, "open")],
)
def test_verdict(low, high, said):
    assert verdict(low, high) == said


def test_what_is_trained_is_kept(tmp_path):
    config = replace(recipe("tiny"), steps=4, batch_size=4, eval_batches=1, watch_every=2, eval_every=0)
    data = open_data(config)[1]
    seeds = []

    def text(seed):
        seeds.append(seed)
        return data

    first = outcome(config, text, tmp_path)
    assert outcome(config, text, tmp_path) == first
    assert seeds == [0]
    assert first.max_violation > 0
    assert outcome(replace(config, seed=1), text, tmp_path) != first
    dense = replace(config, model=replace(config.model, moe=None))
    assert outcome(dense, text, tmp_path).max_violation is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"only": ("nothing",)}, "expected --only to name some of MoE top-2"),
        ({"seeds": 0}, "expected --seeds of at least 1, got 0"),
    ],
)
def test_bad_options(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        architectures(**options, out=tmp_path)


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"expected some of MoE top-2, .* got 'mlp'"):
        Comparison(names=("mlp",))


def test_the_command(tmp_path, capsys):
    assert architectures(only=("equal FLOPs",), quick=True, out=tmp_path, json_=True) == 0
    printed, lines = capsys.readouterr()
    assert lines.splitlines()[-1].startswith("8 of 8  prompts of 64 (")
    told = json.loads(printed)
    assert told["tables"] == json.loads((tmp_path / "architectures.json").read_text())["tables"]
    names = [row["architecture"] for row in told["tables"][0]["rows"]]
    assert names == [BASELINE, "dense, equal FLOPs"]
    assert len(list((tmp_path / "cells").iterdir())) == 2
    assert (tmp_path / "architectures.png").read_bytes().startswith(b"\x89PNG")


def test_a_dense_model_is_trained_by_the_same_loop(tmp_path):
    """Nothing is routed, so nothing is watched or repaired."""
    from equipoise.train.loop import Trainer
    from equipoise.train.report import Silent

    config = replace(recipe("tiny"), steps=6, batch_size=4, eval_every=0, checkpoint_every=3, recover=True)
    config = replace(config, model=replace(config.model, moe=None))
    data = open_data(config)[1]
    trainer = Trainer(config.with_vocab(data.tokenizer.vocab_size), data, tmp_path / "run", Silent())
    trainer.run()
    assert trainer.store.layers() == []
    trainer.close("finished")
    assert isinstance(trainer.model, Decoder)
