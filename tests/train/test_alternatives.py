"""The recipes with other layers: 30 steps under watch. The loss falls, every layer is seen, and text is generated."""

import math
from dataclasses import replace

import pytest
import torch

from equipoise.layer.zero_experts import computing_per_token
from equipoise.monitor.key_usage import key_usage
from equipoise.monitor.store import RunStore
from equipoise.train.config import DataConfig
from equipoise.train.recipes import recipe
from equipoise.train.report import Silent
from equipoise.train.run import train


@pytest.fixture(scope="module")
def trained(corpus_file, tmp_path_factory):
    """(config, run folder, result) of 30 steps of a recipe; each recipe runs once."""
    done = {}

    def of(name):
        if name not in done:
            out = tmp_path_factory.mktemp(name)
            data = DataConfig(corpus=str(corpus_file), vocab_size=512, seq_len=64, cache_dir=corpus_file.parent)
            config = replace(recipe(name), steps=30, data=data, eval_every=0, eval_batches=2, checkpoint_every=0)
            done[name] = config, out, train(config, out, Silent())
        return done[name]

    return of


ALL = pytest.mark.parametrize("name", ["tiny_peer", "tiny_mamba", "tiny_zero_experts"])


@ALL
def test_the_loss_falls_and_text_is_generated(trained, name):
    _, out, result = trained(name)
    with RunStore.open_readonly(out) as store:
        losses = [row[1] for row in store.scalar_history("loss")]
    assert losses[0] == pytest.approx(math.log(512), abs=0.3)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.6
    assert result.step == 30
    assert len(result.sample) > len("In the beginning")


@ALL
def test_every_layer_is_seen_and_its_counts_are_exact(trained, name):
    config, out, _ = trained(name)
    model = config.model
    with RunStore.open_readonly(out) as store:
        assert store.layers() == ["layers.0.mlp", "layers.1.mlp"]
        windows = [store.routing_history(layer) for layer in store.layers()]
    for history in windows:
        assert sum(stats.num_tokens for stats in history) == 30 * 16 * 64 * (model.peer.heads if model.peer else 1)
        for stats in history:
            k = model.peer.k if model.peer else model.moe.router.k
            assert stats.num_assignments == k * stats.num_tokens
            assert 0 < stats.token_entropy <= 1
    last = windows[0][-1]
    if model.peer:
        usage = key_usage(last)
        assert 0.3 < usage.used <= 1
        assert 0 < usage.unevenness < math.log(1024)
    if model.moe and model.moe.zero_experts:
        assert last.num_experts == 12
        assert 0 < computing_per_token(torch.from_numpy(last.counts_E), 8, last.num_tokens) < 2
