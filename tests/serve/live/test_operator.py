"""Reloads are verified, judged, whole or not at all, and can be undone; faults go in and out; all of it is recorded."""

import pytest
import torch

from equipoise.disk.checkpoint import load_checkpoint, save_checkpoint
from equipoise.layer.mode import NORMAL, Mode
from equipoise.models.device import pick_device
from equipoise.serve.request import Request
from equipoise.serve.weights import ReloadRefusedError

OLD, NEW = "step-000040", "step-000080"


def weights(served):
    return {name: tensor.clone() for name, tensor in served.loaded.model.state_dict().items()}


def same(served, before):
    return all(tensor.equal(before[name]) for name, tensor in served.loaded.model.state_dict().items())


def test_another_checkpoint_and_back(serve, run):
    served = serve()
    before = weights(served)
    assert served.operator.weights.names() == [OLD, NEW]
    version = served.operator.reload(OLD, most_worse=10.0)
    assert (version.number, version.source) == (2, OLD)
    stored = load_checkpoint(run / "checkpoints" / OLD).tensors["model"]
    assert all(tensor.equal(stored[name]) for name, tensor in served.loaded.model.state_dict().items())
    assert served.forgotten
    version = served.operator.undo_reload()
    assert (version.number, version.source) == (3, NEW)
    assert same(served, before)
    assert [(action.kind, action.state, action.reason) for action in served.heard.actions] == [
        ("reload", "kept", "operator"),
        ("reload", "kept", "operator"),
    ]
    with pytest.raises(ReloadRefusedError, match="no reload that could be undone"):
        served.operator.undo_reload()


def test_worse_weights_are_put_back(serve):
    served = serve()
    before = weights(served)
    with pytest.raises(ReloadRefusedError, match=r"held-out loss rose from .* nats, more than 0\.01.*in service again"):
        served.operator.reload(OLD, most_worse=0.01)
    assert same(served, before)
    assert served.operator.weights.version.number == 1
    assert served.heard.actions[-1].state == "failed"


def test_weights_that_are_not_numbers_are_put_back(serve, run):
    tensors = {name: t.clone() for name, t in load_checkpoint(run / "checkpoints" / NEW).tensors["model"].items()}
    tensors["norm.weight"][0] = 1e38  # finite, and its outputs are not
    tensors["norm.weight"][1] = -1e38
    tensors["embed_tokens.weight"] *= 1e3
    save_checkpoint(run / "checkpoints", 90, {"model": tensors}, {})
    served = serve(path=run / "checkpoints" / NEW)
    before = weights(served)
    with pytest.raises(ReloadRefusedError, match=r"not finite|rose from"):
        served.operator.reload("step-000090")
    assert same(served, before)


def test_damaged_missing_and_foreign_checkpoints_change_nothing(serve, run):
    served = serve()
    before = weights(served)
    path = run / "checkpoints" / OLD / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    other = {name: tensor[:1].clone() for name, tensor in before.items() if tensor.dim()}
    save_checkpoint(run / "checkpoints", 99, {"model": other}, {})
    for name, told in (
        (OLD, r"model\.safetensors is corrupt"),
        ("step-000099", r"has shape|is missing"),
        ("../../etc", r"expected one of step-000040, step-000080, step-000099, got '../../etc'"),
    ):
        with pytest.raises(ReloadRefusedError, match=told):
            served.operator.reload(name)
        assert same(served, before)


def test_requests_under_way_are_computed_anew_with_the_new_weights(serve):
    served = serve()
    prompt = tuple(served.loaded.tokenizer.encode("In the beginning").tolist())
    served.engine.add(Request("a", prompt, 20))
    for _ in range(5):
        served.engine.step()
    served.operator.reload(OLD, most_worse=10.0)
    [sequence] = served.engine.scheduler.waiting
    assert sequence.num_computed == 0
    assert sequence.num_made >= 4
    made = list(sequence.tokens)
    served.engine.step()
    with torch.inference_mode():
        logits = served.loaded.model(torch.tensor([made], device=pick_device("auto")))[0, -1]
    assert torch.isfinite(logits).all()
    assert sequence.num_computed == len(made)


class TestRouter:
    def test_one_layer_goes_back_to_the_record(self, serve):
        served = serve()
        before = weights(served)
        with torch.no_grad():
            for layer in served.care.layers.values():
                layer.router.weight += 1.0
        [action] = served.operator.rollback_router("layers.1.mlp")
        now = served.loaded.model.state_dict()
        assert now["layers.1.mlp.router.weight"].equal(before["layers.1.mlp.router.weight"])
        assert not now["layers.0.mlp.router.weight"].equal(before["layers.0.mlp.router.weight"])
        assert (action.kind, action.reason, action.state) == ("router_rollback", "operator", "kept")
        assert len(served.operator.rollback_router()) == 2
        assert same(served, before)

    def test_no_such_layer(self, serve):
        with pytest.raises(ValueError, match="got 'x'"):
            serve().operator.rollback_router("x")


def test_repairs_in_force_are_lifted(serve):
    served = serve()
    for layer in served.care.layers.values():
        layer.set_mode(Mode(round_robin=True))
    [action] = served.operator.lift("layers.1.mlp")
    assert (action.kind, action.layer, action.state) == ("lift", "layers.1.mlp", "kept")
    assert [layer.mode == NORMAL for layer in served.care.layers.values()] == [False, True]
    assert len(served.operator.lift()) == 1
    assert served.care.reasons() == ()
    assert served.forgotten
    with pytest.raises(ValueError, match="got 'x'"):
        served.operator.lift("x")


class TestFaults:
    def test_in_and_out(self, serve):
        served = serve()
        before = weights(served)
        record = {"fault": "collapse", "layer": "layers.1.mlp", "expert": 2, "intensity": 30.0}
        assert "layers.1.mlp" in served.operator.put_in(record)
        assert not same(served, before)
        assert len(served.operator.state()["faults"]) == 1
        served.operator.take_out()
        assert all(t.allclose(before[name], atol=1e-5) for name, t in served.loaded.model.state_dict().items())
        assert served.operator.state()["faults"] == []

    def test_refused(self, serve):
        served = serve()
        with pytest.raises(ValueError, match="fault"):
            served.operator.put_in({"fault": "no such thing"})
        with pytest.raises(ValueError, match=r"expected one of the model.*equipoise inject"):
            served.operator.put_in({"fault": "skewed-input", "domain": 0})


def test_state_is_json(serve):
    import json

    served = serve()
    served.traffic(2)
    served.care.look()
    state = json.loads(json.dumps(served.operator.state()))
    assert state["weights"] == {
        "number": 1,
        "source": NEW,
        "digest": "",
        "loss": None,
        "checkpoints": [OLD, NEW],
    }
    assert state["recovery"]["acts"] is False
    assert set(state["breaker"]) == set(served.care.layers)
    assert all(layer.mode == NORMAL for layer in served.care.layers.values())
