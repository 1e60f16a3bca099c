"""Attention experts: each equals a loop over tokens, heads and experts, looks at nothing later, and counts exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from equipoise.layer import reduce_and_update
from equipoise.models.attention import Attention
from equipoise.models.attention_experts.build import build_attention
from equipoise.models.attention_experts.configs import MixtureOfAttention, MixtureOfHeads, SwitchHead
from equipoise.models.cache import ContiguousCache
from equipoise.models.config import DecoderConfig, Latent, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.models.flops import active_flops
from equipoise.models.generate import generate
from equipoise.models.parameters import parameter_counts
from equipoise.monitor.recorder import Recorder
from equipoise.routing import BiasBalance, ExpertChoice, LoadLoss, SwitchLoss, TopK, ZLoss
from equipoise.serve.paged_cache import PagedKV, Ragged, Span

BALANCE = (SwitchLoss(coef=0.01), ZLoss(coef=0.001))
PLAIN = DecoderConfig(vocab_size=50, dim=16, num_layers=2, num_heads=4, hidden_dim=24, max_seq_len=32)
MOA = replace(PLAIN, num_kv_heads=2, attention_moe=MixtureOfAttention(num_experts=5, balance=BALANCE))
SWITCH = replace(PLAIN, num_heads=2, attention_moe=SwitchHead(num_experts=3, balance=(SwitchLoss(coef=0.01),)))
MOH = replace(PLAIN, num_kv_heads=2, attention_moe=MixtureOfHeads(shared_heads=1, balance=BALANCE))
KINDS = {"moa": MOA, "switch_head": SWITCH, "moh": MOH}
each_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def model_of(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    return Decoder(replace(config, init_std=0.3)).double().eval()


def layer_of(config: DecoderConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    layer = build_attention(config, 0)
    layer.init_weights(0.4, 0.4)
    return layer.double().eval()


def look(q_d: Tensor, k_Kd: Tensor, v_Kd: Tensor) -> Tensor:
    return ((k_Kd @ q_d) / len(q_d) ** 0.5).softmax(0) @ v_Kd


def naive_moa(layer, x_SD):  # no rotation
    d, G, K = layer.head_dim, layer.kv_heads, layer.heads.k
    outputs = []
    for t in range(len(x_SD)):
        probs_E = (layer.heads.router.weight @ x_SD[t]).softmax(0)
        chosen = probs_E.topk(K).indices.tolist()
        total = sum(probs_E[e] for e in chosen).detach()
        y_D = 0
        for e in chosen:
            heads = []
            for g in range(G):
                own = slice(g * d, (g + 1) * d)
                k, v = (x_SD[: t + 1] @ p.weight[own].t() for p in (layer.k_proj, layer.v_proj))
                heads.append(look(layer.q_experts[e, own] @ x_SD[t], k, v))
            y_D = y_D + probs_E[e] / total * (layer.o_experts[e] @ torch.cat(heads))
        outputs.append(y_D)
    return torch.stack(outputs)


def naive_switch_head(layer, x_SD):
    d, H = layer.head_dim, layer.num_heads
    E, K = layer.values.num_experts // H, layer.values.k // H

    def mixture(choice, t, h, run):
        gates = {h * E + e: torch.sigmoid(choice.router.weight[h * E + e] @ x_SD[t]) for e in range(E)}
        return sum(gates[e] * run(e) for e in sorted(gates, key=lambda e: -gates[e].item())[:K])

    outputs = []
    for t in range(len(x_SD)):
        y_D = 0
        for h in range(H):
            own = slice(h * d, (h + 1) * d)
            v = [mixture(layer.values, s, h, lambda e, s=s: layer.v_experts[e] @ x_SD[s]) for s in range(t + 1)]
            q, k = layer.q_proj.weight[own] @ x_SD[t], x_SD[: t + 1] @ layer.k_proj.weight[own].t()
            seen = look(q, k, torch.stack(v))
            y_D = y_D + mixture(layer.outputs, t, h, lambda e, seen=seen: layer.o_experts[e] @ seen)
        outputs.append(y_D)
    return torch.stack(outputs)


def naive_moh(layer, x_SD):
    inner, S, K = layer.attention, layer.shared_heads, layer.heads.k
    d, H = inner.head_dim, inner.q_proj.weight.shape[0] // inner.head_dim
    shared_by = H * d // inner.k_proj.weight.shape[0]
    outputs = []
    for t in range(len(x_SD)):
        probs = (layer.heads.router.weight @ x_SD[t]).softmax(0)
        chosen = probs.topk(K).indices.tolist()
        parts = 2 * (layer.parts_weight @ x_SD[t]).softmax(0)
        shared = S * (layer.shared_weight @ x_SD[t]).softmax(0)
        gates = {h: parts[0] * shared[h] for h in range(S)}
        gates |= {S + h: parts[1] * K * probs[h] / sum(probs[i] for i in chosen) for h in chosen}
        y_D = 0
        for h, gate in gates.items():
            own, kv = slice(h * d, (h + 1) * d), slice(h // shared_by * d, (h // shared_by + 1) * d)
            k, v = (x_SD[: t + 1] @ p.weight[kv].t() for p in (inner.k_proj, inner.v_proj))
            y_D = y_D + gate * (inner.o_proj.weight[:, own] @ look(inner.q_proj.weight[own] @ x_SD[t], k, v))
        outputs.append(y_D)
    return torch.stack(outputs)


NAIVE = {"moa": naive_moa, "switch_head": naive_switch_head, "moh": naive_moh}


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_all_gradients_equal_the_loop(kind):
    layer = layer_of(KINDS[kind])
    x = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 6, 16, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    fast = layer(x, None)
    slow = torch.stack([NAIVE[kind](layer, row) for row in x])
    torch.testing.assert_close(fast, slow)
    for ours, theirs in zip(
        torch.autograd.grad(fast, inputs, grad), torch.autograd.grad(slow, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@each_kind
def test_nothing_looks_ahead_and_rows_do_not_mix(config):
    model, tokens = model_of(config), torch.randint(0, 50, (3, 9))
    logits = model(tokens)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    again = model(changed)
    torch.testing.assert_close(again[:, :5], logits[:, :5])
    assert not torch.allclose(again[:, 5:], logits[:, 5:])
    torch.testing.assert_close(torch.cat([model(row[None]) for row in tokens]), logits)


@each_kind
def test_decoding_equals_prefill_in_both_caches(config):
    model, tokens = model_of(config), torch.randint(0, 50, (2, 9))
    with torch.inference_mode():
        whole = model(tokens)
        cache = ContiguousCache(config, 2, 9, torch.float64)
        parts = [model(part, cache=cache) for part in (tokens[:, :4], *tokens[:, 4:].split(1, 1))]
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        kv, blocks = PagedKV(config, 8, 4, torch.float64), ([5, 0, 3], [1, 7, 2])
        first = Ragged(kv, [Span(blocks[0], 0, 5), Span(blocks[1], 0, 3)])
        row = model(torch.cat((tokens[0, :5], tokens[1, :3]))[None], cache=first)[0]
        torch.testing.assert_close(row, torch.cat((whole[0, :5], whole[1, :3])))
        second = Ragged(kv, [Span(blocks[0], 5, 1), Span(blocks[1], 3, 1)])
        row = model(torch.stack((tokens[0, 5], tokens[1, 3]))[None], cache=second)[0]
        torch.testing.assert_close(row, torch.stack((whole[0, 5], whole[1, 3])))


@each_kind
def test_padding_is_not_routed_and_changes_nothing(config):
    model, tokens = model_of(config), torch.randint(0, 50, (2, 6))
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.int64), tokens), 1)
    mask = torch.arange(9).expand(2, 9) < 3
    recorder = Recorder(model)
    torch.testing.assert_close(model(padded, padding_mask=mask)[:, 3:], model(tokens))
    for stats in recorder.flush(1):
        assert stats.num_tokens == 24, "two forwards of twelve real tokens"
        assert stats.counts_E.sum() == 24 * model.get_submodule(stats.layer).k


@each_kind
def test_counts_are_exact_beside_an_moe(config):
    model = model_of(replace(config, moe=MoEConfig(num_experts=4, hidden_dim=8)))
    seen: dict[str, Tensor] = {}
    for name, layer in model.routed_layers.items():
        layer.router.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.expert_ids_N}))
    recorder = Recorder(model)
    model(torch.randint(0, 50, (2, 7)))
    stats = recorder.flush(1)
    assert {each.layer for each in stats} == set(seen)
    assert any(".mlp" in name for name in seen)
    for each in stats:
        ids = seen[each.layer].tolist()
        assert each.counts_E.tolist() == [ids.count(e) for e in range(each.num_experts)]
        assert each.num_tokens == 14


@pytest.mark.parametrize("kind", KINDS)
def test_losses_reach_the_router_by_their_share_and_balancers_move_once(kind):
    config = KINDS[kind]
    own = replace(config.attention_moe, balance=(SwitchLoss(coef=1.0), BiasBalance(rate=0.1)))
    model = model_of(replace(config, attention_moe=own)).train()
    recorder = Recorder(model)
    (model(torch.randint(0, 50, (2, 7))).sum() * 0).backward()  # only the losses are left
    for name, layer in model.routed_layers.items():
        assert layer.router.weight.grad.abs().sum() > 0, name
    reduce_and_update(model.routed_layers.values(), step=1)
    assert all(layer.balancer.bias_E.abs().sum() > 0 for layer in model.routed_layers.values())
    assert all(set(each.losses) == {"switch_micro"} for each in recorder.flush(1))


@pytest.mark.parametrize("config", [PLAIN, replace(PLAIN, sinks=True, num_kv_heads=2), *KINDS.values()])
@pytest.mark.parametrize("moe", [None, MoEConfig(num_experts=4, hidden_dim=8, shared_experts=1)])
def test_flops_are_those_that_torch_counts(config, moe):
    config = replace(config, moe=moe, moe_layers=None if moe is None else (1,))
    model = Decoder(config).eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 50, (1, 11)))
    assert active_flops(config, 11).total == counter.get_total_flops()


def test_flops_of_a_latent():
    latent = Latent(kv_rank=8, q_rank=6, nope_dim=4, rope_dim=2, value_dim=4)
    config = replace(PLAIN, latent=latent)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Decoder(config)(torch.randint(0, 50, (1, 11)))
    assert active_flops(config, 11).total == counter.get_total_flops()
    with pytest.raises(ValueError, match="seq_len: expected at least 1, got 0"):
        active_flops(config, 0)


def test_active_parameters_by_hand():
    # MoA: 5 experts, 2 used, of 2 * 16 * 8 weights each; two layers
    counts = parameter_counts(MOA)
    assert counts.total - counts.active == 2 * 3 * 2 * 16 * 8
    # SwitchHead: two sides, two heads, one of three experts unused, of 16 * 8 each
    counts = parameter_counts(SWITCH)
    assert counts.total - counts.active == 2 * 2 * 2 * 1 * 16 * 8
    # MoH: of three routed heads one is unused, with 16 * 4 weights for its query and as many for its output
    counts = parameter_counts(MOH)
    assert counts.total - counts.active == 2 * 1 * 2 * 16 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_special_case_is_plain_attention(kind):
    one = TopK(k=1, renormalize="detached")
    special = {
        "moa": replace(PLAIN, attention_moe=MixtureOfAttention(num_experts=1, router=one)),
        "switch_head": replace(PLAIN, attention_moe=SwitchHead(num_experts=1, k=1)),
        "moh": replace(PLAIN, attention_moe=MixtureOfHeads(shared_heads=1, router=TopK(k=3))),
    }[kind]
    layer, plain = layer_of(special), Attention(PLAIN, 0).double()
    plain.init_weights(0.4, 0.4)
    with torch.no_grad():
        inner = layer.attention if kind == "moh" else layer
        for name in ("q", "k", "v", "o"):
            weight = getattr(plain, f"{name}_proj").weight
            if kind == "moa" and name in "qo":
                getattr(inner, f"{name}_experts")[0] = weight
            elif kind == "switch_head" and name in "vo":  # a gate of 1/2 at each side
                heads = weight.unflatten(0, (4, 4)) if name == "v" else weight.unflatten(1, (4, 4)).transpose(0, 1)
                getattr(inner, f"{name}_experts").copy_(2 * heads)
            else:
                getattr(inner, f"{name}_proj").weight.copy_(weight)
        for name, parameter in layer.named_parameters():
            if "router" in name or name in ("shared_weight", "parts_weight"):
                parameter.zero_()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x, None), plain(x, None))


@each_kind
def test_json_and_text(config):
    assert DecoderConfig.from_json(config.to_json()) == config
    model, prompt = model_of(config), torch.randint(0, 50, (2, 4))
    with_cache = generate(model, prompt, 6, temperature=0)
    assert torch.equal(with_cache, generate(model, prompt, 6, temperature=0, use_cache=False))


def test_all_padding_is_finite():
    model = model_of(MOA).train()
    model(torch.zeros(1, 3, dtype=torch.int64), padding_mask=torch.ones(1, 3, dtype=torch.bool)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


GLOBAL = (SwitchLoss(scope="global"),)
LATENT = Latent(kv_rank=8, nope_dim=4, rope_dim=2, value_dim=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_moe": MixtureOfAttention(num_experts=4)}, r"num_heads: expected .* = 8 .* got 4"),
        ({"attention_moe": MixtureOfAttention(num_experts=1), "num_kv_heads": 2}, "expected at most num_experts = 1"),
        ({"attention_moe": SwitchHead(num_experts=4), "num_kv_heads": 2}, "num_kv_heads: expected None"),
        ({"attention_moe": SwitchHead(num_experts=4), "sinks": True}, "got sinks"),
        ({"attention_moe": SwitchHead(num_experts=4), "attention_bias": "qkv"}, "got attention_bias"),
        ({"attention_moe": SwitchHead(num_experts=4), "qk_norm": "whole"}, "got qk_norm"),
        ({"attention_moe": SwitchHead(num_experts=4, balance=(LoadLoss(),))}, "expected no LoadLoss"),
        ({"attention_moe": SwitchHead(num_experts=4), "latent": LATENT}, "got latent"),
        ({"attention_moe": MixtureOfHeads(shared_heads=1), "latent": LATENT}, "None with latent"),
        ({"attention_moe": MixtureOfHeads(shared_heads=4)}, "shared_heads: expected 0 to num_heads - 1 = 3, got 4"),
        ({"attention_moe": MixtureOfHeads(shared_heads=1, router=ExpertChoice())}, "expected one that is causal"),
        ({"attention_moe": MixtureOfHeads(shared_heads=1, balance=GLOBAL)}, "got switch_global"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **change)


def test_detached_needs_pre():
    with pytest.raises(ValueError, match=r"TopK.renormalize: .* order='post'"):
        TopK(k=2, renormalize="detached", order="post")
