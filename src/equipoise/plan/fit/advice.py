"""Advice as rules: what was asked, when a rule speaks, what it says, the numbers that decided, and where it is from.

For each question the first rule whose condition holds gives the answer. Where a popular rule of thumb says otherwise,
`folklore.py` has what it comes to for this model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import log, sqrt
from typing import Any

from equipoise.plan.fit.facts import Facts
from equipoise.plan.fit.memory import GIB

Numbers = dict[str, float | int | str]

FEW_TOKENS = 64  # per expert and step; chance alone then makes MaxVio a third and more
MUCH_EXCHANGE = 0.2  # of a step; above it top-1 beside a shared expert beat top-2 (arXiv 2404.05019)
MUCH_CACHE = 0.3
MUCH_SCORES = 0.3
MUCH_MET = 0.5  # of the experts


@dataclass(frozen=True)
class Rule:
    """question: what it answers. when: whether it speaks. says: the answer. numbers: by name. source: of the rule."""

    question: str
    when: Callable[[Facts], bool]
    says: str
    numbers: Callable[[Facts], Numbers]
    source: str


@dataclass(frozen=True)
class Advice:
    """An answer, and what it rests on."""

    question: str
    answer: str
    numbers: Numbers
    source: str

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def advise(facts: Facts) -> list[Advice]:
    """An answer to each question that the facts allow, in the order of the rules."""
    found: dict[str, Advice] = {}
    for rule in RULES:
        if rule.question not in found and rule.when(facts):
            found[rule.question] = Advice(rule.question, rule.says, rule.numbers(facts), rule.source)
    return list(found.values())


# ---------------------------------------------------------------------------------------------- conditions


def _moe(facts: Facts) -> bool:
    return facts.model.routed is not None


def _too_large(facts: Facts) -> bool:
    return facts.limit is not None and facts.memory.total > facts.limit


def _dense_would_fit(facts: Facts) -> bool:
    if not (_moe(facts) and _too_large(facts)) or facts.limit is None:
        return False
    rest = facts.memory.total - facts.memory.parts["dense weights"] - facts.memory.parts["expert weights"]
    return not facts.trains and facts.active_gib * GIB + rest <= facts.limit


def _few_tokens(facts: Facts) -> bool:
    return _moe(facts) and facts.tokens_per_expert < FEW_TOKENS


def _spread(facts: Facts) -> bool:
    return facts.setup.mesh.expert > 1


def _fits_alone(facts: Facts) -> bool:
    return facts.limit is not None and facts.alone.total <= facts.limit


# ---------------------------------------------------------------------------------------------- numbers


def _weights(facts: Facts) -> Numbers:
    return {
        "all weights [GiB]": facts.weights_gib,
        "weights of a dense model with as many active parameters [GiB]": facts.active_gib,
        "active [%]": 100 * facts.counts.active_share,
    }


def _reading(facts: Facts) -> Numbers:
    return {
        "tokens per step": facts.tokens,
        "experts that they meet [%]": 100 * facts.met,
        "read per rank and step [GiB]": facts.read_gib,
        "all weights [GiB]": facts.weights_gib,
        "active weights [GiB]": facts.active_gib,
    }


def _size(facts: Facts) -> Numbers:
    return {"total [B]": facts.counts.total / 1e9, "active [B]": facts.counts.active / 1e9}


def _shares(facts: Facts) -> Numbers:
    assert facts.model.routed is not None
    found = facts.communication
    return {
        "exchanges, of a step that hides none [%]": 100 * found.step_share,
        "exchange over the experts' products": found.ratio,
        "k": facts.model.routed.k,
        "hidden dim of an expert": facts.model.routed.hidden_dim,
    }


def _load(facts: Facts) -> Numbers:
    assert facts.model.routed is not None
    floor = sqrt(2 * log(facts.model.routed.num) / facts.tokens_per_expert)
    return {
        "tokens per expert and step": facts.tokens_per_expert,
        "MaxVio by chance, median": floor,
        "MaxVio by chance, 99 %": facts.chance,
    }


def _room(facts: Facts) -> Numbers:
    found: Numbers = {"a rank with all experts [GiB]": facts.alone.total / GIB}
    if facts.limit is not None:
        found["a rank has [GiB]"] = facts.limit / GIB
        found["ranks to share the experts, at least"] = facts.fewest_ranks or "more than there are experts"
    return found


def _exchange(facts: Facts) -> Numbers:
    found = facts.communication
    return {
        "per MoE layer, there and back [ms]": 1e3 * found.layer_s,
        "per step [ms]": 1e3 * found.step_s,
        "of a step that hides none [%]": 100 * found.step_share,
    }


def _attention(facts: Facts) -> Numbers:
    return {
        "context": facts.setup.context,
        "KV cache, of the rank's memory [%]": 100 * facts.cache_share,
        "query heads per cached one": facts.heads_per_cached,
        "scores, of all operations [%]": 100 * facts.score_share,
        "attention, of all operations [%]": 100 * facts.attention_share,
    }


def _latency(facts: Facts) -> Numbers:
    assert facts.target_s is not None
    return {
        "target [ms]": 1e3 * facts.target_s,
        "a step at the least [ms]": 1e3 * facts.step_s,
        "of it exchanges [ms]": 1e3 * facts.communication.step_s,
    }


# ---------------------------------------------------------------------------------------------- rules

DENSE, TOP, SPREAD, ATTENTION, TIME = (
    "dense or MoE?",
    "top-1, top-2 or many small experts?",
    "expert parallelism?",
    "what kind of attention?",
    "is it fast enough?",
)

RULES: tuple[Rule, ...] = (
    Rule(
        DENSE,
        lambda facts: not _moe(facts) and facts.trains,
        "It is dense. Experts would lower the loss for the same operations per token, and cost memory for all of them: "
        "take them where operations are what you lack, and memory is not.",
        _size,
        "arXiv 2409.02060 (OLMoE: dense and MoE on the same data); arXiv 2201.05596 (DeepSpeed-MoE)",
    ),
    Rule(
        DENSE,
        lambda facts: not _moe(facts),
        "It is dense: every token uses all weights, so that memory and operations go together.",
        _size,
        "arithmetic",
    ),
    Rule(
        DENSE,
        _dense_would_fit,
        "Memory decides. A dense model with as many active parameters would fit, with the quality of that size; this "
        "MoE needs room for all of its parameters, see what would make it fit.",
        _weights,
        "arithmetic: memory goes with the total, operations with the active parameters",
    ),
    Rule(
        DENSE,
        lambda facts: facts.trains and facts.counts.total < 1e9,
        "Measure both on your machine. Below 1 B parameters MoE has shown gains per operation too; whether it gains "
        "per second depends on how well small products run.",
        _size,
        "arXiv 2101.03961 (Switch-Base), arXiv 2409.02060; the threshold of 1 B has no source",
    ),
    Rule(
        DENSE,
        lambda facts: facts.trains,
        "MoE, where operations are what you lack: a step costs as much as one of a dense model with the active "
        "parameters, and reached the same quality about twice as fast (1.3 B active of 6.9 B). Memory is the total's.",
        _weights,
        "arXiv 2409.02060, section 4.1.1; arXiv 2101.03961",
    ),
    Rule(
        DENSE,
        lambda facts: facts.met < MUCH_MET,
        "MoE: so few tokens meet few experts, and a step reads little more than a dense model of the active size does. "
        "It is larger batches, not small ones, that read weights of a dense model of the total size.",
        _reading,
        "arithmetic: E (1 - (1 - k/E)^T) experts are met",
    ),
    Rule(
        DENSE,
        lambda facts: facts.tokens_per_expert < FEW_TOKENS,
        "The hard spot of MoE: a step reads most of the experts for few tokens each. Put more sequences together, over "
        "more ranks if need be; a dense model of the active size would read less.",
        lambda facts: _reading(facts) | {"tokens per expert and step": facts.tokens_per_expert},
        "arithmetic: E (1 - (1 - k/E)^T) experts are met",
    ),
    Rule(
        DENSE,
        lambda _: True,
        "MoE: enough tokens per expert for its weights to be read once for many, and fewer operations per token than "
        "any dense model of that total.",
        lambda facts: _reading(facts) | {"tokens per expert and step": facts.tokens_per_expert},
        "arithmetic",
    ),
    Rule(
        TOP,
        lambda facts: _moe(facts) and _spread(facts) and facts.communication.step_share > MUCH_EXCHANGE,
        "Exchanges are much of the step. Fewer experts per token send less; so does top-1 beside a shared expert with "
        "a shortcut, which hides the exchange. Wider experts lower exchange per operation, k does not.",
        _shares,
        "arXiv 2404.05019 (ScMoE, better than top-1 from 20 % on); ratio = P F / (6 m B) (1 - 1/R)",
    ),
    Rule(
        TOP,
        lambda facts: facts.trains and _few_tokens(facts),
        "Few tokens per expert: chance alone makes the load uneven. Take fewer experts or more tokens per step, and "
        "don't raise alarms at what chance explains.",
        _load,
        "sqrt(2 ln E / tokens per expert), docs/routing.md",
    ),
    Rule(
        TOP,
        lambda facts: facts.model.routed is not None and facts.model.routed.k == 1,
        "Top-1 works with weights that are not renormalised (else the router gets no gradient from the task). Where "
        "exchanges allow, two and more smaller experts per token were better at the same operations.",
        _shares,
        "arXiv 2101.03961; arXiv 2401.06066 (DeepSeekMoE), arXiv 2409.02060, section 4.1.2",
    ),
    Rule(
        TOP,
        _moe,
        "Several small experts per token rather than one or two large ones: better at the same operations, with "
        "diminishing returns (64 over 32 over 8). A shared expert brought no gain in the same study.",
        _shares,
        "arXiv 2409.02060, sections 4.1.2 and 4.1.3; arXiv 2401.06066",
    ),
    Rule(
        SPREAD,
        lambda facts: _moe(facts) and _fits_alone(facts) and not facts.trains,
        "No: a rank has room for all experts. Copies side by side send nothing; share experts only for larger batches "
        "per expert.",
        _room,
        "arithmetic",
    ),
    Rule(
        SPREAD,
        lambda facts: _moe(facts) and _fits_alone(facts),
        "Not needed for memory: a rank has room for all experts and their optimizer state. Data parallelism sends "
        "gradients once per step, expert parallelism tokens four times per layer.",
        _room,
        "arithmetic",
    ),
    Rule(
        SPREAD,
        lambda facts: _moe(facts) and facts.limit is not None,
        "Yes: a rank has no room for all experts.",
        lambda facts: _room(facts) | (_exchange(facts) if _spread(facts) else {}),
        "arithmetic; DeepSeek-V3 trains over 400 Gb/s links (arXiv 2412.19437): NVLink is no condition",
    ),
    Rule(
        SPREAD,
        lambda facts: _moe(facts) and _spread(facts),
        "As asked for. Without a memory limit the numbers below are all there is to say.",
        _exchange,
        "arithmetic",
    ),
    Rule(
        ATTENTION,
        lambda facts: facts.cache_share > MUCH_CACHE,
        "The cache is much of the memory: fewer key/value heads, latent attention or windows, or a cache in fp8. A "
        "mixture of attention heads shares keys and values as GQA does, and caches no less than it.",
        _attention,
        "arXiv 2405.04434 (latent attention, 93 % less cache); arXiv 2210.05144 (MoA)",
    ),
    Rule(
        ATTENTION,
        lambda facts: facts.score_share > MUCH_SCORES,
        "Scores over the context are much of the work: windows or sparse attention lower it. A mixture of heads lowers "
        "it by the share of heads that is left out, and stays quadratic: long context alone is no reason for it.",
        _attention,
        "arXiv 2210.05144 (MoA), arXiv 2410.11842 (MoH: 50-90 % of the heads), arXiv 2312.07987 (SwitchHead)",
    ),
    Rule(
        ATTENTION,
        lambda _: True,
        "Leave attention dense: neither its cache nor its scores are what this setup is made of. A mixture of heads "
        "could save at most attention's share of the operations.",
        _attention,
        "arithmetic; arXiv 2410.11842 (MoH)",
    ),
    Rule(
        TIME,
        lambda facts: facts.target_s is not None and facts.step_s <= facts.target_s,
        "Not ruled out: products, reading of memory and exchanges take less than the target. Queues, sampling and "
        "kernels that are not perfect come on top; `equipoise simulate` has queues.",
        _latency,
        "arithmetic",
    ),
    Rule(
        TIME,
        lambda facts: facts.target_s is not None,
        "No: arithmetic alone takes longer than the target. Spread over more ranks, lower precision, or fewer active "
        "parameters; the numbers say whether exchanges are the reason.",
        _latency,
        "arithmetic",
    ),
)
