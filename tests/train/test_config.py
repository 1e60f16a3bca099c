"""A run's configuration: JSON and back, what is refused, the recipes; the learning rate, the optimizer's groups."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from equipoise.layer import Capacity
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.routing import BiasBalance, HighThenLow, QuantileBalance, SwitchLoss, TopK, ZLoss
from equipoise.train.config import DataConfig, OptimConfig, Overrides, TrainConfig
from equipoise.train.optim import build_optimizer, learning_rate
from equipoise.train.recipes import RECIPES, recipe

# ------------------------------------------------------------------------------------------------------- JSON

positive = st.integers(1, 10**6)
above_zero = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
finite = st.floats(allow_nan=False, allow_infinity=False)
losses = st.sampled_from([SwitchLoss(), SwitchLoss(coef=HighThenLow(0.1, 0.001, 10, 10), scope="global")])
balances = st.tuples(losses, st.builds(ZLoss, coef=finite), st.sampled_from([QuantileBalance(), BiasBalance()]))
moes = st.builds(
    MoEConfig,
    num_experts=st.integers(4, 64),
    hidden_dim=positive,
    router=st.builds(
        TopK, k=st.integers(2, 4), jitter=st.floats(0, 0.5), score=st.sampled_from(["softmax", "sigmoid"])
    ),
    balance=balances,
    capacity=st.none() | st.builds(Capacity, factor=st.floats(0.1, 10)),
    checkpoint_experts=st.booleans(),
)
models = st.builds(
    DecoderConfig,
    vocab_size=positive,
    dim=st.just(64),
    num_layers=st.just(4),
    num_heads=st.sampled_from([2, 4, 8]),
    hidden_dim=positive,
    max_seq_len=st.just(4096),
    moe=moes,
    moe_layers=st.none() | st.just((1, 3)),
)
tokens = st.builds(
    DataConfig,
    corpus=st.text(),
    domains=st.none() | st.lists(st.text(), min_size=1, unique=True).map(tuple),
    tokenizer=st.sampled_from(["bpe", "gpt2"]),
    seq_len=st.integers(1, 4096),
    val_fraction=finite,
    cache_dir=st.text("abc/ é", min_size=1).map(Path),
)
configs = st.builds(
    TrainConfig,
    name=st.text(),
    model=models,
    data=tokens,
    optim=st.builds(OptimConfig, lr=above_zero, warmup=positive, clip=above_zero),
    steps=positive,
    batch_size=st.just(12),
    micro_batch_size=st.sampled_from([None, 1, 2, 3, 4, 6, 12]),
    bf16=st.booleans(),
    seed=st.integers(0, 2**63),
    recover=st.booleans(),
    interference_every=st.integers(0, 10),
    specialisation=st.booleans(),
)


@given(config=configs)
def test_json_and_back(config):
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_come_back_from_json(name):
    config = recipe(name)
    assert config.name == name
    assert TrainConfig.from_json(config.to_json()) == config


def test_unknown_recipe():
    with pytest.raises(
        ValueError,
        match=r"recipe: expected one of demo, tiny, tiny_two_experts, tiny_scmoe, tiny_.*, base, got 'huge'; see ",
    ):
        recipe("huge")


def damaged():
    fields = json.loads(recipe("tiny").to_json())
    yield "empty", ""
    yield "cut-off", recipe("tiny").to_json()[:500]
    yield "a-list", "[]"
    yield "a-number", "3"
    yield "no-model", json.dumps({key: value for key, value in fields.items() if key != "model"})
    yield "no-optim", json.dumps({key: value for key, value in fields.items() if key != "optim"})
    yield "model-is-null", json.dumps(fields | {"model": None})
    yield "unknown-field", json.dumps(fields | {"stepz": 3})
    yield "steps-is-text", json.dumps(fields | {"steps": "many"})
    yield "data-is-a-list", json.dumps(fields | {"data": [1]})


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in damaged()])
def test_damaged_json_is_a_value_error_that_names_the_file(text):
    with pytest.raises(ValueError, match=r"config\.json: expected .*training run.*start a new run|restore the file"):
        TrainConfig.from_json(text)


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["steps", "batch_size", "keep_checkpoints", "watch_every", "eval_batches"])
def test_numbers_that_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        replace(recipe("tiny"), **{name: 0})


@pytest.mark.parametrize("micro", [0, -1, 3, 32])
def test_micro_batch_size_must_divide(micro):
    with pytest.raises(
        ValueError, match=rf"micro_batch_size: expected a divisor of batch_size = 16, got {micro}; grad"
    ):
        replace(recipe("tiny"), micro_batch_size=micro)


def test_sequences_must_fit_into_the_model():
    with pytest.raises(ValueError, match=r"data.seq_len: expected at most model.max_seq_len = 128, got 129"):
        replace(recipe("tiny"), data=DataConfig(seq_len=129))


def test_unknown_tokenizer():
    with pytest.raises(ValueError, match=r"data.tokenizer: expected bpe or gpt2, or base to tune a model, got 'words'"):
        DataConfig(tokenizer="words")


@pytest.mark.parametrize("domains", [(), ("a", "a")])
def test_domains_are_names_each_once(domains):
    with pytest.raises(ValueError, match=r"data.domains: expected names, each once, or None for all, got \("):
        DataConfig(domains=domains)


def test_a_run_of_before_there_were_domains_can_still_be_read():
    fields = json.loads(recipe("tiny").to_json())
    del fields["data"]["domains"], fields["interference_every"], fields["specialisation"]
    assert TrainConfig.from_json(json.dumps(fields)) == recipe("tiny")


def test_another_corpus_has_other_domains():
    two = recipe("tiny_two_experts")
    assert Overrides().apply(two) == two
    assert Overrides(corpus="mine.txt").apply(two).data.domains is None
    assert Overrides(corpus="mine.txt", domains=("a",)).apply(two).data.domains == ("a",)
    assert Overrides(domains=("cpp",)).apply(two).data.domains == ("cpp",)


def test_num_micro_batches():
    assert recipe("tiny").num_micro_batches == 1
    assert replace(recipe("tiny"), micro_batch_size=4).num_micro_batches == 4


# ------------------------------------------------------------------------------- learning rate, optimizer's groups


def test_learning_rate_by_hand():
    config = OptimConfig(lr=1.0, min_lr_ratio=0.2, warmup=4)
    rates = [learning_rate(config, step, total_steps=8) for step in range(1, 10)]
    # 1/4 .. 4/4, then 0.2 + 0.8 * (1 + cos(pi j / 4)) / 2 for j = 1 .. 4: cos is 0.7071, 0, -0.7071, -1
    assert rates[:8] == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.882843, 0.6, 0.317157, 0.2], abs=1e-6)
    assert rates[8] == pytest.approx(0.2)  # and stays there


@given(lr=st.floats(1e-8, 1), ratio=st.floats(0, 1), warmup=st.integers(0, 50), total=st.integers(1, 100))
def test_learning_rate_rises_then_falls_between_its_bounds(lr, ratio, warmup, total):
    config = OptimConfig(lr=lr, min_lr_ratio=ratio, warmup=warmup)
    rates = [learning_rate(config, step, total) for step in range(1, total + 1)]
    assert all(0 < rate <= lr * (1 + 1e-9) for rate in rates[:-1])
    up, down = rates[:warmup], rates[warmup:]
    assert up == sorted(up)
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(down))
    if total > warmup:
        assert rates[-1] == pytest.approx(lr * ratio)


def test_weight_decay_is_on_matrices_of_attention_and_experts_alone():
    moe = MoEConfig(num_experts=4, hidden_dim=16, shared_experts=1, shared_gate=True, balance=(QuantileBalance(),))
    sizes = {"vocab_size": 50, "dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "max_seq_len": 16}
    model = Decoder(DecoderConfig(**sizes, moe=moe, moe_layers=(1,), tie_embeddings=False))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3, beta2=0.9))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == dict(model.named_parameters()).keys()  # each once: a parameter in two groups is refused
    spared = {name for name, value in decay.items() if value == 0.0}
    assert spared == {
        "embed_tokens.weight",
        "layers.1.mlp.router.weight",
        "norm.weight",
        *(f"layers.{i}.{norm}.weight" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")),
    }
    assert all(decay[name] == 0.3 for name in decay.keys() - spared)
    assert {"layers.1.mlp.experts.down_proj", "layers.0.self_attn.q_proj.weight", "lm_head.weight"} <= decay.keys()
    assert optimizer.defaults["betas"] == (0.9, 0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimConfig(lr=0.0), r"optim\.lr: expected more than 0, got 0\.0"),
        (lambda: OptimConfig(clip=-1.0), r"optim\.clip: expected more than 0, got -1\.0"),
        (lambda: OptimConfig(warmup=-1), r"optim\.warmup: expected 0 or more, got -1"),
        (lambda: replace(recipe("tiny"), eval_every=-1), r"eval_every: expected 0 \(only at the end\) or more, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("words", "value"),
    [([], None), (["--recover"], True), (["--recover", "False"], False), (["--recover", "--steps", "3"], True)],
)
def test_switches_have_three_positions(words, value):
    """Not named is as the recipe has it."""
    assert tyro.cli(Overrides, args=words).recover is value


def test_a_switch_does_not_swallow_what_follows(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(Overrides, args=["--accept-faults", "tiny"])
    assert "expected nothing, True or False after it, got tiny" in " ".join(capsys.readouterr().err.split())
