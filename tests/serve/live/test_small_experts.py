"""Serving with quantised and offloaded experts: the same care, and what can't be done is refused by name."""

import json

import pytest
import torch

from equipoise.commands.serve import ServeOptions, serve
from equipoise.disk.checkpoint import CHECKPOINTS, load_checkpoint
from equipoise.faults import NaNExpert, SlowExpert
from equipoise.faults.catalogue import to_json
from equipoise.models.run_files import load
from equipoise.recovery.weights import reload_weights
from equipoise.serve.care import CareConfig
from equipoise.serve.request import Request, Sampling
from equipoise.serve.server import Server, ServerConfig
from equipoise.serve.weights import ReloadRefusedError
from equipoise.small import SmallConfig, load_small, quantize_experts

OLD, NEW = "step-000040", "step-000080"
LAYER = "layers.1.mlp"
INT8 = SmallConfig("int8")
FILED = SmallConfig("int8", memory=40_000)  # three experts of 16


@pytest.fixture
def server(run, tmp_path):
    """Makes a server without sockets, whose engine is stepped by hand."""
    made = []

    def make(config, **care):
        loaded = load_small(run, config).loaded
        served = ServerConfig("x", tmp_path / f"serving-{len(made)}", cache_gb=0.05, care=CareConfig(**care))
        made.append(Server(loaded, served, {}))
        return made[-1]

    yield make
    for each in made:
        each.care.stop()
        each.engine.close()
        if each.offload is not None:
            each.offload.close()


def answer(server, text="In the beginning", max_tokens=12):
    tokens = server.loaded.tokenizer.encode(text).tolist()
    server.engine.add(Request(text, tuple(tokens), max_tokens, Sampling(temperature=0.0)))
    outputs = []
    while server.engine.has_work:
        outputs += server.engine.step()
    assert outputs[-1].finish == "length"
    return [token for output in outputs for token in output.token_ids]


def state(server):
    return {name: tensor.clone() for name, tensor in server.loaded.model.state_dict().items()}


def test_quantised_ones_are_reloaded_and_put_back(server, run):
    served = server(INT8)
    before, said = state(served), answer(served)
    version = served.operator.reload(OLD, most_worse=10.0)
    assert version.source == OLD
    twin = load(run / CHECKPOINTS / OLD).model
    quantize_experts(twin, 8)
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in state(served).items())
    served.operator.undo_reload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(served).items())
    assert answer(served) == said


def test_a_full_rollback_of_quantised_ones(server, run):
    served = server(INT8)
    undo = reload_weights(served.loaded.model, run / CHECKPOINTS)(OLD)
    router = f"{LAYER}.router.weight"
    assert torch.equal(state(served)[router], load_checkpoint(run / CHECKPOINTS / OLD).tensors["model"][router])
    undo()


def test_offloaded_ones_are_answered_alike_and_refuse_a_reload(server, run):
    served, resident = server(FILED), server(INT8)
    assert answer(served) == answer(resident)
    before = state(served)
    with pytest.raises(
        ReloadRefusedError, match=r"nothing was changed: experts: they are read from .*-int8-bfloat16\."
    ):
        served.operator.reload(OLD, most_worse=10.0)
    with pytest.raises(ValueError, match="start again with the other checkpoint, or with all experts in memory"):
        reload_weights(served.loaded.model, run / CHECKPOINTS)(OLD)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(served).items())
    assert answer(served, "And so") == answer(resident, "And so")


@pytest.mark.parametrize("config", [INT8, FILED], ids=["resident", "offloaded"])
def test_routers_are_rolled_back_and_stand_ins_stand_in(server, config):
    served = server(config)
    assert [action.state for action in served.operator.rollback_router(LAYER)] == ["kept"]
    assert served.operator.lift() == []
    dense = served.care.recovery.patient.dense
    assert set(dense) == set(served.loaded.model.moe_layers)


@pytest.mark.parametrize("config", [INT8, FILED], ids=["resident", "offloaded"])
def test_stand_ins_are_made_of_them(server, run, config):
    """A run without a record of health, as of other programs: distilled from what the experts are."""
    for path in run.glob("known_good*"):
        path.rename(path.with_name(f"away-{path.name}"))
    served = server(config)
    assert set(served.care.recovery.patient.dense) == set(served.loaded.model.moe_layers)


@pytest.mark.parametrize("config", [INT8, FILED], ids=["resident", "offloaded"])
def test_experts_are_timed_one_by_one(server, config):
    served = server(config, breaker_by="expert")
    answer(served)
    served.care.look()
    assert any(group.startswith(f"{LAYER}/") for group in served.care.guard.times())


@pytest.mark.parametrize("config", [INT8, FILED], ids=["resident", "offloaded"])
def test_faults(server, config):
    served = server(config)
    said = answer(served)
    served.operator.put_in(to_json(SlowExpert(LAYER, expert=1, seconds=0.001)))
    assert answer(served, "In the beginning") == said
    assert len(served.operator.take_out()) == 1
    with pytest.raises(ValueError, match="expected experts with stacked weights"):
        served.operator.put_in(to_json(NaNExpert(LAYER, expert=1)))


def test_metrics_tell_of_the_cache(server):
    served = server(FILED)
    answer(served)
    text, counts = served.metrics_text()[0].decode(), served.offload.counts()
    told = {
        line.split()[0]: float(line.split()[1])
        for line in text.splitlines()
        if line.startswith("equipoise_serve_expert")
    }
    assert told["equipoise_serve_expert_cache_misses_total"] == counts.misses > 0
    assert told["equipoise_serve_expert_cache_bytes_held"] == counts.bytes_held <= 40_000
    assert told["equipoise_serve_expert_cache_hits_total"] == counts.hits
    assert served.experts_kept()[0].startswith("experts in int8: at most 0.0 MB in memory, the others in ")
    assert "expert_cache" not in server(INT8).metrics_text()[0].decode()


def test_stopping_closes_the_file(run, tmp_path):
    loaded = load_small(run, FILED).loaded
    served = Server(loaded, ServerConfig("x", tmp_path / "s", cache_gb=0.05), {})
    served.start()
    assert served.stop(5.0)
    with pytest.raises(ValueError, match="is closed"), torch.inference_mode():
        loaded.model(torch.zeros(1, 1, dtype=torch.int64))


def test_options_that_do_not_go_together(run):
    with pytest.raises(ValueError, match="ray: replicas serve experts as they were trained"):
        serve(run, options=ServeOptions(ray=1, expert_precision="int8"))
    with pytest.raises(ValueError, match="expected a number of bytes such as 64M"):
        serve(run, options=ServeOptions(expert_memory="lots"))
    with pytest.raises(ValueError, match=r"expected room for at least one expert, [\d,]+ bytes, got 100"):
        serve(run, options=ServeOptions(expert_memory="100", out=run / "none"))
    assert not (run / "none").exists()
    assert json.loads((run / "config.json").read_text())
