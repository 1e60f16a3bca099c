"""Our layer against the routers, the sparse blocks and the balancing loss of the installed transformers.

Same weights, same inputs: what is decided, what comes out, and the gradients. The classes are those of
`transformers/models/<family>/modeling_<family>.py`. Speed and memory are not compared.
"""

from dataclasses import dataclass, field
from importlib import import_module

import pytest
import torch
from tests.differential.harness import assert_same, loss_of, with_router
from torch import Tensor, nn

from equipoise.layer import MoE
from equipoise.routing import BiasBalance, SwitchLoss, TopK
from equipoise.types import RoutingDecision

# The modules have had today's shape (the router returns logits, weights, ids) for a while; older ones differ.
transformers = pytest.importorskip("transformers", minversion="5.14")

D, F, E, B, S = 16, 12, 8, 2, 12
T = B * S


@dataclass(frozen=True)
class Family:
    """One model family: the prefix of its classes, a small configuration, and our router for it."""

    module: str
    prefix: str
    config: dict
    ours: TopK
    in_order: bool = True  # its top-k returns the best expert first
    block: str = "SparseMoeBlock"
    router_config: dict = field(default_factory=dict)


def softmax_family(module: str, prefix: str, normalise: bool) -> Family:
    config = {"num_experts": E, "num_experts_per_tok": 4, "norm_topk_prob": normalise, "moe_intermediate_size": F}
    return Family(module, prefix, config | {"intermediate_size": F}, TopK(k=4, renormalize=normalise))


MIXTRAL = {"num_local_experts": E, "num_experts_per_tok": 2, "intermediate_size": F}
DEEPSEEK = {
    "n_routed_experts": 2 * E,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": F,
    "n_shared_experts": 2,
}
V3 = TopK(k=3, score="sigmoid", scale=2.5, num_groups=4, top_groups=2)
V3_RAW = TopK(k=3, score="sigmoid", scale=2.5, num_groups=4, top_groups=2, renormalize=False)

BLOCKS = {
    "mixtral": Family("mixtral", "Mixtral", MIXTRAL, TopK(k=2)),
    "mixtral-post": Family("mixtral", "Mixtral", MIXTRAL, TopK(k=2, order="post")),
    "olmoe": softmax_family("olmoe", "Olmoe", normalise=False),
    "olmoe-normalised": softmax_family("olmoe", "Olmoe", normalise=True),
    "qwen3": softmax_family("qwen3_moe", "Qwen3Moe", normalise=True),
    "qwen3-raw": softmax_family("qwen3_moe", "Qwen3Moe", normalise=False),
    "deepseek-v3": Family("deepseek_v3", "DeepseekV3", DEEPSEEK, V3, in_order=False, block="MoE"),
    "deepseek-v3-raw": Family(
        "deepseek_v3", "DeepseekV3", DEEPSEEK | {"norm_topk_prob": False}, V3_RAW, in_order=False, block="MoE"
    ),
}
GPT_OSS = Family(
    "gpt_oss", "GptOss", {"num_local_experts": E, "num_experts_per_tok": 4}, TopK(k=4, order="post"), block="MLP"
)
ROUTERS = BLOCKS | {"gpt-oss": GPT_OSS}


def theirs(family: Family, part: str) -> nn.Module:
    """A module of the family with random weights: part is the rest of the class's name."""
    modeling = import_module(f"transformers.models.{family.module}.modeling_{family.module}")
    config = getattr(transformers, f"{family.prefix}Config")(hidden_size=D, **family.config)
    module = getattr(modeling, family.prefix + part)(config)
    for tensor in (*module.parameters(), *module.buffers()):
        nn.init.normal_(tensor, std=0.5)  # the buffer is DeepSeek's selection bias
    return module


def ours(family: Family, state: dict[str, Tensor], shared_experts: int = 0) -> MoE:
    """Our layer for the family, with `state` loaded over its initial values."""
    num_experts, dim = state["router.weight"].shape
    balance = (BiasBalance(),) if "balancer.bias_E" in state else ()
    layer = MoE(dim, F, num_experts, router=family.ours, balance=balance, shared_experts=shared_experts)
    layer.load_state_dict(layer.state_dict() | {name: tensor.detach() for name, tensor in state.items()})
    return layer


def dense(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    """(T, E): each token's weight for each expert, 0 where it was not selected. Does not depend on slot order."""
    return weights_TK.new_zeros(len(ids_TK), num_experts).scatter(1, ids_TK, weights_TK)


# ------------------------------------------------------------------------------------------------- the routers


@pytest.mark.parametrize("family", ROUTERS.values(), ids=ROUTERS)
def test_ids_weights_and_gradients_of_the_router(family):
    """gpt-oss adds a trained bias to its logits. Our router has none; a column of ones in x is the same thing."""
    router = theirs(family, "TopKRouter" if family.module != "deepseek_v3" else "TopkRouter")
    bias = getattr(router, "bias", None)
    selection_bias = getattr(router, "e_score_correction_bias", None)
    x = torch.randn(T, D, requires_grad=True)
    _, weights, ids = router(x)

    weight = router.weight.detach() if bias is None else torch.cat([router.weight, bias[:, None]], 1).detach()
    state = {"router.weight": weight} | ({} if selection_bias is None else {"balancer.bias_E": selection_bias})
    layer = ours(family, state)
    inputs = (x if bias is None else torch.cat([x, torch.ones(T, 1)], 1)).detach().requires_grad_()
    decision = layer.router(inputs, selection_bias, None)
    our_ids, our_weights = decision.expert_ids_N.view(T, -1), decision.weights_N.view(T, -1)

    assert torch.equal(our_ids.sort(1).values, ids.sort(1).values)
    assert torch.equal(our_ids, ids) or not family.in_order
    num_experts = len(weight)
    cotangent = torch.randn(T, num_experts)
    expected, actual = dense(ids, weights, num_experts), dense(our_ids, our_weights, num_experts)
    assert_same(actual, expected, "weights")

    (expected * cotangent).sum().backward()
    (actual * cotangent).sum().backward()
    grad = router.weight.grad if bias is None else torch.cat([router.weight.grad, bias.grad[:, None]], 1)
    assert_same(layer.router.weight.grad, grad, "router weight")
    assert_same(inputs.grad[:, :D], x.grad, "x")


# ------------------------------------------------------------------------------------------------- whole blocks

SAME_NAMES = {
    "router.weight": "gate.weight",
    "experts.gate_up_proj": "experts.gate_up_proj",
    "experts.down_proj": "experts.down_proj",
}


@pytest.mark.parametrize("family", BLOCKS.values(), ids=BLOCKS)
def test_output_and_gradients_of_the_sparse_block(family):
    """The experts of gpt-oss (biases, a clamped activation) are not ours, so its block is left out."""
    block = theirs(family, family.block)
    tensors = dict(block.named_parameters()) | dict(block.named_buffers())
    state = {name: tensors[other] for name, other in SAME_NAMES.items()}
    shared_experts = 0
    if family.module == "deepseek_v3":
        gate, up, down = (tensors[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down"))
        state["shared.gate_up_proj.weight"], state["shared.down_proj.weight"] = torch.cat([gate, up]), down
        state["balancer.bias_E"] = tensors["gate.e_score_correction_bias"]
        shared_experts = DEEPSEEK["n_shared_experts"]
    layer = ours(family, state, shared_experts)

    x = torch.randn(B, S, D)
    cotangent = torch.randn(B, S, D)
    x_theirs, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, actual = block(x_theirs), layer(x_ours)
    assert_same(actual, expected, "output")
    expected.backward(cotangent)
    actual.backward(cotangent)
    assert_same(x_ours.grad, x_theirs.grad, "x")
    parameters = dict(layer.named_parameters())
    for name, other in SAME_NAMES.items():
        assert_same(parameters[name].grad, tensors[other].grad, name)


# ------------------------------------------------------------------------------------------------- the group mask


def choose_with_a_mask_of_zero(z_TE: Tensor, bias_E: Tensor, k: int, num_groups: int, top_groups: int) -> Tensor:
    """DeepSeek-V3's selection as transformers had it up to 5.5: experts outside the best groups score 0.0."""
    scores_TE = z_TE.sigmoid() + bias_E
    grouped_TGe = scores_TE.view(len(z_TE), num_groups, -1)
    best_TG = grouped_TGe.topk(2).values.sum(-1).topk(top_groups).indices
    inside_TG = torch.zeros(len(z_TE), num_groups).scatter(1, best_TG, 1.0)
    return (grouped_TGe * inside_TG.unsqueeze(-1)).view_as(scores_TE).topk(k).indices


def test_negative_scores_do_not_select_experts_of_masked_groups():
    """transformers up to 5.5 is wrong here (huggingface/transformers#45440), since 5.6 it is right.

    z = [2, 1, -1, -2] has sigmoid [.88, .73, .27, .12]; a bias of -1 makes it [-.12, -.27, -.73, -.88]. The first
    group (-.39 against -1.61) is the best. With 0.0 for the masked group, its experts 2 and 3 beat both others.
    """
    z, bias = torch.tensor([[2.0, 1.0, -1.0, -2.0]]), torch.full((4,), -1.0)
    assert choose_with_a_mask_of_zero(z, bias, 2, num_groups=2, top_groups=1).sort().values.tolist() == [[2, 3]]

    config = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    family = Family("deepseek_v3", "DeepseekV3", config, TopK(k=2, score="sigmoid", num_groups=2, top_groups=1))
    router = theirs(family, "TopkRouter")
    weight = torch.eye(4, D)
    with torch.no_grad():
        router.weight.copy_(weight)
        router.e_score_correction_bias.copy_(bias)
    x = nn.functional.pad(z, (0, D - 4))
    _, _, ids = router(x)
    assert ids.sort().values.tolist() == [[0, 1]]

    decision = ours(family, {"router.weight": weight, "balancer.bias_E": bias}).router(x, bias, None)
    assert decision.expert_ids_N.tolist() == [0, 1]
    expected = torch.tensor([2.0, 1.0]).sigmoid() / torch.tensor([2.0, 1.0]).sigmoid().sum()
    assert_same(decision.weights_N.detach(), expected)


def test_with_any_bias_ours_stays_in_the_best_groups_and_a_mask_of_zero_does_not():
    E16, k, groups, top = 16, 4, 4, 2
    layer = MoE(D, F, E16, router=TopK(k=k, score="sigmoid", num_groups=groups, top_groups=top))
    x, bias = torch.randn(T, D), torch.randn(E16) - 1.5
    decision = layer.router(x, bias, None)
    z = decision.logits_TE.detach()
    scores = (z.sigmoid() + bias).view(T, groups, -1)
    best = scores.topk(2).values.sum(-1).topk(top).indices
    astray = [
        (ids.view(T, k, 1) // (E16 // groups) != best.view(T, 1, top)).all(-1).sum().item()
        for ids in (decision.expert_ids_N, choose_with_a_mask_of_zero(z, bias, k, groups, top))
    ]
    assert astray[0] == 0
    assert astray[1] > T  # more than one expert per token


# -------------------------------------------------------------------------------------------- the balancing loss


def hf_loss(logits: tuple[Tensor, ...], k: int, mask: Tensor | None = None) -> Tensor:
    modeling = import_module("transformers.models.mixtral.modeling_mixtral")
    return modeling.load_balancing_loss_func(logits, logits[0].shape[-1], k, mask)


def balanced_by(weight_ED: Tensor, k: int) -> MoE:
    return with_router(weight_ED, TopK(k=k, renormalize=False), balance=(SwitchLoss(coef=1.0),))


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_the_loss_of_one_layer_is_k_times_ours(k, padded):
    """Its load counts k assignments per token and divides by tokens: f sums to k where ours sums to 1."""
    weight, x = torch.randn(E, D, requires_grad=True), torch.randn(B, S, D, requires_grad=True)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, S // 2 :] = padded
    mask = (~padding).long() if padded else None
    theirs_value = hf_loss(((x.view(T, D) @ weight.t()),), k, mask)
    theirs_value.backward()

    layer, x_ours = balanced_by(weight, k), x.detach().clone().requires_grad_()
    ours_value = loss_of(layer, x_ours, padding_mask=padding)
    assert_same(k * ours_value, theirs_value.detach())
    assert_same(k * layer.router.weight.grad, weight.grad, "router weight")
    assert_same(k * x_ours.grad, x.grad, "x")


@pytest.mark.parametrize("k", [1, 2, 3])
def test_at_perfect_balance_theirs_is_k_and_ours_is_1(k):
    """Token t likes expert t best, then t + 1, and so on: each expert is selected k times, each mean probability 1/E.

    So a coefficient of 0.01 there is a coefficient of 0.01 k here.
    """
    preference = torch.linspace(2, -2, E)
    logits = torch.stack([preference.roll(t) for t in range(E)])  # also x, with the identity as the router
    assert hf_loss((logits,), k).item() == pytest.approx(k, rel=1e-6)
    assert loss_of(balanced_by(torch.eye(E), k), logits).item() == pytest.approx(1, rel=1e-6)


def test_pooling_over_layers_hides_two_collapsed_layers_and_ours_does_not():
    """transformers is wrong here: it adds up the loads of all layers before the product (#28255, #31464).

    Every token of one layer goes to expert 0, of the other to expert 1, with probability sigmoid(2) = .88. Pooled,
    that is a load of (.5, .5): the value of perfect balance, and a gradient of 0 for both. Per layer, it is
    2 * .88 = 1.76, and the gradient takes the logit of the busy expert down in each.
    """
    first = torch.tensor([[1.0, -1.0]]).repeat(6, 1)
    logits = (first.clone().requires_grad_(), (-first).requires_grad_())
    pooled = hf_loss(logits, 1)
    pooled.backward()
    assert pooled.item() == pytest.approx(1, rel=1e-6)  # k = 1: as good as it gets
    assert max(z.grad.abs().max().item() for z in logits) < 1e-7

    for z, busy in ((first, 0), (-first, 1)):
        x = z.clone().requires_grad_()
        loss = loss_of(balanced_by(torch.eye(2), 1), x)
        assert loss.item() == pytest.approx(2 * torch.sigmoid(torch.tensor(2.0)).item(), rel=1e-6)
        assert x.grad[:, busy].min() > 0.01  # a step against the gradient lowers it
        assert x.grad[:, 1 - busy].max() < -0.01
        assert hf_loss((z,), 1).item() == pytest.approx(loss.item(), rel=1e-6)  # by itself, each layer is seen


def test_logits_and_probabilities_for_the_losses_are_theirs():
    """The loss above is a function of these, so that they are compared by themselves too."""
    family = BLOCKS["mixtral"]
    router = theirs(family, "TopKRouter")
    x = torch.randn(T, D)
    logits, _, _ = router(x)
    decision = ours(family, {"router.weight": router.weight}).router(x, None, None)
    assert isinstance(decision, RoutingDecision)
    assert_same(decision.logits_TE.detach(), logits.detach())
    assert_same(decision.probs_TE.detach(), logits.detach().softmax(-1))
