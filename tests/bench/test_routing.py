"""The routing benchmark runs, covers every router, and builds the loads that it says it measures."""

import json

import pytest
import torch

from equipoise import Capacity, MoE, TopK
from equipoise.bench.harness import Effort
from equipoise.bench.problem import Shape
from equipoise.bench.routing import (
    MAX_VIOLATION,
    OVERFLOW,
    SECTIONS,
    SMOKE,
    Tokens,
    build_router,
    fate,
    imbalance,
    make_sparse,
    measure,
    overflow_tables,
    run_both,
    run_dispatch,
    variant,
)
from equipoise.cli import main
from equipoise.layer.admission import Dropless
from equipoise.routing import ROUTERS, ReLURouting

SHAPE = Shape("tiny", dim=32, hidden_dim=16, num_experts=16, top_k=2)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Rows by the cell of their first column, by the table's section."""
    path = tmp_path_factory.mktemp("routing") / "routing.json"
    with pytest.raises(SystemExit) as end:
        main(["bench", "routing", "--quick", "--out", str(path)])
    assert end.value.code == 0
    found = {}
    for table in json.loads(path.read_text())["tables"]:
        section = found.setdefault(table["title"].split(":")[0], {})
        section |= {next(iter(row.values())): row for row in table["rows"]}
    return found


def test_every_section_has_its_tables(tables):
    sections = {title.split(",")[0] for title in tables}
    assert sections == SECTIONS.keys()
    assert {"share, coarse", "share, fine", "tokens, dropless", "tokens, next_choice"} <= tables.keys()


def test_shares_are_of_the_whole_layer(tables):
    for shape in ("coarse", "fine"):
        shares = tables[f"share, {shape}"]
        assert set(shares) == {"whole layer", "routing + dispatch", "routing", "of it, the linear", "dispatch"}
        assert shares["whole layer"]["share of the layer [%]"] == {"median": 100.0, "low": 100.0, "high": 100.0}


def test_experts_and_tokens_are_compared_with_the_fewest(tables):
    assert list(tables["experts"]) == [f"E={num_experts}" for num_experts in SMOKE.num_experts]
    one = {"median": 1.0, "low": 1.0, "high": 1.0}
    first = tables["experts"]["E=4"]
    assert first["/ E=4"] == first["linear / E=4"] == first["rest / E=4"] == one
    for dispatcher in ("dropless", "next_choice"):
        assert tables[f"tokens, {dispatcher}"]["T=64"]["per token / T=64"] == one


def test_every_router_is_timed(tables):
    assert list(tables["routers"]) == [strategy.__name__ for strategy in ROUTERS]
    for name, row in tables["routers"].items():
        expected = 1 if name == "Switch" else 2
        assert row["assignments per token"] == pytest.approx(expected, abs=0.5 if name == "ReLURouting" else 0)


def test_overflow_goes_where_its_policy_says(tables):
    rows = tables["overflow"]
    assert list(rows) == list(OVERFLOW)
    percent = {name: (row["computed [%]"], row["moved or spilled [%]"]) for name, row in rows.items()}
    assert percent["dropless"] == percent["dropless, shared expert"] == (100, 0)
    assert percent["drop"][0] < 100
    assert percent["drop"][1] == 0
    assert percent["drop"][0] < percent["next_choice"][0]
    assert percent["next_choice"][1] > 0
    assert sum(percent["shared"]) == pytest.approx(100)


def test_only_measures_what_is_asked_for():
    effort = Effort(rounds=1, warmup=1)
    (table,) = measure(SMOKE, torch.float32, effort, ("routers",))
    assert table.title.startswith("routers:")
    with pytest.raises(
        ValueError, match="only: expected some of share, experts, tokens, overflow, routers, got router"
    ):
        next(iter(measure(SMOKE, torch.float32, effort, ("router",))))


def test_the_imbalanced_router_has_the_violation_that_was_asked_for():
    tokens = Tokens.draw(2048, SHAPE.dim, torch.float32)
    router = build_router(TopK(k=2), SHAPE, torch.float32)
    assert imbalance(router, tokens, MAX_VIOLATION) == pytest.approx(MAX_VIOLATION, abs=0.05)
    tokens.renew()  # other tokens meet the same load, but for chance
    counts_E = torch.bincount(router(tokens.x_TD).expert_ids_N, minlength=16).double()
    assert float(counts_E.max() / counts_E.mean() - 1) == pytest.approx(MAX_VIOLATION, abs=0.15)


def test_relu_routing_is_as_sparse_as_asked_for():
    tokens = Tokens.draw(2048, SHAPE.dim, torch.float32)
    router = build_router(ReLURouting(k=2), SHAPE, torch.float32)
    assert len(router(tokens.x_TD).expert_ids_N) / 2048 == pytest.approx(8, abs=0.5)  # as drawn: half of 16
    make_sparse(router, tokens, 2)
    assert len(router(tokens.x_TD).expert_ids_N) / 2048 == pytest.approx(2, abs=0.05)


def test_timed_parts_reach_the_weights_that_they_train():
    tokens = Tokens.draw(64, SHAPE.dim, torch.float32)
    router = build_router(TopK(k=2, renormalize=False), SHAPE, torch.float32)
    run_both(router, Dropless(), tokens)
    assert router.weight.grad.abs().sum() > 0
    assert tokens.x_TD.grad.abs().sum() > 0
    reset = variant("both", lambda: None, router, tokens).reset
    reset()
    assert router.weight.grad is None
    assert tokens.x_TD.grad is None


def test_planning_alone_leaves_no_gradient_behind():
    tokens = Tokens.draw(64, SHAPE.dim, torch.float32)
    with torch.no_grad():
        decision = build_router(TopK(k=2), SHAPE, torch.float32)(tokens.x_TD)
    decision.weights_N.requires_grad_()
    run_dispatch(Dropless(), decision)
    assert decision.weights_N.grad is None


def test_fate_counts_what_a_capacity_drops():
    tokens = Tokens.draw(64, SHAPE.dim, torch.float32)
    layer = MoE(32, 16, 16, router=TopK(k=2), capacity=Capacity(0.5))
    computed, elsewhere = fate(layer, tokens)
    assert 0 < computed <= 50  # 16 experts with room for half of the fair load
    assert elsewhere == 0


def test_overflow_table_says_how_uneven_the_load_is():
    (table,) = overflow_tables(SMOKE, torch.float32, Effort(rounds=1, warmup=1))
    assert "MaxVio 1." in table.note or "MaxVio 0.9" in table.note
