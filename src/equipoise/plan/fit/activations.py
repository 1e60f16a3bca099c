"""What a layer keeps for its backward pass, and what it needs while it computes, in bytes.

Counted operator by operator for equipoise's own decoder (`models/block.py`, `ops/lean_experts.py`), and measured in
`benchmarks/plan_memory.py`. Other attention and experts are counted the same way.
T tokens, D dim, Q and V width of all query heads and of their values, K experts per token, F hidden dim of an expert.
c is the bytes of an element: 4 in fp32, else 2. Norms and routers compute in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.plan.fit.architecture import Architecture, GroupedQuery
from equipoise.plan.fit.communication import destinations
from equipoise.plan.fit.imbalance import max_vio
from equipoise.plan.fit.setup import Kept, Setup

WIDE = 4  # bytes, fp32
INDEX = 8  # bytes, int64
CHUNK = 2**25  # logits in one piece; more go through the loss in pieces (`models/decoder.py`)


@dataclass(frozen=True)
class Sizes:
    """Bytes. fixed: the same on every rank. rows: those that grow with the load of the rank's experts."""

    fixed: int = 0
    rows: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.fixed + self.rows

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(self.fixed + other.fixed, self.rows + other.rows)

    def times(self, number: int) -> Sizes:
        """So many of them."""
        return Sizes(self.fixed * number, self.rows * number)


def norm(width: int, tokens: int, setup: Setup) -> int:
    """Kept by an RMS norm beside its output: fused, its input; unfused, an fp32 copy of it and what is normalised."""
    if setup.device == "cpu":
        return tokens * (2 * WIDE * width + WIDE)
    return tokens * (setup.small_bytes * width + WIDE)


def attention_kept(model: Architecture, setup: Setup) -> int:
    """The norm before it and its output, which the projections keep; queries, keys, values, output, log-sums."""
    c, tokens, attention = setup.small_bytes, setup.together, model.attention
    kept = norm(model.dim, tokens, setup) + c * tokens * model.dim
    if isinstance(attention, GroupedQuery):
        q, kv = attention.query_dim, attention.kv_heads * attention.head_dim
        kept += tokens * (c * (2 * q + 2 * kv) + WIDE * attention.heads)
        if attention.norm != "none":  # and the output once more, in another order
            scales = attention.heads + attention.kv_heads if attention.norm == "head" else 2
            kept += norm(q + kv, tokens, setup) + WIDE * tokens * (scales - 1) + c * tokens * q
        return kept
    q, out = attention.query_dim, attention.heads * attention.value_dim
    bottlenecks = attention.q_rank + attention.cached
    kept += tokens * (c * (2 * q + 2 * out + bottlenecks) + WIDE * attention.heads)
    return kept + norm(attention.q_rank + attention.kv_rank, tokens, setup)


def feed_forward_kept(model: Architecture, hidden_dim: int, tokens: int, c: int) -> int:
    """Pre-activation, gate and activation, as autograd keeps them; the input is its norm's output."""
    return c * tokens * hidden_dim * (4 if model.gated else 2)


def router_kept(num: int, k: int, tokens: int) -> int:
    """Logits, probabilities, the choices with their weights, and the order of the rows."""
    return tokens * (2 * WIDE * num + k * (4 * INDEX + 2 * WIDE))


def moe_kept(model: Architecture, setup: Setup, mode: Kept) -> Sizes:
    """Of an MoE layer, without the norm before it."""
    assert model.routed is not None
    routed, c, tokens = model.routed, setup.small_bytes, setup.together
    if mode == "checkpoint-experts":
        return Sizes()
    rows = tokens * routed.k
    inner = c * rows * routed.hidden_dim * (model.matrices - 1)  # the pre-activation
    if mode == "naive":  # gathered rows with their tokens; the gate, the activation, and that times its weight
        inner += rows * (INDEX + c * (model.dim + routed.hidden_dim * model.matrices))
    fixed = router_kept(routed.num, routed.k, tokens)
    if routed.shared_dim:
        fixed += feed_forward_kept(model, routed.shared_dim, tokens, c)
    return Sizes(fixed, inner + _received(model, setup))


def _received(model: Architecture, setup: Setup) -> int:
    """Rows of other ranks' tokens, which the experts here read and keep."""
    assert model.routed is not None
    if setup.mesh.expert == 1:
        return 0
    copies = destinations(setup.mesh.expert, model.routed, remote=True)
    return round(setup.small_bytes * setup.together * copies * model.dim)


def layer_kept(model: Architecture, layer: int, setup: Setup, mode: Kept) -> Sizes:
    """All that one layer keeps."""
    c, tokens = setup.small_bytes, setup.together
    if mode == "checkpoint-layers":
        return Sizes(c * tokens * model.dim)
    before = norm(model.dim, tokens, setup) + c * tokens * model.dim
    fixed = Sizes(attention_kept(model, setup) + before)
    if layer in model.moe_layers:
        return fixed + moe_kept(model, setup, mode)
    return fixed + Sizes(feed_forward_kept(model, model.hidden_dim, tokens, c))


def backward_temporaries(model: Architecture, layer: int, setup: Setup, mode: Kept) -> Sizes:
    """At the fullest moment of a layer's backward, in its feed-forward part, beside what is kept.

    Lean experts: the gradients of the rows, and what the busiest expert computes with, or their sum. Naive ones: of the
    rows and of the activation. Dense: of gate and activation, while both are still there. And the gradient that comes
    down the residual stream.
    """
    c, tokens = setup.small_bytes, setup.together
    stream = c * tokens * model.dim
    if layer not in model.moe_layers:
        return Sizes(stream + c * tokens * model.hidden_dim * 2)
    assert model.routed is not None
    rows = tokens * model.routed.k
    inner, hidden_dim = c * rows * model.dim, model.routed.hidden_dim
    if mode == "naive":
        return Sizes(2 * stream, inner + c * rows * 2 * hidden_dim)
    one = c * busiest_expert(model, setup) * (2 * model.dim + (2 * model.matrices - 1) * hidden_dim)
    return Sizes(stream, inner + max(one, stream))


def busiest_expert(model: Architecture, setup: Setup) -> int:
    """Rows of the busiest expert of a rank; lean experts are computed one after another."""
    assert model.routed is not None
    here = max(model.routed.num // setup.mesh.expert, 1)
    rows = setup.together * model.routed.k
    return min(round(rows / here * (1 + max_vio(rows, here, None))), rows)


def head_kept(model: Architecture, setup: Setup) -> int:
    """The last norm, and what the loss keeps."""
    tokens, c = setup.together, setup.small_bytes
    before = norm(model.dim, tokens, setup) + c * tokens * model.dim
    return before + INDEX * tokens


def logits_in_training(model: Architecture, setup: Setup) -> int:
    """At the fullest moment: log-probabilities, their gradient and the logits' gradient in fp32; in pieces if many.

    In pieces, the logits, the gradients of all pieces but one, and that one three times in fp32.
    """
    tokens, vocab, c = setup.together, model.vocab, setup.small_bytes
    if tokens * vocab <= CHUNK:
        return 3 * WIDE * tokens * vocab
    piece = max(1, CHUNK // vocab) * vocab
    return c * (2 * tokens * vocab - piece) + 3 * WIDE * piece


def serving_temporaries(model: Architecture, setup: Setup) -> Sizes:
    """At the fullest moment of a forward without gradients, in attention or in a feed-forward part.

    Beside the residual stream and a norm's output: while keys are rotated, queries before and after; or pre-activation,
    gate and activation, which experts have one after another; their outputs, and what they are summed to.
    """
    c, tokens = setup.small_bytes, setup.together
    stream = 2 * c * tokens * model.dim
    found = [Sizes(stream + attention_temporaries(model, setup))]
    if model.num_dense:
        found.append(Sizes(stream + feed_forward_kept(model, model.hidden_dim, tokens, c)))
    if model.routed is not None:
        routed, rows = model.routed, tokens * model.routed.k
        one = busiest_expert(model, setup)
        inner = c * rows * model.dim + c * one * (2 * (model.matrices - 1) * routed.hidden_dim + model.dim)
        fixed = stream + router_kept(routed.num, routed.k, tokens)
        if routed.shared_dim:  # after the experts, whose sum is there
            shared = feed_forward_kept(model, routed.shared_dim, tokens, c) + c * tokens * model.dim
            found.append(Sizes(fixed + shared))
        found.append(Sizes(fixed, inner))
    return max(found, key=lambda each: each.total)


def attention_temporaries(model: Architecture, setup: Setup) -> int:
    """Queries, keys and values, and those in the making: a rotation turns in fp32, out of place, with two products."""
    c, tokens, attention = setup.small_bytes, setup.together, model.attention
    if not isinstance(attention, GroupedQuery):
        return c * tokens * (2 * attention.query_dim + 2 * attention.heads * attention.value_dim)
    q, kv = attention.query_dim, attention.kv_heads * attention.head_dim
    turning = 0 if model.positions else (4 if c == WIDE else 5) * WIDE
    turning += WIDE if attention.norm != "none" else 0
    return tokens * (c * (q + 2 * kv) + max(turning * q, c * q + turning * kv))
