"""Optimizer and random-number state: through a checkpoint on disk and back, and training goes on with the same bits."""

import json
import random

import numpy as np
import pytest
import torch

from equipoise.disk.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from equipoise.train.snapshot import pack_optimizer, rng_state, set_rng_state, unpack_optimizer


def tiny_run(steps, resume_from=None, save_to=None):
    """Train with AdamW and dropout on random batches: parameters, moments and three generators must all be restored."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 2)).bfloat16()
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2].parameters(), "weight_decay": 0.3}]
    )
    start = 0
    if resume_from is not None:
        loaded = load_checkpoint(resume_from)
        start = loaded.step
        model.load_state_dict(loaded.tensors["model"])
        unpack_optimizer(optimizer, loaded.tensors["optimizer"], loaded.state["optimizer"])
        set_rng_state(loaded.state["rng"])
    for _ in range(start, steps):
        loss = model(torch.randn(16, 4).bfloat16()).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if save_to is not None:
        tensors, described = pack_optimizer(optimizer)
        state = {"optimizer": described, "rng": rng_state()}
        save_checkpoint(save_to, steps, {"model": model.state_dict(), "optimizer": tensors}, state)
    return model, optimizer


def test_resumed_adamw_ends_with_the_same_bits(tmp_path):
    straight, straight_optimizer = tiny_run(8)
    tiny_run(4, save_to=tmp_path)
    torch.manual_seed(99)
    resumed, resumed_optimizer = tiny_run(8, resume_from=latest_checkpoint(tmp_path))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))
    a, b = straight_optimizer.state_dict(), resumed_optimizer.state_dict()
    assert a["param_groups"] == b["param_groups"]
    for index in a["state"]:
        assert all(torch.equal(a["state"][index][name], b["state"][index][name]) for name in a["state"][index])


def through_disk(optimizer, folder):
    tensors, described = pack_optimizer(optimizer)
    loaded = load_checkpoint(save_checkpoint(folder, 1, {"o": tensors}, {"o": described}))
    return loaded.tensors["o"], loaded.state["o"]


def test_optimizer_state_keeps_a_dtype_other_than_the_parameters(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight])
    third = torch.full((3,), 1 / 3)  # fp32, not a bf16 number
    optimizer.state[weight] = {"step": torch.tensor(1.0), "exp_avg": third, "codes": torch.tensor([1, 2, 3])}
    fresh = torch.optim.AdamW([weight])
    unpack_optimizer(fresh, *through_disk(optimizer, tmp_path))
    assert torch.equal(fresh.state[weight]["exp_avg"], third)
    assert fresh.state[weight]["codes"].dtype == torch.int64


def test_group_values_keep_their_types(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], lr=torch.tensor(0.01), betas=(0.8, 0.95))
    fresh = torch.optim.AdamW([weight], lr=torch.tensor(0.5))
    unpack_optimizer(fresh, *through_disk(optimizer, tmp_path))
    assert fresh.param_groups[0]["betas"] == (0.8, 0.95)
    assert torch.equal(fresh.param_groups[0]["lr"], torch.tensor(0.01))


def test_unpacked_state_is_not_the_callers():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    tensors, described = pack_optimizer(optimizer)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    fresh = torch.optim.AdamW([weight])
    unpack_optimizer(fresh, tensors, described)
    fresh.step()
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3), (4,)], r"the optimizer has 2 parameters, the checkpoint 1: build the model"),
        ([(3, 2)], r"parameter 0 of the optimizer has shape \[3, 2\], the checkpoint \[2, 3\]: build"),
    ],
)
def test_optimizer_of_another_model_is_refused(shapes, message):
    packed = pack_optimizer(torch.optim.AdamW([torch.zeros(2, 3)]))
    with pytest.raises(ValueError, match=message):
        unpack_optimizer(torch.optim.AdamW([torch.zeros(shape) for shape in shapes]), *packed)


def test_optimizer_messages():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    optimizer.state[weight] = {"exp_avg": torch.ones(2)}
    _, described = pack_optimizer(optimizer)
    with pytest.raises(ValueError, match=r"tensor 'state\.0\.exp_avg' is missing: pass all tensors"):
        unpack_optimizer(optimizer, {}, described)
    with pytest.raises(ValueError, match="must be what pack_optimizer returned"):
        unpack_optimizer(optimizer, {}, [])
    optimizer.state[weight]["odd"] = object()
    with pytest.raises(ValueError, match=r"optimizer state 'state\.0\.odd' is a object: only tensors"):
        pack_optimizer(optimizer)


def test_random_numbers_go_on_where_they_were():
    def draw():
        return [random.random(), random.gauss(0, 1), float(np.random.normal()), int(torch.randint(2**40, ()))]

    draw()  # leaves a spare Gaussian in Python and NumPy, which is state too
    state = json.loads(json.dumps(rng_state()))
    first = [draw() for _ in range(3)]
    set_rng_state(state)
    assert [draw() for _ in range(3)] == first
