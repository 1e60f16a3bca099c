"""Outputs that are not finite: the repairs that are tried before the loop can go on."""

import torch
from tests.bits import bits
from tests.recovery.served import LAYER, Server

from equipoise.monitor.incidents import PAGE
from equipoise.recovery.actions import Training
from equipoise.recovery.policy import OneRung
from equipoise.types import Finding


def test_an_expert_that_is_not_finite_is_shut_while_serving(bench, tmp_path):
    server = Server(bench, tmp_path)
    with torch.no_grad():
        bench.model.moe_layers[LAYER].experts.down_proj[3, 0, 0] = torch.nan
    assert not torch.isfinite(bench.serve(1)).all()
    finding = Finding("not_finite", LAYER, 3, "critical", float("nan"), 0.0, "expert 3 is not finite", "shut it")
    done = server.recovery.rescue(1, finding)
    assert [(action.kind, action.state) for action in done] == [("shut_expert", "applied"), ("shut_expert", "kept")]
    assert torch.isfinite(bench.serve(1)).all()
    assert server.notes.alerts == [(f"{LAYER}:not_finite", "firing"), (f"{LAYER}:not_finite", "resolved")]
    assert done[0].detail["loss_after"] < server.healthy.loss + 0.5


def test_an_expert_that_is_not_finite_is_reseeded_in_training(bench, tmp_path):
    optimizer = torch.optim.AdamW(bench.model.parameters(), lr=1e-3)
    bench.train(optimizer, 2)
    server = Server(bench, tmp_path, training=Training(optimizer, lambda scale: None, lambda: 1.0))
    up = bench.model.moe_layers[LAYER].experts.up
    with torch.no_grad():
        up[3, 0, 0] = torch.nan
    finding = Finding("not_finite", LAYER, 3, "critical", float("nan"), 0.0, "expert 3 is not finite", "copy another")
    done = server.recovery.rescue(2, finding)
    assert [(action.kind, action.state) for action in done] == [("reseed", "applied"), ("reseed", "kept")]
    assert torch.isfinite(up).all()
    assert optimizer.state[up]["exp_avg"][3].abs().sum() == 0
    assert optimizer.state[up]["exp_avg"][2].abs().sum() > 0
    bench.train(optimizer, 3, start=2)
    assert torch.isfinite(up).all()


def test_a_rescue_that_fails_changes_nothing_and_pages(bench, tmp_path):
    server = Server(bench, tmp_path, policy=OneRung("boost"))
    with torch.no_grad():
        bench.model.embed_tokens.weight[32] = torch.nan
    before = bits(bench.model)
    finding = Finding("not_finite", LAYER, None, "critical", float("nan"), 0.0, "not finite", "stop")
    done = server.recovery.rescue(1, finding)
    assert [(action.kind, action.state) for action in done] == [
        ("boost", "applied"),
        ("boost", "undone"),
        (PAGE, "applied"),
    ]
    after = bits(bench.model)
    assert all(torch.equal(after[name].nan_to_num(7.0), value.nan_to_num(7.0)) for name, value in before.items())
