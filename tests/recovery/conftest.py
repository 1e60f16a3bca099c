"""A small language model that has learned something, on real text, to be broken and repaired: seconds to train."""

import copy
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as fn

from equipoise.layer import reduce_and_update
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.routing import QuantileBalance, SwitchLoss, TopK

B, S, E, K = 16, 48, 8, 2
LAYER = "layers.1.mlp"


def text(name):
    """A file of Python's standard library as bytes, one token each."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return torch.tensor(list((folder / name).read_bytes()), dtype=torch.int64)


@dataclass
class Bench:
    """A model of its own for one test, with text to run it on. held_out_loss: what a canary measures."""

    model: Decoder

    def batch(self, seed, file="ast.py"):
        """int64 (B, S + 1), windows drawn from the text."""
        tokens = text(file)
        starts = torch.randint(0, len(tokens) - S - 1, (B,), generator=torch.Generator().manual_seed(seed))
        return torch.stack([tokens[start : start + S + 1] for start in starts])

    def loss(self, batch):
        logits = self.model(batch[:, :-1])
        return fn.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def held_out_loss(self):
        training = self.model.training
        self.model.eval()
        try:
            return sum(float(self.loss(self.batch(seed, "argparse.py"))) for seed in (0, 1)) / 2
        finally:
            self.model.train(training)

    @torch.no_grad()
    def serve(self, seed):
        """A forward on fresh traffic in eval; the logits."""
        self.model.eval()
        return self.model(self.batch(seed)[:, :-1])

    def train(self, optimizer, steps, start=0):
        self.model.train()
        for step in range(start, start + steps):
            optimizer.zero_grad()
            self.loss(self.batch(1000 + step)).backward()
            optimizer.step()
            reduce_and_update(self.model.moe_layers.values())


def new_model(balance):
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=E, hidden_dim=24, router=TopK(k=K), balance=balance)
    sizes = {"vocab_size": 256, "dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "max_seq_len": S}
    return Decoder(DecoderConfig(**sizes, moe=moe))


@pytest.fixture(scope="session")
def trained():
    """150 steps of training, for models with and without a balancer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    models = {}
    for name, balance in (("loss", ()), ("balancer", (QuantileBalance(on_demand=True),))):
        bench = Bench(new_model((SwitchLoss(coef=0.05), *balance)))
        bench.train(torch.optim.AdamW(bench.model.parameters(), lr=3e-3), 150)
        models[name] = bench.model
    torch.set_num_threads(threads)
    return models


@pytest.fixture
def bench(trained):
    """With a Switch loss alone."""
    return Bench(copy.deepcopy(trained["loss"]))


@pytest.fixture
def bench_with_balancer(trained):
    """With a quantile balancer that waits."""
    return Bench(copy.deepcopy(trained["balancer"]))
