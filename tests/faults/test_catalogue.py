"""The table of faults, and faults as JSON: all that is written is read again, and nothing else is."""

import json
import math
import typing
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import equipoise.faults
from equipoise.faults import (
    FAULTS,
    BiasRunaway,
    CheckpointDamage,
    Collapse,
    DeadExpert,
    Drift,
    Fault,
    LogitBlowUp,
    NaNExpert,
    RouterCorruption,
    SkewedInput,
    SlowExpert,
    SlowRank,
    StaleCounters,
    from_json,
    to_json,
)
from equipoise.faults.catalogue import name_of, sentence, summary

# ------------------------------------------------------------------------------------------------ all faults

text = st.text(max_size=20)
index = st.integers(-(2**63), 2**63 - 1)
seed = st.integers(0, 2**63 - 1)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
several = st.lists(st.integers(0, 99), max_size=4, unique=True).map(tuple)
apart = st.tuples(st.integers(100, 200), several)  # an expert, and others
names = st.just("") | st.integers(0, 10**9).map(lambda step: f"step-{step:06d}") | st.just("step-000200-r2")
seconds = st.floats(min_value=0, max_value=60, exclude_min=True)

ANY = {
    "collapse": st.builds(
        lambda layer, experts, by: Collapse(layer, experts[0], by, experts[1]), text, apart, positive
    ),
    "drift": st.builds(
        lambda layer, experts, by, steps: Drift(layer, experts[0], by, steps, experts[1]),
        text,
        apart,
        positive,
        st.integers(1, 2**63 - 1),
    ),
    "dead-expert": st.builds(DeadExpert, text, index, positive),
    "logit-blow-up": st.builds(LogitBlowUp, text, positive),
    "router-corruption": st.builds(RouterCorruption, text, positive, seed),
    "bias-runaway": st.builds(BiasRunaway, text, index, positive),
    "nan-expert": st.builds(NaNExpert, text, index, seed),
    "slow-expert": st.builds(SlowExpert, text, index, seconds),
    "slow-rank": st.builds(SlowRank, seconds),
    "stale-counters": st.builds(StaleCounters, st.sampled_from(["stale", "reset"])),
    "skewed-input": st.builds(SkewedInput, index, st.floats(min_value=0, max_value=1, exclude_min=True), seed),
    "checkpoint-damage": st.builds(
        CheckpointDamage, st.sampled_from(["flip", "truncate", "missing", "wrong_size"]), seed, names
    ),
}
LEAST = {  # what each needs
    "collapse": {"layer": "a", "expert": 1},
    "drift": {"layer": "a", "expert": 1},
    "dead-expert": {"layer": "a", "expert": 1},
    "logit-blow-up": {"layer": "a"},
    "router-corruption": {"layer": "a"},
    "bias-runaway": {"layer": "a", "expert": 1},
    "nan-expert": {"layer": "a", "expert": 1},
    "slow-expert": {"layer": "a", "expert": 1, "seconds": 0.5},
    "slow-rank": {"seconds": 0.5},
    "stale-counters": {},
    "skewed-input": {"domain": 3},
    "checkpoint-damage": {},
}
PLACES = [(name, field.name) for name, kind in FAULTS.items() for field in fields(kind)]


def least(name, **changed):
    return {"fault": name, **LEAST[name], **changed}


def message(record):
    """Why it is refused; another error than ValueError is nobody's to catch."""
    with pytest.raises(ValueError, match=r".") as caught:
        from_json(record)
    return str(caught.value)


def outcome(record):
    """The fault, or why there is none."""
    try:
        return from_json(record)
    except ValueError as error:
        return str(error)


# ------------------------------------------------------------------------------------------------ the table


def test_the_table_is_all_there_is():
    assert list(FAULTS) == list(ANY) == list(LEAST)
    assert set(FAULTS.values()) == set(typing.get_args(Fault))
    exported = {name for name in equipoise.faults.__all__ if is_dataclass(getattr(equipoise.faults, name))}
    assert {kind.__name__ for kind in FAULTS.values()} == exported - {"Change"}
    with pytest.raises(TypeError):
        FAULTS["meteor"] = Collapse


@pytest.mark.parametrize("name", FAULTS)
def test_every_name_is_its_class_in_plain_words(name):
    kind = FAULTS[name]
    assert name.replace("-", "") == kind.__name__.lower()
    assert name_of(kind(**LEAST[name])) == name


@pytest.mark.parametrize("name", FAULTS)
def test_every_summary_is_one_sentence_on_one_line(name):
    line = summary(name)
    assert 20 < len(line) <= 110
    assert line.endswith(".")
    assert "\n" not in line
    assert line == (FAULTS[name].__doc__ or "").splitlines()[0]


@pytest.mark.parametrize("name", FAULTS)
def test_every_docstring_says_what_it_imitates_and_how_it_is_taken_out(name):
    told = " ".join((FAULTS[name].__doc__ or "").split())
    assert "Imitates " in told
    assert "Taken out" in told or name == "skewed-input"  # a batch is past when it is past


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_mentioned_in_the_tests_of_this_folder(name):
    others = [path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
    assert any(FAULTS[name].__name__ in path.read_text() for path in others)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_frozen_and_hashable(name):
    fault = FAULTS[name](**LEAST[name])
    assert {fault: 1}[FAULTS[name](**LEAST[name])] == 1
    with pytest.raises(FrozenInstanceError):
        setattr(fault, fields(fault)[0].name, 0)


def test_a_sentence_says_what_is_set():
    assert sentence(Collapse("a.b", 5)) == "collapse (layer 'a.b', expert 5, intensity 10.0)"
    assert sentence(Collapse("a", 5, 2.0, also=(1,))) == "collapse (layer 'a', expert 5, intensity 2.0, also (1,))"
    assert sentence(CheckpointDamage()) == "checkpoint-damage (kind 'flip', seed 0)"


# ------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_written_is_read_again(name):
    @given(fault=ANY[name])
    def check(fault):
        record = json.loads(json.dumps(to_json(fault), allow_nan=False))
        assert record["fault"] == name
        assert set(record) == {"fault", *(field.name for field in fields(fault))}
        again = from_json(record)
        assert type(again) is type(fault)
        assert again == fault
        assert hash(again) == hash(fault)

    check()


@pytest.mark.parametrize("name", FAULTS)
def test_defaults_may_be_left_out_and_nothing_else(name):
    assert from_json(least(name)) == FAULTS[name](**LEAST[name])
    for field in LEAST[name]:
        record = least(name)
        del record[field]
        assert message(record).startswith(f"{name}: {field} is missing; it has ")


def test_whole_numbers_may_stand_for_numbers():
    fault = from_json(least("collapse", intensity=4))
    assert fault == Collapse("a", 1, 4.0)
    assert isinstance(fault.intensity, float)


# ------------------------------------------------------------------------------------------------ hostile records


@pytest.mark.parametrize("record", [None, 3, "collapse", [], [{"fault": "collapse"}], True, math.nan])
def test_what_is_no_object(record):
    assert message(record).startswith('fault: expected an object such as {"fault": "collapse", ...}, got')


@pytest.mark.parametrize(
    "name",
    ["meteor", "", "Collapse", "collapse ", "../collapse", "__class__", None, 3, [], {}, ["collapse"], "x" * 10**6],
)
def test_an_unknown_name(name):
    told = message({"fault": name, "layer": "a", "expert": 1})
    assert told.startswith("fault: expected one of collapse, drift, ")
    assert len(told) < 400


def test_no_name_at_all():
    assert message({}).startswith("fault: expected one of collapse")
    assert message({"layer": "a"}).endswith("got None")


@pytest.mark.parametrize("field", ["code", "__class__", "put_in", "Layer", "", "x" * 10**6, "\n\x1b[31m", "\u202e"])
@pytest.mark.parametrize("name", FAULTS)
def test_an_unknown_field(name, field):
    told = message(least(name, **{field: 1}))
    assert told.startswith(f"{name}: unknown field ")
    assert told.isascii()
    assert told.isprintable()
    assert len(told) < 300


WRONG = [
    None, True, [], {}, [1.5], ["1"], [True], [None], [[1]], math.nan, math.inf, -math.inf, 10**400, -(10**400),
    10**5000, 2**63, [2**63], [10**5000], {"fault": "collapse"}, b"x", (), object(),
]  # fmt: skip


def takes(hint, value):
    """Of what is in WRONG, what a field of that type takes as it is: an empty list for a tuple, large numbers."""
    return (hint not in (str, int, float) and value == []) or (hint is float and value in (2**63,))


@pytest.mark.parametrize(("name", "field"), PLACES)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(name, field):
    hint = typing.get_type_hints(FAULTS[name])[field]
    for value in WRONG:
        if takes(hint, value):
            continue
        told = message(least(name, **{field: value}))
        assert told.startswith((f"{name}.{field}: expected ", f"{FAULTS[name].__name__}.{field}: expected ")), told
        assert len(told) < 300
        assert told.isprintable()


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, field in PLACES if field in ("layer", "mode", "kind", "checkpoint")]
)
def test_numbers_are_no_text(name, field):
    for value in (0, 1.5):
        assert message(least(name, **{field: value})).startswith(f"{name}.{field}: expected ")


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (least("collapse", intensity=0), "Collapse.intensity: expected a number of more than 0, got 0"),
        (least("collapse", also=[1]), "Collapse.also: expected other experts than 1, each once, got (1,)"),
        (least("drift", steps=0), "Drift.steps: expected at least 1, got 0"),
        (least("slow-rank", seconds=1e9), "SlowRank.seconds: expected a number of more than 0 and at most 60"),
        (least("skewed-input", intensity=1.5), "SkewedInput.intensity: expected a share in (0, 1], got 1.5"),
        (least("nan-expert", seed=-1), "NaNExpert.seed: expected a whole number from 0 to 2^63 - 1, got -1"),
        (least("stale-counters", mode="lost"), "stale-counters.mode: expected one of stale, reset, got 'lost'"),
        (least("checkpoint-damage", kind="burn"), "checkpoint-damage.kind: expected one of flip, truncate, missing"),
        (least("checkpoint-damage", checkpoint="../x"), "CheckpointDamage.checkpoint: expected a name such as step-"),
        (least("checkpoint-damage", checkpoint="step-000001/../x"), "CheckpointDamage.checkpoint: expected a name"),
        (least("checkpoint-damage", checkpoint="step-" + "1" * 5000), "CheckpointDamage.checkpoint: expected a name"),
        (
            least("checkpoint-damage", checkpoint="step-\u0660\u0660\u0660\u0660\u0660\u0661"),
            "CheckpointDamage.checkpoint: expected a name",
        ),
        (least("checkpoint-damage", checkpoint="step-000001\n"), "CheckpointDamage.checkpoint: expected a name"),
    ],
)
def test_a_value_out_of_range(record, told):
    assert message(record).startswith(told)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [3, 900, 100_000])
def test_what_is_nested_too_deep_is_refused_as_well(depth):
    assert message(least("collapse", expert=nested(depth))).startswith("collapse.expert: expected a whole number, got")
    assert message({"fault": nested(depth)}).startswith("fault: expected one of")
    assert message(nested(depth)).startswith("fault: expected an object")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", FAULTS)
def test_any_record_is_a_fault_that_can_be_written_again_or_a_value_error(name):
    @given(
        record=st.dictionaries(st.sampled_from([field.name for field in fields(FAULTS[name])]) | text, json_values),
        drop=st.booleans(),
    )
    def check(record, drop):
        made = outcome({"fault": name, **({} if drop else LEAST[name]), **record})
        if isinstance(made, str):
            assert 0 < len(made) < 500
        else:
            assert from_json(to_json(made)) == made
            assert name in sentence(made)

    check()
