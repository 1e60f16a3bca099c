"""What would make it fit, advice with its numbers, rules of thumb, tables and the picture."""

import json
import random
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from equipoise.plan.fit.advice import ATTENTION, DENSE, RULES, SPREAD, TIME, TOP
from equipoise.plan.fit.communication import Machine
from equipoise.plan.fit.folklore import rules_of_thumb
from equipoise.plan.fit.known import KNOWN
from equipoise.plan.fit.memory import GIB, memory
from equipoise.plan.fit.plan import Facts, make_plan
from equipoise.plan.fit.remedies import CHANGES, remedies
from equipoise.plan.fit.report import known_table, picture, tables
from equipoise.plan.fit.setup import Mesh, Serving, Setup, Training
from equipoise.plan.links import Cost

MIXTRAL, V3, QWEN = (KNOWN[name].model for name in ("mixtral-8x7b", "deepseek-v3", "qwen3-30b-a3b"))
DENSE_8B = replace(MIXTRAL, name="dense", routed=None, moe_layers=(), hidden_dim=14336)
TRAIN = Setup(work=Training(activations="naive"), batch=8, context=4096, mesh=Mesh(expert=4, data=4))


# ---------------------------------------------------------------------------------------------- remedies


@pytest.mark.parametrize(
    ("model", "setup"),
    [(MIXTRAL, Setup(context=32768, batch=8)), (V3, Setup(mesh=Mesh(expert=16))), (QWEN, TRAIN), (DENSE_8B, Setup())],
)
def test_remedies_say_what_results(model, setup):
    now = memory(model, setup).total
    found = remedies(model, setup, 10 * GIB)
    assert found
    order = [what.split("{")[0] for what, _, _ in CHANGES]
    positions = [next(i for i, start in enumerate(order) if each.what.startswith(start)) for each in found]
    assert positions == sorted(positions)  # the gentlest first
    last = now
    for each in found:
        assert each.memory.total == memory(model, each.setup).total < now
        assert each.fits == (each.memory.total <= 10 * GIB)
        assert each.enough == (each.with_earlier <= 10 * GIB)
        assert each.with_earlier <= last
        last = each.with_earlier


def test_every_change_is_of_use_somewhere():
    setups = [
        (MIXTRAL, Setup(context=32768, batch=8, mesh=Mesh(data=8))),
        (QWEN, TRAIN),
        (QWEN, replace(TRAIN, precision="fp32")),
    ]
    used = {each.cost + each.what.split(":")[0][:12] for model, setup in setups for each in remedies(model, setup, GIB)}
    assert len(used) >= len(CHANGES) - 1  # micro-batches of another number share their start


def test_what_fits_is_marked():
    found = remedies(MIXTRAL, Setup(context=4096, mesh=Mesh(data=2)), 60 * GIB)
    assert next(each for each in found if each.fits or each.enough).what == "experts over 2 of the ranks there are"
    assert not any(each.fits or each.enough for each in remedies(MIXTRAL, Setup(), GIB // 100))


def test_nothing_is_proposed_for_what_fits():
    assert make_plan(MIXTRAL, Setup(), limit=200 * GIB).remedies == ()
    assert make_plan(MIXTRAL, Setup()).remedies == ()


# ---------------------------------------------------------------------------------------------- advice


def answers(model, setup, machine=None, limit_gib=None, target_s=None):
    limit = None if limit_gib is None else round(limit_gib * GIB)
    made = make_plan(model, setup, machine, limit, target_s)
    return {each.question: each for each in made.advice}


def test_every_question_is_answered_with_numbers_and_a_source():
    found = answers(V3, Setup(mesh=Mesh(expert=32), context=32768), limit_gib=80, target_s=0.05)
    assert list(found) == [DENSE, TOP, SPREAD, ATTENTION, TIME]
    for each in found.values():
        assert each.numbers
        assert each.source
        json.dumps(each.fields())


def test_every_rule_can_speak():
    """Each rule is reached by one of these setups: none is dead."""
    slow = Machine(link=Cost(1e-5, 1e9))
    tiny = replace(
        MIXTRAL, vocab=1000, dim=256, layers=4, moe_layers=(0, 1, 2, 3), routed=replace(MIXTRAL.routed, hidden_dim=256)
    )
    top1 = KNOWN["llama-4-scout"].model
    train = Setup(work=Training(), batch=64, context=4096)
    cases = [
        (DENSE_8B, train, None, None, None),
        (DENSE_8B, Setup(), None, 80, 1.0),
        (MIXTRAL, Setup(), None, 80, 1e-6),
        (tiny, train, None, 80, None),
        (MIXTRAL, train, None, None, None),
        (V3, Setup(), None, None, None),
        (V3, Setup(batch=512), None, None, None),
        (V3, Setup(batch=4096), None, None, None),
        (MIXTRAL, replace(train, mesh=Mesh(expert=8)), slow, None, None),
        (MIXTRAL, replace(train, batch=1, context=64), None, None, None),
        (top1, Setup(), None, 400, None),
        (MIXTRAL, Setup(batch=64, context=32768), None, 80, None),
        (MIXTRAL, Setup(context=131072), None, 100, None),
    ]
    spoken = set()
    for model, setup, machine, limit, target in cases:
        spoken |= {(each.question, each.answer) for each in answers(model, setup, machine, limit, target).values()}
    assert {(rule.question, rule.says) for rule in RULES} == spoken


def test_memory_goes_with_the_total():
    said = answers(MIXTRAL, Setup(), limit_gib=80)[DENSE]
    assert said.answer.startswith("Memory decides")
    assert said.numbers["all weights [GiB]"] == pytest.approx(87.0, abs=0.05)
    assert said.numbers["weights of a dense model with as many active parameters [GiB]"] == pytest.approx(
        24.0, abs=0.05
    )


def test_expert_parallelism_is_for_what_does_not_fit():
    assert answers(MIXTRAL, Setup(), limit_gib=141)[SPREAD].answer.startswith("No")
    said = answers(MIXTRAL, Setup(), limit_gib=80)[SPREAD]
    assert said.answer.startswith("Yes")
    assert said.numbers["ranks to share the experts, at least"] == 2


def test_long_context_alone_is_no_reason_for_a_mixture_of_heads():
    said = answers(DENSE_8B, Setup(context=131072))[ATTENTION]
    assert "caches no less" in said.answer or "long context alone is no reason" in said.answer
    assert answers(DENSE_8B, Setup(context=2048))[ATTENTION].answer.startswith("Leave attention dense")


def test_a_target_is_held_against_arithmetic():
    said = answers(V3, Setup(mesh=Mesh(expert=32)), target_s=1.0)[TIME]
    assert said.answer.startswith("Not ruled out")
    assert said.numbers["a step at the least [ms]"] < 1000
    assert answers(V3, Setup(mesh=Mesh(expert=32)), target_s=1e-4)[TIME].answer.startswith("No:")


# ---------------------------------------------------------------------------------------------- rules of thumb


def test_rules_of_thumb_for_mixtral():
    found = rules_of_thumb(Facts(MIXTRAL, Setup(mesh=Mesh(expert=8), batch=128), Machine()))
    by_rule = {each.rule.split(" ")[0]: each for each in found}
    whole = by_rule["E"]  # a Mixtral with one expert is a Mistral 7B of 7.24 B, with a router: 46.7 is 6.45 of them
    assert whole.computed == "46.7 B"
    assert "6.45 times" in whole.verdict
    assert by_rule["about"].computed == "27.6 %"
    assert by_rule["memory"].computed == "87.0 GiB"
    assert float(by_rule["expert"].computed.split()[0]) < 0.3  # ms per layer, said to be 10 to 300
    sizes = {name: rules_of_thumb(Facts(KNOWN[name].model, Setup(), Machine()))[4].claimed for name in KNOWN}
    assert (sizes["olmoe-1b-7b"], sizes["mixtral-8x7b"], sizes["deepseek-v3"]) == ("dense", "neither", "MoE")


def test_a_dense_model_has_none():
    assert rules_of_thumb(Facts(DENSE_8B, Setup(), Machine())) == []


# ---------------------------------------------------------------------------------------------- shown


def shown(made):
    console = Console(width=400, record=True, file=StringIO())
    for table in made:
        console.print(table)
    return console.export_text()


def test_tables_have_what_the_plan_has():
    made = make_plan(V3, Setup(mesh=Mesh(expert=16), context=32768), limit=80 * GIB, target_s=0.05)
    text = shown(tables(made))
    for words in ("671,026,419,200", "KV cache", "too much", "twice the ranks: 32", "dispatch", "arXiv 2412.19437"):
        assert words in text
    assert "fits, " in shown(tables(make_plan(MIXTRAL, Setup(), limit=100 * GIB)))
    assert "kimi-k2" in shown([known_table()])


def test_plans_are_json():
    for setup in (Setup(mesh=Mesh(expert=4)), TRAIN, Setup(work=Serving(cache="fp8"))):
        fields = json.loads(json.dumps(make_plan(MIXTRAL, setup, limit=GIB, target_s=0.1).fields()))
        assert fields["memory"]["total"] == sum(fields["memory"]["parts"].values())
        assert fields["fits"] is False
        assert fields["limit"] == GIB


def test_the_picture_is_a_png():
    assert picture(make_plan(MIXTRAL, TRAIN, limit=80 * GIB)).startswith(b"\x89PNG")
    assert picture(make_plan(DENSE_8B, Setup())).startswith(b"\x89PNG")


@pytest.mark.parametrize("seed", range(30))
def test_any_setup_can_be_planned(seed):
    """Dice: whatever the records accept has a plan, in bytes and seconds of at least 0, as tables and as JSON."""
    dice = random.Random(seed)
    model = KNOWN[dice.choice(sorted(KNOWN))].model
    expert = dice.choice([n for n in (1, 2, 4, 8, 16) if model.routed.num % n == 0])
    mesh = Mesh(expert=expert, data=dice.choice((1, 2, 3)), shard=dice.choice(("none", "dense", "optimizer", "all")))
    modes = ("lean", "naive", "checkpoint-experts", "checkpoint-layers")
    training = Training(activations=dice.choice(modes), micro_batches=dice.choice((1, 4)))
    serving = Serving(cache=dice.choice(("bf16", "fp8")), step_tokens=dice.choice((1, 100, 5000)))
    trains = dice.random() < 0.5
    setup = Setup(
        mesh=mesh,
        work=training if trains else serving,
        batch=dice.choice((1, 3, 64)),
        context=dice.choice((1, 100, 8192)),
        precision=dice.choice(("fp32", "bf16") if trains else ("bf16", "fp8", "int4")),
        imbalance=dice.choice((None, 0.0, 0.7)),
        device=dice.choice(("gpu", "cpu")),
    )
    made = make_plan(model, setup, limit=10 ** dice.randint(8, 12), target_s=10.0 ** dice.randint(-6, 1))
    assert all(size >= 0 for size in made.memory.parts.values())
    assert 0 <= made.communication.step_share < 1
    assert made.communication.work_s > 0
    assert [each.fits for each in made.remedies] == [each.memory.total <= made.limit for each in made.remedies]
    assert json.loads(json.dumps(made.fields()))["fits"] is made.fits
    assert shown(tables(made))


@pytest.mark.parametrize("more", [{"limit": 0}, {"limit": -5}, {"target_s": 0.0}, {"target_s": float("nan")}])
def test_limits_must_be_above_0(more):
    with pytest.raises(ValueError, match="expected more than 0"):
        make_plan(MIXTRAL, Setup(), **more)
