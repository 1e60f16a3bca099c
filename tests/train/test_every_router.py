"""Every router in a decoder, under watch: it learns, every token is counted, and a copy of its state goes on alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from equipoise.layer import reduce_and_update
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.monitor.recorder import Recorder
from equipoise.routing import ROUTERS, Hash, SparsityCoef, SparsityLoss, SwitchLoss, TopK
from equipoise.train.data import Batch
from equipoise.train.hash_tables import fit_hash_tables
from equipoise.train.step import gradients, split
from equipoise.train.tokens import TokenStream

B, S, V, STEPS = 8, 16, 61, 30


def config_of(router) -> DecoderConfig:
    if hasattr(router, "allow_future"):
        router = replace(router, allow_future=True)
    needs = router.traits.needs_loss
    balance = (SparsityLoss(SparsityCoef(1e-3)),) if needs else (SwitchLoss(0.01),)
    moe = MoEConfig(num_experts=6, hidden_dim=32, router=router, balance=balance)
    sizes = {"vocab_size": V, "dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "max_seq_len": S}
    return DecoderConfig(**sizes, moe=moe)


def make_batch() -> Batch:
    tokens = torch.randint(0, V, (B, S + 1), generator=torch.Generator().manual_seed(2))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros(B, S, dtype=torch.int64))


def train(model: Decoder, steps: range, recorder: Recorder) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in steps:
        torch.manual_seed(step)  # noise is drawn alike in a copy
        losses.append(gradients(model, split(make_batch(), 2), step, False, recorder))
        optimizer.step()
        optimizer.zero_grad()
        reduce_and_update(model.moe_layers.values(), step=step)
    return losses


@pytest.mark.parametrize("router", [cls() for cls in ROUTERS], ids=lambda router: type(router).__name__)
def test_learns_and_goes_on(router):
    torch.manual_seed(0)
    config = DecoderConfig.from_json(config_of(router).to_json())
    model = Decoder(config)
    recorder = Recorder(model)
    losses = train(model, range(STEPS), recorder)
    assert losses[-1] < 0.5 * losses[0]
    for stats in recorder.flush(STEPS):
        assert stats.num_tokens == STEPS * B * S
        if router.traits.fixed_k:
            assert stats.counts_E.sum() == STEPS * B * S * router.k
        assert 0 <= stats.load_entropy <= 1 + 1e-9

    twin = Decoder(config)
    twin.load_state_dict(model.state_dict())
    more = range(STEPS, STEPS + 2)
    assert train(twin, more, Recorder(twin)) == train(model, more, recorder)


def test_balanced_hash_tables_follow_the_text():
    moe = MoEConfig(num_experts=4, hidden_dim=8, router=Hash(vocab_size=V, table="balanced"))
    config = replace(config_of(TopK()), moe=moe)
    model = Decoder(config)
    batch = make_batch()
    with pytest.raises(ValueError, match=r'Hash\.table: "balanced" needs the frequencies'):
        model(batch.tokens_BS)
    tokens_N = batch.tokens_BS.flatten().numpy().astype(np.uint16)
    num_bytes_D = np.array([len(tokens_N)])
    stream = TokenStream(tokens_N, np.array([len(tokens_N)]), np.zeros(1, dtype=np.int64), ("text",), num_bytes_D, "")
    fit_hash_tables(model, stream)
    recorder = Recorder(model)
    model(batch.tokens_BS)
    for stats in recorder.flush(1):
        assert stats.max_violation < 0.1  # few tokens per id, so the greedy deal is nearly even
    twin = Decoder(config)
    twin.load_state_dict(model.state_dict())  # a saved table needs no text
    assert torch.equal(twin.eval()(batch.tokens_BS), model.eval()(batch.tokens_BS))
