"""Expert parallelism of transformers on two ranks, real gloo, with our products on each: the same as one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.hf.cases import FP32, error
from tests.monitor.transformers_models import E, batch, build

WORKER = Path(__file__).with_name("ranks_worker.py")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(models by family, results by rank)."""
    folder = tmp_path_factory.mktemp("ranks")
    models = {family: build(family, experts_implementation="eager") for family in ("Mixtral", "Qwen3Moe")}
    for family, model in models.items():
        model.save_pretrained(folder / family)
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder)],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert not any(worker.returncode for worker in workers), errors
    return models, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_two_ranks_give_what_one_process_gives(ranks, family):
    models, results = ranks
    model, tokens = models[family].train(), batch(B=4, S=8)[0]
    out = model(tokens, labels=tokens)
    out.loss.backward()
    experts = model.model.layers[0].mlp.experts
    for rank, result in enumerate(results):
        mine = result[family]
        assert mine["calls"] > 0
        assert error(mine["logits"], out.logits.detach()) < FP32
        assert error(mine["training"], out.logits.detach()) < FP32
        for name, parameter in experts.named_parameters():
            half = parameter.grad[rank * E // 2 : (rank + 1) * E // 2]
            assert error(mine["grads"][name], half) < FP32, name
