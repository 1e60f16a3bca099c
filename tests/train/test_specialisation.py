"""Mutual information of domain and expert: by hand, against its control, and read off real models."""

import io
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from equipoise.layer import Capacity
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.monitor.recorder import Recorder
from equipoise.routing import TopK
from equipoise.train.data import TokenStream, eval_batches
from equipoise.train.sources import DataError
from equipoise.train.specialisation import (
    RoutedText,
    Specialisation,
    check_domains,
    mutual_information,
    num_domains,
    route_text,
    specialisation,
    specialisation_tables,
    verdict,
)

# ---------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("counts", "nats"),
    [
        ([[5, 0], [0, 5]], math.log(2)),  # each domain its expert
        ([[5, 0], [0, 15]], 0.25 * math.log(4) + 0.75 * math.log(4 / 3)),  # the same: the entropy of the domains
        ([[2, 6], [3, 9]], 0.0),  # both 1 : 3
        ([[0, 0], [3, 9]], 0.0),  # one domain
        ([[7, 0], [4, 0]], 0.0),  # one expert
        ([[0, 0], [0, 0]], 0.0),  # nothing counted
        # joint 3/8 and 1/8, independent 1/4: 2 * 3/8 ln(3/2) + 2 * 1/8 ln(1/2) = 0.130812
        ([[3, 1], [1, 3]], 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        # domain 1 has two experts to itself: still all that there is to tell about two equal domains
        ([[2, 0, 0], [0, 1, 1]], math.log(2)),
    ],
)
def test_mutual_information_by_hand(counts, nats):
    assert mutual_information(np.array(counts)) == pytest.approx(nats, abs=1e-12)


def test_mutual_information_is_that_of_entropies():
    """I = H(D) + H(E) - H(D, E), which is another way to compute it."""

    def entropy(p):
        return -(p[p > 0] * np.log(p[p > 0])).sum()

    counts_DE = np.random.default_rng(0).integers(0, 50, (4, 7))
    p = counts_DE / counts_DE.sum()
    expected = entropy(p.sum(1)) + entropy(p.sum(0)) - entropy(p.ravel())
    assert mutual_information(counts_DE) == pytest.approx(expected)


# ---------------------------------------------------------------------------------- the control, on made-up routing


def make_stream(rng, num_documents=60, names=("a", "b"), longer=1):
    """Documents of 20 to 400 tokens in random order; those of the first domain are so many times longer."""
    domains_M = rng.permutation(np.arange(num_documents) % len(names))
    ends_M = np.cumsum(rng.integers(20, 400, num_documents) * np.where(domains_M == 0, longer, 1))
    tokens_N = np.zeros(ends_M[-1], dtype=np.uint16)
    return TokenStream(tokens_N, ends_M, domains_M, names, np.array([1] * len(names)), "made up")


def routed(stream, expert_T, num_experts=2):
    """One layer that sends token t of the stream to expert_T[t]."""
    positions_T = np.arange(stream.num_tokens)
    return RoutedText(stream, positions_T, {"layer": np.stack([positions_T, expert_T])}, {"layer": num_experts})


def by_token(rng, stream):
    return rng.integers(0, 2, stream.num_tokens)


def by_document(rng, stream):
    """All tokens of a document to one expert, drawn for the document: nothing to do with domains."""
    expert_M = rng.integers(0, 2, len(stream.ends_M))
    return expert_M[np.searchsorted(stream.ends_M, np.arange(stream.num_tokens), side="right")]


def by_place(rng, stream):
    """By the place in a window of 64, whatever the text."""
    return (np.arange(stream.num_tokens) % 64 < 32).astype(np.int64)


@pytest.mark.parametrize("router", [by_token, by_document, by_place])
def test_a_router_that_ignores_the_domain_is_within_chance(router):
    """Over 60 texts the p-values are spread as chance has it: about 1 in 20 is below 0.05, half are below 0.5."""
    p_values = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        stream = make_stream(rng)
        [layer] = specialisation(routed(stream, router(rng, stream)), num_shuffles=99)
        p_values.append(layer.p_value)
    assert sum(p <= 0.05 for p in p_values) <= 8  # of 60; expected 3, and 9 or more once in 400
    assert 18 <= sum(p <= 0.5 for p in p_values) <= 42


def test_documents_of_unequal_length_make_the_control_wider_not_narrower():
    p_values = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        stream = make_stream(rng, longer=4)
        [layer] = specialisation(routed(stream, by_document(rng, stream)), num_shuffles=59)
        p_values.append(layer.p_value)
    assert sum(p <= 0.05 for p in p_values) <= 6
    assert sum(p <= 0.5 for p in p_values) <= 28


def test_the_control_knows_that_tokens_of_a_document_belong_together():
    """A router by document has much mutual information with the domains by luck; the control has as much."""
    rng = np.random.default_rng(1)
    stream = make_stream(rng)
    [document] = specialisation(routed(stream, by_document(rng, stream)))
    [token] = specialisation(routed(stream, by_token(rng, stream)))
    assert document.control_mean > 20 * token.control_mean


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_a_router_that_follows_the_domain_is_found(noise):
    rng = np.random.default_rng(2)
    stream = make_stream(rng)
    domains_T = stream.domains_of(np.arange(stream.num_tokens))
    expert_T = np.where(rng.random(stream.num_tokens) < noise, rng.integers(0, 2, stream.num_tokens), domains_T)
    [layer] = specialisation(routed(stream, expert_T))
    assert layer.p_value == 1 / 500
    assert layer.control_mean < layer.control_95 < 0.5 * layer.mutual_information
    share_D = np.bincount(domains_T) / len(domains_T)
    entropy = -(share_D * np.log(share_D)).sum()
    assert layer.maximum == pytest.approx(entropy)
    if noise == 0.0:
        assert layer.mutual_information == pytest.approx(entropy)
        assert layer.shares_DE.tolist() == [[1, 0], [0, 1]]
    assert layer.beyond_chance == layer.mutual_information - layer.control_mean


def test_the_same_seed_gives_the_same_numbers():
    rng = np.random.default_rng(3)
    text = routed(stream := make_stream(rng), by_document(rng, stream))
    assert specialisation(text) == specialisation(text)
    assert specialisation(text) != specialisation(text, seed=1)


def test_the_maximum_at_top_2_of_4():
    """Each token takes two of four experts: ln(4/2) is all that experts can tell about four domains, not ln 4."""
    rng = np.random.default_rng(4)
    stream = make_stream(rng, names=("a", "b", "c", "d"))
    positions_T = np.arange(stream.num_tokens)
    first_T = 2 * (stream.domains_of(positions_T) // 2)
    pairs = np.concatenate([np.stack([positions_T, first_T]), np.stack([positions_T, first_T + 1])], axis=1)
    [layer] = specialisation(RoutedText(stream, positions_T, {"layer": pairs}, {"layer": 4}), num_shuffles=19)
    assert layer.maximum == pytest.approx(math.log(2))
    assert layer.mutual_information == pytest.approx(math.log(2), abs=0.02)  # domains are not of exactly one size


# --------------------------------------------------------------------------------------------------- real routers

V, S = 40, 16


def token_stream(num_documents=30, seed=5):
    """Domain a has the tokens 0 to 19, domain b those from 20."""
    rng = np.random.default_rng(seed)
    lengths_M, domains_M = rng.integers(10, 60, num_documents), rng.permutation(np.arange(num_documents) % 2)
    tokens = [rng.integers(20 * d, 20 * d + 20, n) for n, d in zip(lengths_M, domains_M, strict=True)]
    stream = np.concatenate(tokens).astype(np.uint16)
    return TokenStream(stream, np.cumsum(lengths_M), domains_M, ("a", "b"), np.array([1, 1]), "made up")


def build(num_experts=4, k=2, **moe):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "dim": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "max_seq_len": S}
    config = MoEConfig(num_experts=num_experts, hidden_dim=8, router=TopK(k=k, jitter=0.1), **moe)
    return Decoder(DecoderConfig(**sizes, init_std=0.3, moe=config))


@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_counts_are_those_of_the_routers(batch_size):
    """Against the recorder's counts by expert, the stream's by domain, and a loop over the tokens."""
    model, stream = build(capacity=Capacity(factor=1.0)), token_stream()
    text = route_text(model, stream, batch_size, S, 6, bf16=False)
    domains_T = stream.domains_of(text.positions_T)
    recorder = Recorder(model)
    expected = {name: np.zeros((2, 4), dtype=np.int64) for name in model.moe_layers}
    model.eval()
    for batch in eval_batches(stream, batch_size, S, 6):
        seen = []
        hooks = [
            layer.tap.register_forward_hook(lambda module, args, routed, seen=seen: seen.append(routed.decision))
            for layer in model.moe_layers.values()
        ]
        with torch.no_grad():
            model(batch.tokens_BS)
        for hook in hooks:
            hook.remove()
        own = batch.tokens_BS.view(-1) >= 20  # the domain of the token itself, from its id
        for name, decision in zip(model.moe_layers, seen, strict=True):
            for token, expert in zip(decision.token_ids_N.tolist(), decision.expert_ids_N.tolist(), strict=True):
                expected[name][int(own[token]), expert] += 1
    for stats in recorder.flush(0):
        counts_DE = text.counts_DE(stats.layer, domains_T)
        assert counts_DE.tolist() == expected[stats.layer].tolist()
        assert counts_DE.sum(0).tolist() == stats.counts_E.tolist()
        assert counts_DE.sum(1).tolist() == (2 * np.bincount(domains_T)).tolist()


def test_a_model_made_to_follow_the_domain():
    """The sign of one input feature is the token's domain, and the router looks at nothing else."""
    model = build(num_experts=2, k=1)
    with torch.no_grad():
        model.embed_tokens.weight[:20, 0], model.embed_tokens.weight[20:, 0] = 5.0, -5.0
        for block in model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.experts.down_proj.zero_()
            block.mlp.router.weight.zero_()
            block.mlp.router.weight[:, 0] = torch.tensor([1.0, -1.0])
    layers = specialisation(route_text(model, token_stream(), 4, S, 20, bf16=False))
    for layer in layers:
        assert layer.shares_DE.tolist() == [[1, 0], [0, 1]]
        assert layer.mutual_information == pytest.approx(layer.maximum)
        assert layer.p_value == 1 / 500
    assert verdict(layers).startswith(
        "the router specialises by domain in layers.0.mlp, layers.1.mlp: beyond chance the expert tells up to 0."
    )
    assert verdict(layers).endswith("layers.0.mlp sends 100% of a and 0% of b to expert 0")


def test_reading_leaves_the_model_as_it_was():
    model, stream = build(), token_stream()
    before = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        route_text(model, stream, 4, S, 3, bf16=False)
        assert model.training is training
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(layer.tap._forward_hooks for layer in model.moe_layers.values())


def test_one_domain_is_refused():
    stream = token_stream()
    check_domains(stream, 4, S, 6)
    assert num_domains(stream, 4, S, 6) == 2
    single = TokenStream(stream.tokens_N, stream.ends_M, 0 * stream.domains_M, ("a", "b"), stream.num_bytes_D, "one")
    with pytest.raises(DataError, match=r"two domains or more, got 1 of a, b\. Train on .* or raise eval_batches"):
        check_domains(single, 4, S, 6)


# ---------------------------------------------------------------------------------------------------- for a person


def made(layer, measured, p_value, counts=((80, 20), (20, 80)), control=0.01):
    return Specialisation(layer, measured, control, 2 * control, p_value, math.log(2), ("a", "b"), counts)


def test_verdicts():
    nothing = [made("x", 0.02, 0.3), made("y", 0.02, 0.04)]  # 0.04 is not enough for two layers
    assert verdict(nothing).startswith("no specialisation beyond chance: in no layer")
    assert verdict([made("x", 0.02, 0.04)]).startswith("the router specialises weakly by domain in x: ")
    strong = [made("x", 0.3, 0.002), made("y", 0.02, 0.5)]
    assert verdict(strong) == (
        "the router specialises by domain in x: beyond chance the expert tells up to 0.290 nats of 0.693 about the "
        "domain (42%). x sends 80% of a and 20% of b to expert 0"
    )


def shown(layers):
    text = io.StringIO()
    Console(file=text, width=120).print(specialisation_tables(layers))
    return text.getvalue()


def test_tables():
    text = shown([made("layers.0.mlp", 0.3, 0.002), made("layers.1.mlp", 0.02, 0.5)])
    rows = [line.split() for line in text.splitlines()]
    assert ["layers.0.mlp", "0.3000", "0.0100", "0.0200", "0.0020", "0.6931"] in rows
    assert ["layers.0.mlp", "a", "80%", "20%"] in rows
    assert ["b", "20%", "80%"] in rows


def test_of_many_experts_those_that_differ_are_shown():
    counts = [[10] * 16, [10] * 16]
    counts[0][13], counts[1][2] = 170, 90
    text = shown([made("layers.0.mlp", 0.3, 0.002, tuple(map(tuple, counts)))])
    assert "the experts that differ most" in text
    assert "13: 53%" in text
    assert "2: 38%" in text
    assert text.count("%") == 1 + 2 * 8


def test_fields_are_plain():
    fields = made("x", 0.3, 0.002).fields()
    assert fields["beyond_chance"] == pytest.approx(0.29)
    assert fields["shares"] == [[0.8, 0.2], [0.2, 0.8]]
    assert made("x", 0.3, 0.002).scalars() == {"specialisation.x": 0.3, "specialisation_control.x": 0.01}
