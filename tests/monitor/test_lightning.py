"""A real fit of Lightning under watch: our layer and a model of transformers. Needs the extra "lightning"."""

import sys

import pytest
import torch
from tests.monitor.transformers_models import Witness, batch, blocks, build
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from equipoise.layer import MoE
from equipoise.monitor.adapters.lightning_callback import lightning_callback
from equipoise.monitor.watch import watch

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of lightning, with torch 2.13
EPOCHS, BATCHES, ACCUMULATED, SIZE, S = 2, 4, 2, 3, 7  # a step is two batches of three sequences


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning.pytorch", reason="needs the extra: pip install 'equipoise[lightning]'")


class Ours(nn.Module):
    """An embedding, one layer with padding, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.moe, self.head = nn.Embedding(64, 16), MoE(16, 8, 8), nn.Linear(16, 64)

    def forward(self, tokens, mask):
        return self.head(self.moe(self.embed(tokens), padding_mask=~mask.bool()))


class Theirs(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = build("Mixtral").train()

    def forward(self, tokens, mask):
        return self.model(tokens, attention_mask=mask).logits


def module_of(lightning, model, fail_at=None):
    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, data, index):
            if index == fail_at:
                raise RuntimeError("out of memory")
            return self.validation_step(data, index)

        def validation_step(self, data, index):
            tokens, mask = data
            return (self.model(tokens, mask) * mask[..., None]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Task()


def data(num_batches):
    tokens, mask = batch(B=SIZE, S=S, pad="left")
    return DataLoader(TensorDataset(tokens.repeat(num_batches, 1), mask.repeat(num_batches, 1)), batch_size=SIZE)


def fit(lightning, folder, task, callback):
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accumulate_grad_batches=ACCUMULATED, val_check_interval=2, callbacks=[callback],
        accelerator="cpu", default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, data(BATCHES), data(2))


def real_tokens():
    return int(batch(B=SIZE, S=S, pad="left")[1].sum())


@pytest.mark.parametrize("build_model", [Ours, Theirs])
def test_a_fit_counts_what_it_trains_on(lightning, tmp_path, build_model):
    """Accumulated batches are one step; the sanity check and validation do not count."""
    windows, model = [], build_model()

    class Notebook:
        def routing(self, window):
            windows.append([(stats.step, stats.num_tokens) for stats in window])

        def alert(self, alert):
            raise AssertionError("an undisturbed model")

    with watch(model, every=1, sinks=[Notebook()]) as eye:
        fit(lightning, tmp_path, module_of(lightning, model), lightning_callback(eye))
        steps = EPOCHS * BATCHES // ACCUMULATED
        num_layers = len(eye.stats())
        assert windows == [[(step, ACCUMULATED * real_tokens())] * num_layers for step in range(1, steps + 1)]
        model(*batch(B=SIZE, S=S, pad="left"))
        eye.flush(99)
        assert windows[-1] == [(99, real_tokens())] * num_layers  # after the fit it counts again


def test_counts_are_those_of_the_training_batches(lightning, tmp_path):
    """The witness counts while gradients are recorded, which is not so in validation."""
    model = Theirs()
    witness = Witness(model)

    def forget(name):
        def validation_only(module, args, output):
            if not torch.is_grad_enabled():
                witness.ids[name].pop()

        return validation_only

    for name, block in blocks(model).items():
        block.experts.register_forward_hook(forget(name))
    with watch(model, every=EPOCHS * BATCHES // ACCUMULATED) as eye:
        fit(lightning, tmp_path, module_of(lightning, model), lightning_callback(eye))
        for stats in eye.stats():
            real = [batch(B=SIZE, S=S, pad="left")[1].flatten().tolist()] * (EPOCHS * BATCHES)
            assert stats.counts_E.tolist() == witness.counts(stats.layer, real)


def test_a_fit_that_fails_leaves_the_watch_counting(lightning, tmp_path):
    model = Ours()
    with watch(model, every=1) as eye:
        with pytest.raises(RuntimeError, match="out of memory"):
            fit(lightning, tmp_path, module_of(lightning, model, fail_at=2), lightning_callback(eye))
        assert {stats.step for stats in eye.stats()} == {1}
        model(*batch(B=SIZE, S=S, pad="left"))
        eye.flush(2)
        assert {stats.num_tokens for stats in eye.stats()} == {real_tokens()}


def test_without_lightning(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with watch(Ours()) as eye, pytest.raises(ModuleNotFoundError, match=r"pip install 'equipoise\[lightning\]'"):
        lightning_callback(eye)
