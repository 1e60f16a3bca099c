"""What is compared computes the same, says why it is left out, and is refused when it computes something else."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from equipoise.bench.ours import equipoise_moe
from equipoise.bench.peers import article, st_moe
from equipoise.bench.peers.transformers import needs_memory_for_copies
from equipoise.bench.problem import SHAPES, LeftOutError, Shape, make_problem, parse_shape, plain_moe
from equipoise.bench.saved import lean_formula, saved_for_backward
from equipoise.bench.variants import available, inference_errors, outcome, trained_layers, variants
from equipoise.layer.experts import BACKENDS

TINY = Shape("tiny", dim=32, hidden_dim=16, num_experts=4, top_k=2)


def test_without_transformers_its_rows_are_left_out_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # Python's own way of saying: not there
    problem = make_problem(TINY, 8, torch.float32)
    can_run, notes = available(variants(), problem, 8)
    assert {"equipoise lean", "dense, gate and up fused"} <= can_run.keys()
    assert not any(name.startswith("transformers") for name in can_run)
    theirs = [note for note in notes if note.startswith("transformers")]
    assert len(theirs) == 3
    assert all("pip install 'equipoise[bench]'" in note for note in theirs)


def test_what_would_copy_too_much_is_left_out():
    # 4096 tokens x 8 experts x 2 x 512 x 256 weights x 2 bytes = 16 GiB
    with pytest.raises(LeftOutError, match=r"transformers|16 GiB with 4096 fine tokens"):
        needs_memory_for_copies(SHAPES["fine"], 4096, torch.bfloat16)


def test_variants_agree_in_fp32():
    problem = make_problem(TINY, 16, torch.float32)
    can_run, _ = available(variants(), problem, 16)
    layers, errors = trained_layers(problem, can_run)
    assert layers.keys() == errors.keys() == can_run.keys()


def test_a_variant_that_computes_something_else_is_refused():
    problem = make_problem(TINY, 16, torch.float32)
    wrong = replace(variants()[0], build=lambda p: equipoise_moe(replace(p, up_EHD=-p.up_EHD), backend="lean"))
    with pytest.raises(
        ValueError, match=r"equipoise lean: expected the same result .* 1e-05, got .*; mend the variant"
    ):
        trained_layers(problem, {wrong.name: wrong})


def test_tokens_are_clear_of_ties():
    problem = make_problem(TINY, 64, torch.bfloat16)
    logits_TE = problem.x_TD @ problem.router_ED.t()  # rounded to bf16
    exact_TE = problem.x_TD.float() @ problem.router_ED.float().t()
    assert torch.equal(logits_TE.topk(2).indices.sort().values, exact_TE.topk(2).indices.sort().values)


def test_saved_bytes_count_each_storage_once_and_no_parameters():
    w = torch.ones(4, 4, requires_grad=True)
    x = torch.ones(8, 4, requires_grad=True)
    # x * x keeps x (twice, one storage: 128 bytes); the product keeps x * x (128 bytes) and w, a parameter.
    assert saved_for_backward(lambda: (x * x) @ w, [w]) == 256


def test_lean_keeps_what_its_formula_says_and_the_routers_small_things():
    shape, num_tokens = Shape("wide", dim=256, hidden_dim=128, num_experts=4, top_k=2), 64
    problem = make_problem(shape, num_tokens, torch.bfloat16)
    layer = equipoise_moe(problem, backend="lean")
    x_TD = problem.x_TD.clone().requires_grad_()
    kept = saved_for_backward(partial(layer.forward, x_TD), layer.module.parameters())
    formula = lean_formula(num_tokens, 256, 128, 2, itemsize=2)
    assert formula == 2 * 64 * 256 + 4 * 64 * 2 * 128
    assert formula <= kept < formula + num_tokens * 256  # the rest is of size T K and T E: here under 256 bytes a token


def test_every_backend_is_a_variant_but_the_reference():
    names = {candidate.name for candidate in variants()}
    assert {f"equipoise {name}" for name in BACKENDS if name != "reference"} <= names


def test_only_names_what_there_is():
    problem = make_problem(TINY, 8, torch.float32)
    can_run, _ = available(variants(), problem, 8, only=("lean", "fused"))
    assert list(can_run) == ["equipoise lean", "dense, gate and up fused"]
    with pytest.raises(ValueError, match=r"only: 'lear' is in none of equipoise lean, .*article's loop"):
        available(variants(), problem, 8, only=("lean", "lear"))


def test_inference_is_compared_with_the_first_tokens():
    problem = make_problem(TINY, 16, torch.float32)
    can_run, _ = available(variants(), problem, 3)
    layers = {name: candidate.build(problem) for name, candidate in can_run.items()}
    errors = inference_errors(problem, can_run, layers, 3)
    assert max(errors.values()) < 1e-5
    assert not any(layer.module.training for layer in layers.values())


def test_st_moe_computes_what_the_plain_loop_does_while_nothing_is_dropped():
    problem = make_problem(TINY, 512, torch.float32)
    st_moe.needs_st_moe(TINY, 512, torch.float32)
    ours, theirs = outcome(plain_moe(problem), problem), outcome(st_moe.st_moe(problem), problem)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_the_articles_loop_computes_what_its_plain_twin_does_while_nothing_is_dropped():
    problem = make_problem(TINY, 512, torch.float32)
    article.drops_nothing(TINY, 512, torch.float32)
    layer = article.article_moe(problem)
    ours, twin = outcome(layer, problem), outcome(article.article_twin(problem), problem)
    assert layer.module.num_dropped == 0
    for mine, other in zip(ours, twin, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_the_articles_loop_loses_a_token_that_is_alone():
    problem = make_problem(TINY, 1, torch.float32)  # 1 token x 2 / 4 experts x 1.5: a capacity of 0
    layer = article.article_moe(problem)
    assert torch.equal(layer.forward(problem.x_TD), torch.zeros(1, 32))
    assert layer.module.num_dropped == 2
    with pytest.raises(LeftOutError, match="with 1 tokens its capacity is 0 per expert"):
        article.drops_nothing(TINY, 1, torch.float32)


def test_st_moe_is_left_out_where_its_one_hot_tensors_are_too_large():
    with pytest.raises(LeftOutError, match=r"\(T, E, capacity\) take \d+\.\d GiB each with 4096 tokens and 64 experts"):
        st_moe.needs_st_moe(SHAPES["fine"], 4096, torch.bfloat16)


def test_a_shape_is_a_name_or_four_numbers():
    assert parse_shape("fine") == Shape("fine", 512, 256, 64, 8)
    assert parse_shape("512,256,64,8") == Shape("512,256,64,8", 512, 256, 64, 8)
    for bad in ("finer", "512,256,64", "512,256,64,0", "512,256,x,8"):
        with pytest.raises(ValueError, match=r"shape: expected coarse, .* mixtral, or D,F,E,K"):
            parse_shape(bad)
    with pytest.raises(ValueError, match=r"at most E=4 experts per token, got K=5"):
        parse_shape("8,8,4,5")
