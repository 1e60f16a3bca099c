"""`equipoise.recover` in loops of one's own, on models of transformers: what can be repaired there."""

import pytest
import torch
import torch.nn.functional as fn
from tests.monitor.transformers_models import VOCAB, batch, build

import equipoise as eq
from equipoise.disk.checkpoint import save_checkpoint
from equipoise.faults import Collapse, inject
from equipoise.monitor.store import RunStore
from equipoise.recovery.known_good import RefusedError
from equipoise.types import Action

LAYER = "model.layers.1.mlp"


class Client:
    """A transformers model that is served under watch."""

    def __init__(self, family, folder, **options):
        self.model = build(family, top_k=2)
        self.eye = eq.watch(self.model, every=1, sinks=options.pop("sinks", ()))
        self.keeper = eq.recover(self.model, self.eye, self.held_out_loss, run_folder=folder, **options)

    @torch.no_grad()
    def held_out_loss(self):
        tokens, _ = batch(B=16, S=40)
        logits = self.model(tokens).logits
        return float(fn.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))

    @torch.no_grad()
    def serve(self, step):
        tokens = torch.randint(3, VOCAB, (16, 40), generator=torch.Generator().manual_seed(step))
        self.model(tokens)
        return self.keeper.step(step)

    def story(self, steps):
        changes = [change for step in steps for change in self.serve(step)]
        return [(change.kind, change.state) for change in changes if isinstance(change, Action)]


@pytest.mark.parametrize("family", ["Qwen3Moe", "Olmoe", "DeepseekV3"])
def test_a_collapsed_router_of_transformers_goes_back_to_the_record(family, tmp_path):
    """A bias, a capacity and a stand-in need equipoise's layer, and say so; the known-good router does not."""
    client = Client(family, tmp_path, act=True)
    if client.story(range(1, 4)):
        pytest.fail("a healthy model was repaired")
    before = {name: tensor.clone() for name, tensor in client.model.state_dict().items()}
    with client.eye.recorder.paused():
        client.keeper.remember(step=3)
        inject(client.model, Collapse(LAYER, 5, 40.0), client.held_out_loss)
    story = client.story(range(4, 12))
    assert story == [
        ("quantile_bias", "failed"),
        ("next_choice", "failed"),
        ("spill", "failed"),
        ("router_rollback", "applied"),
        ("router_rollback", "kept"),
    ]
    after = client.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    client.eye.detach()


def test_a_whole_checkpoint_is_gone_back_to_by_name(tmp_path):
    client = Client("Olmoe", tmp_path, act=True, policy=eq.RoundRobinThenReload())
    state = client.model.state_dict()
    path = save_checkpoint(tmp_path / "checkpoints", 3, {"model": dict(state)}, {})
    with client.eye.recorder.paused():
        client.keeper.remember(step=3, checkpoint=path.name)
    before = {name: tensor.clone() for name, tensor in state.items()}
    with client.eye.recorder.paused():
        inject(client.model, Collapse(LAYER, 5, 40.0), client.held_out_loss)
    story = client.story(range(4, 12))
    assert story == [("round_robin", "failed"), ("full_rollback", "applied"), ("full_rollback", "kept")]
    after = client.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    client.eye.detach()


def test_the_store_of_the_recovery_has_the_repairs(tmp_path):
    with RunStore(tmp_path) as store:
        client = Client("Olmoe", tmp_path, act=False, sinks=[store])
        client.keeper = eq.recover(client.model, client.eye, client.held_out_loss, run_folder=tmp_path, sinks=[store])
        with client.eye.recorder.paused():
            inject(client.model, Collapse(LAYER, 5, 40.0), client.held_out_loss)
        assert client.story(range(1, 6)) == [("quantile_bias", "proposed")]
        assert [(action.kind, action.state) for action in store.actions()] == [("quantile_bias", "proposed")]
        client.eye.detach()


def test_a_moment_that_is_not_healthy_is_not_remembered(tmp_path):
    client = Client("Olmoe", tmp_path)
    with client.eye.recorder.paused():
        inject(client.model, Collapse(LAYER, 5, 40.0), client.held_out_loss)
        with pytest.raises(RefusedError, match=r"collapse in model\.layers\.1\.mlp"):
            client.keeper.remember(step=1)
    client.eye.detach()


def test_remembering_needs_a_folder():
    client = Client("Olmoe", None)
    with pytest.raises(ValueError, match=r"remember: there is no registry; pass run_folder= to recover"):
        client.keeper.remember(step=1)
    client.eye.detach()
