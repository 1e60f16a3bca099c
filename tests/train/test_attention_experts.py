"""The recipes with attention experts train, are watched, and write text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from equipoise.layer import reduce_and_update
from equipoise.models.decoder import Decoder
from equipoise.models.generate import generate
from equipoise.monitor.watch import Watch
from equipoise.train.data import Batch
from equipoise.train.recipes import recipe
from equipoise.train.step import gradients

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60


@pytest.mark.parametrize("name", ["tiny_moa", "tiny_switch_head", "tiny_moh"])
def test_thirty_steps_of_the_recipe(name):
    torch.manual_seed(0)
    config = recipe(name)
    model = Decoder(replace(config.model, dim=32, moe=None, num_layers=1))
    data = torch.tensor(list(TEXT.encode()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr)
    watch = Watch(model, every=30)
    losses = []
    for step in range(1, 31):
        starts = torch.randint(0, len(data) - 33, (8,))
        rows = torch.stack([data[start : start + 33] for start in starts.tolist()])
        batch = Batch(rows[:, :-1], rows[:, 1:], torch.zeros(8, dtype=torch.int64))
        losses.append(gradients(model, [batch], step, False, watch.recorder))
        optimizer.step()
        optimizer.zero_grad()
        reduce_and_update(model.routed_layers.values(), step=step)
        watch.step(step)
    assert losses[-1] < 0.7 * losses[0]
    stats = {each.layer: each for each in watch.stats()}
    assert set(stats) == set(model.routed_layers)
    for layer, each in stats.items():
        assert each.num_tokens == 30 * 8 * 32
        assert each.counts_E.sum() == each.num_tokens * model.routed_layers[layer].k
        assert set(each.losses) == set(model.routed_layers[layer].loss_names)
    prompt = data[None, :8]
    assert generate(model, prompt, 12, temperature=0).shape == (1, 20)
