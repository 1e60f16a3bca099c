"""How others' reloads, rollbacks and weight updates failed, each told again here. The references say who it was.

Stories of several processes that exchange weights, and of kernels, have no place in one process and are not here.
"""

import queue
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.recovery.crash_jobs import Zygote, some_baselines

from equipoise.disk.checkpoint import load_checkpoint, save_checkpoint
from equipoise.faults.files import CheckpointDamage, damage
from equipoise.recovery.actions import Patient
from equipoise.recovery.gate import Gate
from equipoise.recovery.known_good import KnownGood
from equipoise.recovery.router_state import router_state
from equipoise.recovery.swap import digest, swap
from equipoise.recovery.weights import apply_full_rollback, apply_router_rollback, reload_weights
from equipoise.types import Finding

LAYER = "layers.1.mlp"
FINDING = Finding("not_finite", LAYER, None, "critical", 1.0, 0.0, "the model is not finite", "go back")
PATIENCE = 20.0


pytestmark = pytest.mark.usefixtures("one_thread")


class Served:
    """A model that is served, its checkpoints A (as trained) and B (other weights everywhere), and their outputs."""

    def __init__(self, bench, root):
        self.bench, self.model, self.root = bench, bench.model, root
        self.a, self.output_a = self._save(1), bench.serve(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.9)
        self.b, self.output_b = self._save(2), bench.serve(0)
        self.reload = reload_weights(self.model, root)
        self.reload(self.a)
        assert not torch.equal(self.output_a, self.output_b)

    def _save(self, step):
        return save_checkpoint(self.root, step, {"model": self.model.state_dict()}, {}).name

    def serves(self, output):
        return torch.equal(self.bench.serve(0), output)


@pytest.fixture
def served(bench, tmp_path):
    return Served(bench, tmp_path / "checkpoints")


# ------------------------------------------------------------------------------------------------------- reloading


def test_a_second_load_is_the_same_load(served):
    # vllm#42821, SkyRL#1680: the second load_weights corrupted the MoE layers
    for _ in range(3):
        served.reload(served.b)
        assert digest(served.model.state_dict()) == digest(load_checkpoint(served.root / served.b).tensors["model"])
        assert served.serves(served.output_b)


def test_a_then_b_then_a_is_a(served):
    # vllm#42821, SkyRL#1680: round trip
    before = digest(served.model.state_dict())
    served.reload(served.b)
    assert digest(served.model.state_dict()) != before
    served.reload(served.a)
    assert digest(served.model.state_dict()) == before
    assert served.serves(served.output_a)


def test_a_load_after_experts_changed_places_puts_each_in_its_own(served):
    # vllm#55228: a reload after a rebalance left the experts permuted
    layer = served.model.moe_layers[LAYER]
    order = torch.arange(layer.num_experts).roll(1)
    with torch.no_grad():
        for tensor in (layer.router.weight, *layer.experts.parameters()):
            tensor.copy_(tensor[order].clone())
    assert torch.allclose(served.bench.serve(0), served.output_a, atol=1e-5)  # the same function by other places
    served.reload(served.b)
    assert served.serves(served.output_b)


def test_what_a_load_read_from_may_change_or_go_at_once(served):
    # vllm#32881: a buffer was overwritten before the weights were copied; vllm#55228: an outstanding transfer
    state = load_checkpoint(served.root / served.b).tensors["model"]
    swap(served.model, state, whole=True)
    for tensor in state.values():
        tensor.fill_(1)
    shutil.rmtree(served.root)
    assert served.serves(served.output_b)


def test_weights_that_changed_on_disk_are_never_the_old_ones(served):
    # vllm#32718: reload_weights returned cached, stale weights
    served.reload(served.b)
    state = {name: tensor.clone() for name, tensor in served.model.state_dict().items()}
    state["lm_head.weight" if "lm_head.weight" in state else "embed_tokens.weight"] += 0.5
    first = swap(served.model, load_checkpoint(served.root / served.b).tensors["model"], whole=True)
    shutil.rmtree(served.root / served.b)
    assert save_checkpoint(served.root, 2, {"model": state}, {}).name == served.b  # the same name, other content
    second = swap(served.model, load_checkpoint(served.root / served.b).tensors["model"], whole=True)
    assert second.digest == digest(state) != first.digest
    assert digest(served.model.state_dict()) == second.digest
    assert len(second.changed) >= 1
    assert not served.serves(served.output_b)


@pytest.mark.parametrize("kind", ["flip", "truncate", "missing", "wrong_size"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_checkpoint_that_is_damaged_or_of_another_size_leaves_the_old_weights_serving(served, kind, seed):
    # sglang#2322: a checkpoint of the wrong size corrupted the engine
    before = digest(served.model.state_dict())
    damage(served.root / served.b, CheckpointDamage(kind=kind, seed=seed))
    with pytest.raises(ValueError, match="has shape" if kind == "wrong_size" else served.b):
        served.reload(served.b)
    assert digest(served.model.state_dict()) == before
    assert served.serves(served.output_a)
    served.reload(served.a)  # and the next load works
    assert served.serves(served.output_a)


BIAS = f"{LAYER}.balancer.bias_E"


@pytest.mark.parametrize(
    ("moved", "missing"),
    [(lambda name: name != BIAS, BIAS), (lambda name: ".balancer." in name, f"{LAYER}.router.weight")],
    ids=["weights without the bias", "biases without the weights"],
)
def test_a_part_is_not_the_whole(bench_with_balancer, tmp_path, moved, missing):
    # vllm#47588, sglang#17158: scales moved without weights, or stayed behind. Here: the biases of balancers
    model = bench_with_balancer.model
    served, before = bench_with_balancer.serve(0), digest(model.state_dict())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if moved(name)}
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor += 1
    name = save_checkpoint(tmp_path, 1, {"model": state}, {}).name
    with pytest.raises(ValueError, match=rf"nothing was changed: .*{missing} is missing"):
        reload_weights(model, tmp_path)(name)
    assert digest(model.state_dict()) == before
    assert torch.equal(bench_with_balancer.serve(0), served)


# ------------------------------------------------------------------------------------------------ while it is served


def between_the_layers(model, what):
    """Once, after the first layer of the next forward."""
    handle = model.layers[0].register_forward_hook(lambda *_: (handle.remove(), what())[1])


def test_a_change_during_a_step_waits_for_its_end(served):
    # sglang#14178: garbled output after small-bucket updates; vllm#32881
    between_the_layers(served.model, lambda: served.reload(served.b) and None)
    mixed = served.bench.serve(0)
    assert not torch.equal(mixed, served.output_a)  # without a gate: half of each
    assert not torch.equal(mixed, served.output_b)
    served.reload(served.a)

    gate, halfway, go_on = Gate(), threading.Event(), threading.Event()
    between_the_layers(served.model, lambda: (halfway.set(), go_on.wait(PATIENCE), None)[2])

    def forward():
        with gate.running():
            return served.bench.serve(0)

    def change():
        with gate.changing(PATIENCE):
            served.reload(served.b)

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(forward)
        assert halfway.wait(PATIENCE)
        changed = pool.submit(change)
        blocked = threading.Event()
        while not gate._condition._waiters and not changed.done():
            blocked.wait(0.002)
        second = pool.submit(forward)
        go_on.set()
        changed.result(PATIENCE)
        assert torch.equal(first.result(PATIENCE), served.output_a)
        output = second.result(PATIENCE)
        assert torch.equal(output, served.output_b)


def test_under_traffic_every_output_is_of_one_set_of_weights(served):
    # sglang#14178: atomic swap
    gate, stop, outputs = Gate(), threading.Event(), queue.Queue()

    def serve():
        while not stop.is_set():
            with gate.running():
                output = served.bench.serve(0)
            outputs.put("a" if torch.equal(output, served.output_a) else whose(output))

    def whose(output):
        return "b" if torch.equal(output, served.output_b) else "neither"

    seen = []
    with ThreadPoolExecutor(3) as pool:
        servers = [pool.submit(serve) for _ in range(3)]
        try:
            for _ in range(20):
                with gate.changing(PATIENCE):
                    undo = served.reload(served.b)
                seen += [outputs.get(timeout=PATIENCE) for _ in range(4)]
                with gate.changing(PATIENCE):
                    undo()
                seen += [outputs.get(timeout=PATIENCE) for _ in range(4)]
        finally:
            stop.set()
        for server in servers:
            server.result(PATIENCE)
    seen += list(outputs.queue)
    assert set(seen) == {"a", "b"}
    assert served.serves(served.output_a)


def test_a_swap_that_fails_halfway_leaves_the_old_weights_serving(served):
    # sglang#2322, vllm#32881: half of a load is worse than none
    served.model.register_buffer("broken", torch.zeros(1).expand(3))  # can't be written to
    before = digest(served.model.state_dict())
    new = load_checkpoint(served.root / served.b).tensors["model"]
    with pytest.raises(RuntimeError, match="single memory location"):
        swap(served.model, {**new, "broken": torch.ones(3)}, whole=True)
    assert digest(served.model.state_dict()) == before
    assert served.serves(served.output_a)


# ------------------------------------------------------------------------------------------------- the way back


def records_of(served, tmp_path, *checkpoints):
    registry = KnownGood(tmp_path, tolerance=1.0)
    for step, checkpoint in enumerate(checkpoints, start=1):
        served.reload(checkpoint or served.a)
        tensors = {**router_state(served.model), "step": torch.tensor(step)}
        registry.put(step=step, tensors=tensors, baselines=some_baselines(), loss=2.0, checkpoint=checkpoint)
    return Patient(served.model, served.model.moe_layers, known_good=registry, reload=served.reload)


@pytest.mark.parametrize("kind", ["gone", "flip", "truncate", "missing", "wrong_size"])
def test_a_rollback_passes_over_a_checkpoint_that_is_gone_or_damaged(served, tmp_path, kind):
    # sglang#2322, and every story of a backup that was never read
    patient = records_of(served, tmp_path, served.a, served.b, None)
    if kind == "gone":
        shutil.rmtree(served.root / served.b)
    else:
        damage(served.root / served.b, CheckpointDamage(kind=kind, seed=1))
    with torch.no_grad():
        served.model.moe_layers[LAYER].router.weight.fill_(float("nan"))
    change = apply_full_rollback(patient, FINDING)
    assert served.serves(served.output_a)
    assert change.detail == {"record_step": 1.0}
    assert change.note.startswith(f"checkpoint {served.a}; passed over: ")
    assert ("has shape" if kind == "wrong_size" else served.b) in change.note
    change.undo()
    assert bool(served.model.moe_layers[LAYER].router.weight.isnan().all())


def test_a_rollback_that_finds_no_whole_checkpoint_changes_nothing(served, tmp_path):
    # sglang#2322
    patient = records_of(served, tmp_path, served.a, served.b)
    before = digest(served.model.state_dict())
    shutil.rmtree(served.root / served.a)
    damage(served.root / served.b, CheckpointDamage(kind="flip"))
    with pytest.raises(ValueError, match=rf"no known-good checkpoint can be loaded\. .*{served.b}.*{served.a}"):
        apply_full_rollback(patient, FINDING)
    assert digest(served.model.state_dict()) == before


def test_a_router_rollback_passes_over_a_record_that_is_damaged(served, tmp_path):
    # sglang#2322: the backup of the router was never read either
    patient = records_of(served, tmp_path, served.a, served.b)
    old, new = patient.known_good.records
    content = bytearray(patient.known_good.path(new).read_bytes())
    content[-1] ^= 1
    patient.known_good.path(new).write_bytes(content)
    router = served.model.moe_layers[LAYER].router
    with torch.no_grad():
        router.weight.fill_(float("nan"))
    change = apply_router_rollback(patient, FINDING)
    assert torch.equal(router.weight, patient.known_good.load(old)[f"{LAYER}.router.weight"])
    assert change.detail == {"record_step": 1.0}
    assert change.note.startswith(f"router of step 1, {old.id[:12]}; passed over: ")
    assert new.id in change.note
    change.undo()
    assert bool(router.weight.isnan().all())
    patient.known_good.path(old).write_bytes(b"")  # what is left has the right length and the wrong bytes
    with pytest.raises(ValueError, match=rf"router_rollback: no known-good record can be loaded\. .*{new.id}"):
        apply_router_rollback(patient, FINDING)
    assert bool(router.weight.isnan().all())


@pytest.mark.parametrize("already", [[], [1, 2]], ids=["its first record", "a record when it is full"])
def test_a_registry_that_is_written_while_the_process_dies_is_whole(tmp_path, already):
    # sglang#2322, vllm#32718: what was half written must never be gone back to. It dies at each call for a file
    def put(registry, step):
        tensors = {"router.weight": torch.full((4,), float(step))}
        registry.put(step=step, tensors=tensors, baselines=some_baselines(), loss=1.0 - step / 1000)

    before, deaths = tmp_path / "before", 0
    before.mkdir()
    for step in already:
        put(KnownGood(before, keep=2), step)
    with Zygote() as zygote:
        for at in range(1, 100):
            folder = tmp_path / str(at)
            shutil.copytree(before, folder)
            ended = zygote.wait(zygote.start("put_and_die", str(folder), 3, at))
            registry = KnownGood(folder, keep=2)
            steps = [record.step for record in registry.records]
            assert steps in (already, [*already, 3][-2:])  # before, or after; nothing between
            for record in registry.records:
                assert registry.load(record)["router.weight"].eq(record.step).all()
            put(registry, 4)  # the next process goes on, and leaves nothing of the dead one
            assert registry.latest().step == 4
            assert sorted(each.name for each in folder.rglob("*")) == sorted(
                ["known_good", "known_good.json", *(registry.path(record).name for record in registry.records)]
            )
            if ended == 0:
                break
            assert ended == -signal.SIGKILL
            deaths += 1
    assert deaths >= 15  # of each of two files: open, write, flush, sync, rename; the lock, and the file that goes


def test_a_checkpoint_without_a_model_is_a_clear_error(bench, tmp_path):
    """Written by something else: the rollback passes over it like over a damaged one."""
    path = save_checkpoint(tmp_path, 7, {"optimizer": {"m": torch.zeros(2)}}, {})
    with pytest.raises(ValueError, match=r"step-000007: expected a group of tensors called model, got \['optimizer'\]"):
        reload_weights(bench.model, tmp_path)(path.name)
