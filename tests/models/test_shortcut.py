"""Shortcut-connected MoE: equal to the published formulas, at every place; else a decoder like any other."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from equipoise.layer import Capacity
from equipoise.models.cache import ContiguousCache
from equipoise.models.config import SHORTCUT_WINDOW, DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder, cross_entropy_sum
from equipoise.models.generate import generate
from equipoise.models.parameters import parameter_counts
from equipoise.routing import BiasBalance, Hash, SwitchLoss, TopK
from equipoise.types import BatchScope

# (place, layers with an MoE): after dense layers, and for pos1 also in every layer
PLACES = {"pos1": (1, 3), "pos1-every": None, "pos2": (1, 3), "pos3": (1, 3)}
EVERYWHERE = pytest.mark.parametrize("place", PLACES)
STYLES = pytest.mark.parametrize("style", ["modern", "gpt2"])
EXACT = {"rtol": 0, "atol": 1e-10}
V, B, S = 61, 2, 7


@pytest.fixture
def make_scmoe(make_config):
    """A decoder in fp64 with a shortcut, large weights, and norms that are not 1."""

    def make(place: str, *, slot: int | None = None, moe: dict | None = None, **overrides) -> Decoder:
        fields = {"num_experts": 4, "hidden_dim": 16, "router": TopK(k=1), "shared_experts": 1, "backend": "lean"}
        fields |= {"shortcut": place.removesuffix("-every"), "shortcut_slot": slot}
        config = make_config(
            num_layers=4, moe_layers=PLACES[place], moe=MoEConfig(**(fields | (moe or {}))), **overrides
        )
        torch.manual_seed(0)
        model = Decoder(config).double()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        return model

    return make


def tokens(batch: int = B, length: int = S) -> torch.Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------- the plain formulas


class Plain:
    """The formulas of arXiv 2404.05019 for one sequence, from the state dict alone: plain loops, no module of ours.

    w: the state dict, by name. Every norm is that of the sub-block that stands at the reading place.
    """

    def __init__(self, config: DecoderConfig, state: dict[str, torch.Tensor]) -> None:
        self.config, self.w = config, state

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.w["embed_tokens.weight"][ids]
        if self.config.style == "gpt2":
            h = h + self.w["embed_positions.weight"][: len(ids)]
        inputs, middles = [], []  # by layer: the stream that comes in, and that after attention
        for layer in range(self.config.num_layers):
            name = f"layers.{layer}"
            inputs.append(h)
            h = h + self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", h))
            middles.append(h)
            normed = self.norm(f"{name}.post_attention_layernorm", h)
            if layer not in self.config.moe_layer_ids:
                h = h + self.ffn(f"{name}.mlp", normed)
                continue
            routed = {
                "pos1": lambda at=layer: self.norm(f"layers.{at}.input_layernorm", inputs[at]),
                "pos2": lambda at=layer: self.norm(f"layers.{at - 1}.post_attention_layernorm", middles[at - 1]),
                "pos3": lambda at=layer: self.norm(f"layers.{at - 1}.input_layernorm", inputs[at - 1]),
            }[self.config.moe.shortcut]()
            shared = self.ffn(f"{name}.mlp.shared", normed)
            if self.config.moe.shared_gate:
                shared = shared * torch.sigmoid(normed @ self.w[f"{name}.mlp.shared_gate.weight"].T)
            h = h + shared + self.experts(f"{name}.mlp", routed)
        return self.norm("norm", h) @ self.w["embed_tokens.weight"].T

    def norm(self, name: str, h: torch.Tensor) -> torch.Tensor:
        weight, eps = self.w[f"{name}.weight"], self.config.norm_eps
        if self.config.style == "gpt2":
            centred = h - h.mean(-1, keepdim=True)
            spread = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
            return centred / spread * weight + self.w[f"{name}.bias"]
        return h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def activate(self, up: torch.Tensor) -> torch.Tensor:
        if self.config.style == "gpt2":
            return F.gelu(up, approximate="tanh")
        gate, value = up.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * value

    def ffn(self, name: str, x: torch.Tensor) -> torch.Tensor:
        up = "up_proj" if self.config.style == "gpt2" else "gate_up_proj"
        return self.activate(x @ self.w[f"{name}.{up}.weight"].T) @ self.w[f"{name}.down_proj.weight"].T

    def experts(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """sum_i G(x)_i E_i(x), token by token; G: the largest probabilities, divided by their sum for k > 1."""
        up = self.w[f"{name}.experts.{'up_proj' if self.config.style == 'gpt2' else 'gate_up_proj'}"]
        down, k, outputs = self.w[f"{name}.experts.down_proj"], self.config.moe.router.k, []
        for row in x:
            probs = (self.w[f"{name}.router.weight"] @ row).softmax(-1)
            best = probs.argsort(descending=True)[:k]
            total = sum(probs[e] for e in best) if k > 1 else 1.0
            outputs.append(sum(probs[e] / total * (down[e] @ self.activate(up[e] @ row)) for e in best))
        return torch.stack(outputs)

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        heads, kv_heads, size = self.config.num_heads, self.config.kv_heads, self.config.head_size
        q, k, v = ((x @ self.w[f"{name}.{p}_proj.weight"].T).unflatten(-1, (-1, size)) for p in "qkv")
        q, k = ([[self.turn(head, at) for head in row] for at, row in enumerate(each)] for each in (q, k))
        outputs = []
        for at in range(len(x)):
            for head in range(heads):
                group = head * kv_heads // heads
                scores = torch.stack([q[at][head] @ k[s][group] / size**0.5 for s in range(at + 1)])
                outputs.append(scores.softmax(-1) @ v[: at + 1, group])
        return torch.stack(outputs).view(len(x), heads * size) @ self.w[f"{name}.o_proj.weight"].T

    def turn(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """Rotary, in fp32 as the model's; learned positions turn nothing."""
        if self.config.style == "gpt2":
            return x
        first, second = x.float().chunk(2)
        angle = position * self.config.rope_theta ** -(torch.arange(len(first)).float() / len(first))
        turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
        return torch.cat(turned).double()


@STYLES
@EVERYWHERE
@pytest.mark.parametrize("gate_and_k", [(False, 1), (True, 2)], ids=["k1", "k2-gated"])
def test_output_and_gradients_equal_the_formulas(make_scmoe, place, style, gate_and_k):
    gate, k = gate_and_k
    model = make_scmoe(place, style=style, qk_norm=False, moe={"router": TopK(k=k), "shared_gate": gate})
    ids, cotangent = tokens(), torch.randn(B, S, V, dtype=torch.float64)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    plain = Plain(model.config, leaves)
    expected = torch.stack([plain.logits(row) for row in ids])
    (expected * cotangent).sum().backward()
    actual = model(ids)
    (actual * cotangent).sum().backward()
    # rotary turns are fp32 in an fp64 model, and gradients through them are rounded so
    close = {"rtol": 0, "atol": 1e-10 if style == "gpt2" else 1e-5}
    torch.testing.assert_close(actual, expected, **close)
    for name, parameter in model.named_parameters():
        scale = leaves[name].grad.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad / scale, leaves[name].grad / scale, **close, msg=name)


def test_the_places_are_different_functions(make_scmoe):
    ids = tokens()
    outputs = [make_scmoe(place)(ids) for place in ("pos1", "pos2", "pos3")]  # the same weights
    plain = make_scmoe("pos1", moe={"shortcut": None})
    for output in (*outputs[1:], plain(ids)):
        assert not output.isclose(outputs[0], atol=1e-3).all()
    assert not outputs[1].isclose(outputs[2], atol=1e-3).all()


SLOTS = [(place, slot) for place in PLACES for slot in range(SHORTCUT_WINDOW[place.removesuffix("-every")])]


@pytest.mark.parametrize(("place", "slot"), SLOTS)
def test_the_slot_changes_no_bit(make_scmoe, place, slot):
    ids = tokens()
    default, other = make_scmoe(place), make_scmoe(place, slot=slot)
    for model in (default, other):
        model(ids).square().sum().backward()
    assert other(ids).equal(default(ids))
    assert all(a.grad.equal(b.grad) for a, b in zip(default.parameters(), other.parameters(), strict=True))


# What runs in one pair of layers, in order. "experts" is the routed experts' computation.
ORDER = {
    ("pos1", 0): "attention mlp route experts attention shared",
    ("pos1", None): "attention mlp route attention experts shared",
    ("pos2", 0): "attention route experts mlp attention shared",
    ("pos2", None): "attention route mlp experts attention shared",
    ("pos2", 2): "attention route mlp attention experts shared",
    ("pos3", 0): "route experts attention mlp attention shared",
    ("pos3", None): "route attention mlp experts attention shared",
    ("pos3", 3): "route attention mlp attention experts shared",
}


@pytest.mark.parametrize(("place", "slot"), ORDER)
def test_what_runs_between_dispatch_and_combine(make_scmoe, place, slot):
    model, seen = make_scmoe(place, slot=slot), []
    dense, block = model.layers[2], model.layers[3]
    watched = [(dense.self_attn, "attention"), (dense.mlp, "mlp"), (block.self_attn, "attention")]
    watched += [(block.mlp.router, "route"), (block.mlp.experts, "experts"), (block.mlp.shared, "shared")]
    for module, name in watched:
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    model(tokens())
    assert " ".join(seen) == ORDER[place, slot]


# ---------------------------------------------------------------------------------------------- a decoder like others


@EVERYWHERE
def test_later_tokens_change_nothing_before(make_scmoe, place):
    model, ids = make_scmoe(place).eval(), tokens()
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % V
    before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :4], before[:, :4], **EXACT)
    assert not after[:, 4:].isclose(before[:, 4:], atol=1e-3).all(dim=-1).any()


@EVERYWHERE
@torch.inference_mode()
def test_decode_equals_prefill(make_scmoe, place):
    model, ids = make_scmoe(place).eval(), tokens()
    whole = model(ids)
    for pieces in ([1] * S, [4, 2, 1]):
        cache = ContiguousCache(model.config, batch_size=B, max_len=S, dtype=torch.float64)
        outputs = [model(piece, cache=cache) for piece in ids.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=0, atol=1e-6)  # rotary turns are fp32


@EVERYWHERE
def test_generate_continues_as_without_a_cache(make_scmoe, place):
    model, ids = make_scmoe(place).eval(), tokens(1, 5)
    expected = ids
    for _ in range(6):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert generate(model, ids, 6, temperature=0).tolist() == expected.tolist()


@EVERYWHERE
def test_in_eval_a_sequence_does_not_depend_on_the_batch(make_scmoe, place):
    model, ids = make_scmoe(place, moe={"capacity": Capacity(0.5)}).eval(), tokens(5)
    torch.testing.assert_close(model(ids)[3:4], model(ids[3:4]), **EXACT)
    crowd = ids[:1].expand(20, S)
    torch.testing.assert_close(model(torch.cat((crowd, ids)))[20:], model(ids), **EXACT)


@EVERYWHERE
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_padding_changes_no_real_token(make_scmoe, place, training):
    model, ids = make_scmoe(place).train(training), tokens()
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, :3] = True
    logits = model(ids, padding_mask=padding)
    torch.testing.assert_close(logits[:1, 3:], model(ids[:1, 3:]), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1:], model(ids[1:]), rtol=0, atol=1e-5)


@EVERYWHERE
def test_experts_get_token_ids_and_no_padding(make_scmoe, place):
    model, ids, seen = make_scmoe(place, moe={"router": Hash(vocab_size=V, k=1)}), tokens(), []
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, :3] = True
    for layer in model.moe_layers.values():
        layer.tap.register_forward_hook(lambda _, __, routed: seen.append(routed.decision))
    model(ids, padding_mask=padding)
    for decision, layer in zip(seen, model.moe_layers.values(), strict=True):
        assert decision.num_tokens == B * S - 3
        assert decision.expert_ids_N.tolist() == layer.router.table_VK[ids[~padding], 0].tolist()


@EVERYWHERE
def test_tokens_are_counted_once_and_losses_attached_once(make_scmoe, place):
    balance = (SwitchLoss(coef=0.5), BiasBalance())
    model, ids, seen = make_scmoe(place, style="gpt2", moe={"balance": balance}), tokens(), []
    for name, layer in model.moe_layers.items():
        layer.tap.register_forward_hook(lambda _, __, routed, name=name: seen.append((name, routed)))
    scope = BatchScope(step=1, share=0.25)
    model(ids, scope=scope)[:, :, :0].sum().backward()  # nothing but the balancing losses has a gradient
    assert [name for name, _ in seen] == list(model.moe_layers)  # in the layers' order, each once
    for (_, routed), layer in zip(seen, model.moe_layers.values(), strict=True):
        counts_E = torch.bincount(routed.decision.expert_ids_N, minlength=4)
        assert layer.balancer.pending.tolist() == counts_E.tolist()
        assert int(counts_E.sum()) == B * S
    expected = 0.5 * 0.25 * switch_gradient(model, ids)
    scale = expected.abs().max()
    assert scale > 0
    gradient = model.layers[1].mlp.router.weight.grad  # the attached sum is fp32
    torch.testing.assert_close(gradient / scale, expected / scale, rtol=0, atol=1e-6)


def switch_gradient(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Of the sum of all layers' Switch losses, by the formula, with respect to the router in layer 1."""
    terms = []

    def add(module, args, routed):
        probs_TE, ids_N = routed.decision.probs_TE, routed.decision.expert_ids_N
        share_E = torch.bincount(ids_N, minlength=4).double() / len(ids_N)
        terms.append(4 * (share_E * probs_TE.mean(0)).sum())

    handles = [layer.tap.register_forward_hook(add) for layer in model.moe_layers.values()]
    model.eval()(ids)  # in eval no loss is attached
    for handle in handles:
        handle.remove()
    (gradient,) = torch.autograd.grad(sum(terms), model.layers[1].mlp.router.weight)
    return gradient


@EVERYWHERE
def test_learns_a_fixed_batch(make_scmoe, place):
    model, ids = make_scmoe(place, init_std=0.02, moe={"balance": (SwitchLoss(),)}).float(), tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        total, count = cross_entropy_sum(model(ids[:, :-1]), ids[:, 1:])
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert float(total.detach() / count) < 0.5  # from ln 61 = 4.1


def test_bf16_autocast(make_scmoe):
    model, ids = make_scmoe("pos2").float(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = cross_entropy_sum(model(ids), ids)
    total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of PyTorch's own compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("shortcut", [None, "pos2"])
@torch.no_grad()
def test_compiles_without_graph_breaks(make_scmoe, shortcut):
    model, ids = make_scmoe("pos2", moe={"shortcut": shortcut, "backend": "grouped"}).float().eval(), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    try:
        torch.testing.assert_close(compiled(ids), model(ids), rtol=0, atol=1e-6)
    finally:
        torch._dynamo.reset()


@STYLES
@EVERYWHERE
def test_parameters_and_names_are_those_of_the_model_without_a_shortcut(make_scmoe, place, style):
    model = make_scmoe(place, style=style)
    plain = make_scmoe(place, style=style, moe={"shortcut": None})
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert parameter_counts(model.config) == parameter_counts(plain.config)
    assert sum(p.numel() for p in model.parameters()) == parameter_counts(model.config).total


def test_one_routed_and_one_shared_expert_are_active_as_two_routed_ones(make_scmoe):
    scmoe, top_2 = make_scmoe("pos2"), make_scmoe("pos2", moe={"shortcut": None, "router": TopK(), "shared_experts": 0})
    assert parameter_counts(scmoe.config).active == parameter_counts(top_2.config).active


def test_config_round_trip(make_scmoe):
    config = make_scmoe("pos3", slot=3).config
    again = DecoderConfig.from_json(config.to_json())
    assert again == config
    assert (again.moe.shortcut, again.moe.shortcut_slot) == ("pos3", 3)


def test_a_configuration_of_before_has_no_shortcut(make_config):
    config = make_config()
    lines = [line for line in config.to_json().splitlines() if '"shortcut' not in line]
    text = "\n".join(lines).replace('"first_router": null,', '"first_router": null')
    assert DecoderConfig.from_json(text) == config


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shortcut": "pos4"}, r"shortcut: expected None or one of pos1, pos2, pos3, got 'pos4'"),
        ({"shared_experts": 0}, r"shared_experts: expected at least 1 with a shortcut, got 0.*shared_experts=1"),
        (
            {"shortcut": None, "shortcut_slot": 1},
            r"shortcut_slot: expected None without a shortcut, got 1.*shortcut too",
        ),
        ({"shortcut_slot": 3}, r"shortcut_slot: expected 0 to 2 for pos2, got 3. None is half-way"),
        ({"shortcut_slot": -1}, r"shortcut_slot: expected 0 to 2 for pos2, got -1"),
        (
            {"capacity": Capacity(overflow="shared")},
            r'capacity: expected overflow "drop" or "next_choice".*got "shared"',
        ),
        ({"checkpoint_experts": True}, r"checkpoint_experts: expected False with a shortcut, got True.*micro-batches"),
    ],
)
def test_refused_in_the_layer(fields, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**({"num_experts": 4, "hidden_dim": 8, "shared_experts": 1, "shortcut": "pos2"} | fields))


@pytest.mark.parametrize("shortcut", ["pos2", "pos3"])
@pytest.mark.parametrize(("moe_layers", "bare"), [((0, 2), r"\[0\]"), ((1, 2), r"\[2\]"), (None, r"\[0, 1, 2\]")])
def test_a_dense_layer_has_to_come_before(make_config, shortcut, moe_layers, bare):
    moe = MoEConfig(num_experts=4, hidden_dim=8, shared_experts=1, shortcut=shortcut)
    with pytest.raises(
        ValueError, match=rf"shortcut: expected a dense layer .* for {shortcut}, got none before {bare}"
    ):
        make_config(moe=moe, moe_layers=moe_layers)
    assert make_config(moe=replace(moe, shortcut="pos1"), moe_layers=moe_layers)
