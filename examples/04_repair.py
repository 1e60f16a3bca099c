"""A router collapses while a model is served; the ladder repairs it, and held-out text says whether that helped.

Nothing here is equipoise's training loop: any PyTorch loop with a watch can have this.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as fn

import equipoise as eq
from equipoise.faults import Collapse, inject

torch.manual_seed(0)
VOCABULARY, DIM = 64, 32
layers = nn.ModuleDict(
    {
        "embed": nn.Embedding(VOCABULARY, DIM),
        "moe": eq.MoE(DIM, 48, num_experts=8, router=eq.TopK(k=2), balance=[eq.SwitchLoss(coef=0.05)]),
        "head": nn.Linear(DIM, VOCABULARY),
    }
)


def tokens(seed: int) -> torch.Tensor:
    """A language of one rule: the next token is three times the last one, plus one."""
    first = torch.randint(0, VOCABULARY, (1024,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([first, (3 * first + 1) % VOCABULARY])


def loss_on(batch: torch.Tensor) -> torch.Tensor:
    """Nats per token."""
    x = layers["embed"](batch[0])
    return fn.cross_entropy(layers["head"](x + layers["moe"](x)), batch[1])


def held_out_loss() -> float:
    """By which repairs are judged: the same text each time."""
    with torch.no_grad():
        return float(loss_on(tokens(seed=10_000)))


optimizer = torch.optim.AdamW(layers.parameters(), lr=3e-3)
for step in range(200):
    optimizer.zero_grad()
    loss_on(tokens(step)).backward()
    optimizer.step()
layers.eval()

with eq.watch(layers, every=1) as eye, tempfile.TemporaryDirectory() as folder:
    keeper = eq.recover(layers, eye, held_out_loss, run_folder=Path(folder), act=True)
    record = keeper.remember(step=0)
    print(f"known to be good: held-out loss {record.loss:.3f}, record {record.id[:12]}")

    with eye.recorder.paused():
        inject(layers, Collapse("moe", expert=3, intensity=40.0), held_out_loss)
        broken = held_out_loss()
    repairs = []
    for step in range(1, 9):
        with torch.no_grad():
            loss_on(tokens(20_000 + step))
        for change in keeper.step(step):
            print(f"step {step}: {change.kind if hasattr(change, 'kind') else change.key} {change.state}")
            repairs += [change] if hasattr(change, "kind") else []
    assert [(repair.kind, repair.state) for repair in repairs] == [
        ("quantile_bias", "applied"),
        ("quantile_bias", "kept"),
    ]
    assert eye.alerts == []
    assert held_out_loss() < broken
    print(
        f"held-out loss {broken:.3f} broken, {held_out_loss():.3f} repaired; MaxVio {eye.stats()[0].max_violation:.2f}"
    )
