"""What travels: how many bytes, and what it loses on the way in fewer bits. Four real ranks, one of them empty."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.parallel.exchange_worker import D, E
from tests.ranks import run_ranks

from equipoise.parallel import ParallelConfig
from equipoise.parallel.payload import Quantised, payloads
from equipoise.parallel.replicas import slot_table
from equipoise.plan.replicas import ranks_of_choices
from equipoise.types import Placement

WORKER, WORLD = Path(__file__).with_name("exchange_worker.py"), 4
COUNTS = 2 * 8  # bytes: rows and errands to come, for each other rank
ERRAND = 2 * 4 + 4  # bytes: place, label and weight


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("exchange")
    run_ranks(WORKER, folder, WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def ranks_of(ids: list[int]) -> list[int]:
    return [expert * WORLD // E for expert in ids]


@pytest.mark.parametrize(("way", "row"), [("as it is", 4 * D), ("bf16", 2 * D), ("int8", D + 4), ("fp8", D + 4)])
def test_a_token_travels_once_to_each_rank_that_it_needs(way, row, told):
    """Counted here from the ids; the same sums per arrived row come home, so a rank sends its own and others' rows."""
    home = {"as it is": 4 * D}.get(way, 2 * D)
    for rank in range(WORLD):
        out = sum(len(set(ranks_of(ids)) - {rank}) for ids in told[rank][way]["ids"])
        errands = sum(target != rank for ids in told[rank][way]["ids"] for target in ranks_of(ids))
        back = sum(rank in ranks_of(ids) for other in range(WORLD) if other != rank for ids in told[other][way]["ids"])
        assert told[rank][way]["sent"] == out * row + errands * ERRAND + (WORLD - 1) * COUNTS + back * home


def test_two_hops_send_a_token_once_to_the_other_node(told):
    """Ranks 0 and 1 are a node, 2 and 3 another. First to the rank in the same place there, then within the node."""
    for rank in range(WORLD):
        node, local = rank // 2, rank % 2
        twin = (rank + 2) % WORLD
        mine, others = ([set(ranks_of(ids)) for ids in told[r]["two nodes"]["ids"]] for r in (rank, twin))
        over = sum(any(target // 2 != node for target in targets) for targets in mine)
        brought = sum(any(target // 2 == node for target in targets) for targets in others)
        here = [targets for targets in (*mine, *others) if any(target // 2 == node for target in targets)]
        on = sum(rank - local + (1 - local) in targets for targets in here)
        neighbour = rank - local + (1 - local)
        at_neighbour = [
            set(ranks_of(ids)) for r in (neighbour, (neighbour + 2) % WORLD) for ids in told[r]["two nodes"]["ids"]
        ]
        home = sum(rank in targets for targets in at_neighbour)
        errands = sum(t // 2 != node for ids in told[rank]["two nodes"]["ids"] for t in ranks_of(ids))
        errands += sum(
            t == neighbour for r in (rank, twin) for ids in told[r]["two nodes"]["ids"] for t in ranks_of(ids)
        )
        rows = (over + brought + on + home) * 4 * D
        assert told[rank]["two nodes"]["sent"] == rows + errands * ERRAND + 2 * COUNTS


def test_group_limits_keep_tokens_on_one_node(told):
    for each in told:
        assert each["two nodes, limited"]["error"] < 1e-5
        for ids in each["two nodes, limited"]["ids"]:
            assert len({rank // 2 for rank in ranks_of(ids)}) == 1


@pytest.mark.parametrize(
    ("way", "bound"),
    [
        ("as it is", 1e-5),
        ("gathered", 1e-5),
        ("two nodes", 1e-5),
        ("bf16", 2e-2),
        ("bf16, gathered", 2e-2),
        ("int8", 4e-2),
        ("fp8", 0.15),
        ("fp8, two nodes", 0.2),
    ],
)
def test_what_fewer_bits_lose(way, bound, told):
    """Relative to the largest output and input gradient; an exact way loses nothing, a rounded one something."""
    for rank in (0, 2, 3):
        assert told[rank][way]["error"] < bound
        assert told[rank][way]["grad_error"] < bound
        assert bound < 1e-4 or told[rank][way]["error"] > 1e-4


def test_quantised_rows_err_by_less_than_a_step():
    x_RD = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50)[:, None]
    x_RD[7] = 0
    most_R1 = x_RD.abs().amax(1, keepdim=True)
    for dtype, error in ((torch.int8, 1 / 254), (torch.float8_e4m3fn, 1 / 16)):
        quantised = Quantised(dtype)
        packed = quantised.pack(x_RD)
        assert packed.shape == (50, 36)
        assert packed.dtype == torch.uint8
        back = quantised.unpack(packed, torch.float32)
        assert bool(((back - x_RD).abs() <= most_R1 * error * 1.0001).all())
        assert not back[7].any()
        assert quantised.unpack(quantised.pack(x_RD[:0]), torch.float32).shape == (0, 32)


def test_copies_of_an_expert_share_its_tokens():
    """Own rank first, then a rank that is needed anyway, then the emptier one; worked by hand."""
    tokens, experts = torch.tensor([0, 0, 1, 1, 2, 3]), torch.tensor([1, 3, 2, 3, 1, 1])
    table = slot_table(Placement(((0, 1), (2, 1), (3, 1))))  # expert 1 is everywhere
    rank_N, slot_N = table.choose(tokens, experts, 4, own_rank=0)
    assert rank_N.tolist() == [0, 2, 1, 2, 0, 0]
    assert slot_N.tolist() == [1, 0, 0, 0, 1, 1]
    away = slot_table(Placement(((0,), (2, 1), (3, 1))))
    rank_N, slot_N = away.choose(tokens, experts, 4, own_rank=0)
    # token 0 goes to rank 2 anyway, which then has three; rank 1 has one, so tokens 2 and 3 go there
    assert rank_N.tolist() == [2, 2, 1, 2, 1, 1]
    assert slot_N.tolist() == [1, 0, 0, 0, 1, 1]


@given(data=st.data())
def test_the_rule_is_that_of_the_planner(data):
    """On any placement with replicas, for tokens of any rank: the same rank as `plan.replicas` says."""
    num_ranks, num_experts, k = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 7)), data.draw(st.integers(1, 3))
    k = min(k, num_experts)
    subsets = st.sets(st.integers(0, num_ranks - 1), min_size=1)
    held = [data.draw(subsets) for _ in range(num_experts)]
    placement = Placement(tuple(tuple(e for e in range(num_experts) if rank in held[e]) for rank in range(num_ranks)))
    own, num_tokens = data.draw(st.integers(0, num_ranks - 1)), data.draw(st.integers(0, 12))
    ids = [data.draw(st.permutations(range(num_experts)))[:k] for _ in range(num_tokens)]
    ids_TK = torch.tensor(ids, dtype=torch.int64).view(num_tokens, k)
    token_ids_N = torch.arange(num_tokens).repeat_interleave(k)
    rank_N, slot_N = slot_table(placement).choose(token_ids_N, ids_TK.reshape(-1), num_tokens, own_rank=own)
    expected = ranks_of_choices(placement, ids_TK.numpy(), np.full(num_tokens, own))
    assert rank_N.view(num_tokens, k).tolist() == expected.tolist()
    for rank, slot, expert in zip(rank_N.tolist(), slot_N.tolist(), ids_TK.reshape(-1).tolist(), strict=True):
        assert placement.slots[rank][slot] == expert


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert": 0}, r"parallel\.expert: expected at least 1, got 0"),
        ({"expert": 4, "nodes": 3}, r"parallel\.nodes: expected a divisor of parallel\.expert = 4, got 3"),
        ({"dispatcher": "ring"}, r"parallel\.dispatcher: expected all_to_all or all_gather, got 'ring'"),
        ({"expert": 2, "nodes": 2, "dispatcher": "all_gather"}, "all_gather knows no nodes"),
        ({"expert": 4, "nodes": 2, "chunks": 2}, r"parallel\.chunks: expected 1 with nodes or all_gather, got 2"),
        ({"payload": "int4"}, "payload: expected as_is, bf16, int8, fp8, got 'int4'"),
        ({"timeout_s": 0}, r"parallel\.timeout_s: expected more than 0"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**fields)


def test_known_payloads():
    assert [type(payload).__name__ for payload in payloads("fp8")] == ["Quantised", "Cast"]
