"""The defects of a widely read listing, executed: the specimen does the wrong thing, ours the right one.

This file has its layer and its expert parallelism, `test_seed_defects_watching.py` its losses, data and monitors.
B-numbers are those of `listing.py`. Not executed, because it shows on a GPU only or is a matter of taste: B5 (random
numbers from the CPU), B11 (experts that are not stacked), B13 and B16 (unspecified, biases), B35, B36.
"""

import pytest
import torch
from tests.differential import listing
from tests.differential.harness import forward_and_see, loss_of, of_logits
from tests.differential.listing import ListingMoE
from torch import Tensor, nn

from equipoise.layer import Capacity, MoE
from equipoise.layer.dispatch import LocalDispatcher
from equipoise.layer.overflow import Fitted
from equipoise.routing import SwitchLoss, TopK

D, E, K = 8, 8, 2


# ------------------------------------------------------------------------------------------------------- helpers


def ours(router: TopK = TopK(k=K), **options) -> MoE:  # noqa: B008 - frozen
    layer = MoE(D, 4 * D, E, router=router, activation="gelu", **options)
    layer.init_weights(0.5, 0.5)
    return layer


def say_one(specimen: ListingMoE) -> ListingMoE:
    """Its experts answer 1 to everything, so that its output is the sum of the weights that it applies."""
    for expert in specimen.experts:
        nn.init.zeros_(expert[2].weight)
        nn.init.ones_(expert[2].bias)
    return specimen


def specimen_of_logits(num_experts: int, k: int = 1, capacity_factor: float = 1.0) -> ListingMoE:
    """A specimen whose inputs are its logits, and whose experts say 1."""
    specimen = ListingMoE(num_experts, num_experts, k, capacity_factor, temperature=1.0)
    with torch.no_grad():
        specimen.router.weight.copy_(torch.eye(num_experts))
    return say_one(specimen)


def alike(num_tokens: int) -> Tensor:
    """(1, S, D): a token S times, so that all want the same two experts: collapse."""
    return torch.randn(1, 1, D).repeat(1, num_tokens, 1)


# ------------------------------------------------------------------------------------------------------- the layer


def test_where_no_defect_bites_the_specimen_is_our_layer():
    """Enough capacity, no biases, fp32, and its raw weights: so what the tests below show are its defects."""
    specimen = ListingMoE(D, E, K, capacity_factor=E, temperature=0.7)
    layer = ours(TopK(k=K, renormalize=False, temperature=0.7))
    with torch.no_grad():
        layer.router.weight.copy_(specimen.router.weight)
        for e, (up, _, down) in enumerate(specimen.experts):
            layer.experts.up_proj[e], layer.experts.down_proj[e] = up.weight, down.weight
            up.bias.zero_()
            down.bias.zero_()
    x = torch.randn(2, 9, D)
    torch.testing.assert_close(layer(x), specimen(x))


def test_b1_b12_drops_are_counted(capsys):
    """64 tokens want the same 2 of 8 experts, which take 24 each: 80 of 128 assignments are dropped, 62.5 %.

    B1: the specimen counts 0. B12: had it counted, it would have said 125 %. Ours says 80, and 40 tokens left alone.
    """
    x = alike(64)
    specimen = ListingMoE(D)
    y = specimen(x)
    assert specimen.expert_capacity == 24
    assert (y == 0).all(-1).sum() >= 16  # at least so many got nothing at all
    assert specimen.tokens_dropped == 0
    assert capsys.readouterr().out == ""
    assert listing.percent_dropped(80, 64) == 125.0

    _, routed = forward_and_see(ours(capacity=Capacity(1.5)), x)
    assert (routed.plan.drops["capacity"].item(), routed.plan.drops["tokens"].item()) == (80, 40)


def test_b2_normalised_weights_are_used():
    """The specimen applies raw probabilities: they sum to less than 1, and to something else for each temperature."""
    x, sums = torch.randn(2, 16, D), {}
    specimen = say_one(ListingMoE(D, capacity_factor=E))
    for specimen.temperature in (0.3, 1.0):
        sums[specimen.temperature] = specimen(x)[..., 0]
    assert sums[0.3].max() < 1
    assert (sums[0.3] > sums[1.0]).all()  # sharper, so the two best have more of the whole
    for tau in (0.3, 1.0):
        _, routed = forward_and_see(ours(TopK(k=K, temperature=tau)), x)
        torch.testing.assert_close(routed.decision.weights_N.view(-1, K).sum(1), torch.ones(32))


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_b3_one_token_is_not_dropped(num_tokens):
    """int(1 * 2 / 8 * 1.5) is 0: everything is dropped, and decoding token by token gives zeros."""
    x = torch.randn(1, num_tokens, D)
    assert not ListingMoE(D).eval()(x).any()
    capped, free = ours(capacity=Capacity(1.5, at_inference=True)).eval(), ours().eval()
    free.load_state_dict(capped.state_dict())
    assert capped(x).abs().amax(-1).max() > 0
    assert torch.equal(capped(x[:, :1]), free(x[:, :1]))


def test_b4_eval_is_a_function_of_the_token():
    """The specimen drops at random in eval: two calls differ, and a token's output depends on its neighbours."""
    x = torch.randn(1, 64, D)
    specimen, layer = ListingMoE(D, capacity_factor=0.5).eval(), ours(capacity=Capacity(0.5)).eval()
    assert not torch.equal(specimen(x), specimen(x))
    assert torch.equal(layer(x), layer(x))
    assert not torch.allclose(specimen(x)[:, :8], specimen(x[:, :8]))
    torch.testing.assert_close(layer(x)[:, :8], layer(x[:, :8]))


def test_b6_a_drop_can_look_at_the_gate():
    """Eight tokens want expert 0, which takes two. The specimen keeps any two; ours, asked to, the two surest."""
    logits = torch.tensor([1.0, 2, 3, 9, 4, 8, 5, 6])
    x = torch.stack([logits, torch.zeros(8)], -1)[None]
    specimen, layer = specimen_of_logits(2, capacity_factor=0.5), of_logits(2, capacity=Capacity(0.5, "probability"))
    kept = set()
    for _ in range(20):
        kept.add(tuple(specimen(x)[0, :, 0].nonzero().flatten().tolist()))
        assert layer(x)[0].abs().amax(-1).nonzero().flatten().tolist() == [3, 5]
    assert any(3 not in pair for pair in kept)


def test_b7_there_is_something_to_balance_with():
    """Without the task's gradient the specimen's router gets none: the announced balancing loss is not there."""
    x = torch.randn(2, 16, D)
    specimen, layer = ListingMoE(D), ours(balance=(SwitchLoss(),))
    y = specimen(x)
    y.backward(torch.zeros_like(y))
    assert not specimen.router.weight.grad.any()
    assert loss_of(layer, x) > 0
    assert layer.router.weight.grad.any()


def test_b8_the_router_is_fp32_under_autocast():
    """bf16 has 8 bits: some of the choices among 8 experts flip."""
    x, flips = torch.randn(1, 4096, D), {}
    specimen, layer = ListingMoE(D), ours()
    routes = {"specimen": specimen.router, "ours": lambda x: layer.router(x[0], None, None).logits_TE[None]}
    for name, route in routes.items():
        exact = route(x)
        with torch.autocast("cpu", torch.bfloat16):
            logits = route(x)
        flips[name] = (logits.topk(K).indices.sort(-1).values != exact.topk(K).indices.sort(-1).values).any(-1).sum()
        assert logits.dtype == (torch.bfloat16 if name == "specimen" else torch.float32)
    assert flips["ours"] == 0
    assert flips["specimen"] > 4096 * 0.001


def test_b9_temperature_moves_no_token_and_below_1_it_sharpens():
    """It is offered against saturation and overloaded experts. The loads are the same for every temperature."""
    x, loads, best = torch.randn(1, 256, D), [], []
    specimen = say_one(ListingMoE(D, top_k=1, capacity_factor=E))
    for expert in specimen.experts:
        expert.register_forward_hook(lambda module, args, output: loads[-1].append(len(args[0])))
    for specimen.temperature in (3.0, 1.0, 0.7, 0.3, 0.1):
        loads.append([])
        best.append(specimen(x)[..., 0].mean().item())
    assert loads[1:] == loads[:-1]
    assert sum(loads[0]) == 256
    assert best == sorted(best)  # the lower, the nearer to one-hot

    weight, ids = torch.randn(E, D), []
    for tau in (3.0, 1.0, 0.3):
        layer = ours(TopK(k=K, temperature=tau))
        layer.router.weight.data.copy_(weight)
        ids.append(layer.router(x[0], None, None).expert_ids_N)
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(ids[1], ids[2])
    with pytest.warns(UserWarning, match="does not change which experts are chosen"):
        TopK(k=K, eval_temperature=0.3)


def test_b10_experts_without_tokens_have_gradients():
    """None stalls data-parallel training, which waits for every parameter; zero does not."""
    x = alike(16)
    specimen, layer = ListingMoE(D), ours()
    specimen(x).sum().backward()
    layer(x).sum().backward()
    assert sum(expert[0].weight.grad is None for expert in specimen.experts) == E - K
    touched = [grad.abs().amax((1, 2)) > 0 for grad in (layer.experts.up_proj.grad, layer.experts.down_proj.grad)]
    assert [mask.sum().item() for mask in touched] == [K, K]


def test_b14_a_forward_leaves_no_trace_on_the_module():
    def attributes(module: nn.Module) -> dict:
        named = {f"{name}.{key}": value for name, m in module.named_modules() for key, value in vars(m).items()}
        return {key: value for key, value in named.items() if "._" not in key}

    specimen, layer = ListingMoE(D), ours(capacity=Capacity(1.0))
    before = attributes(specimen), attributes(layer)
    specimen(alike(64))
    layer(alike(64))
    assert before[0] != attributes(specimen)
    assert before[1] == attributes(layer)


def test_b15_padding_takes_no_room():
    """12 of 16 positions are padding and want expert 0, like 2 of the 4 real tokens. It takes 8 in the specimen."""
    x = torch.tensor([[5.0, 0.0]] * 14 + [[0.0, 5.0]] * 2)[None]
    padding = (torch.arange(16) < 12)[None]
    specimen, layer = specimen_of_logits(2), of_logits(2, capacity=Capacity(1.0, "random"))
    lost = sum((specimen(x)[0, 12:, 0] == 0).sum().item() for _ in range(10))
    assert lost > 0
    for _ in range(10):
        y, routed = forward_and_see(layer, x, padding_mask=padding)
        assert routed.plan.drops["capacity"].item() == 0
        assert y[0, 12:].abs().amax(-1).min() > 0
        assert not y[0, :12].any()


def test_b17_sums_are_rounded_once():
    """32 experts for one token. The first adds 256, the others 1 each: 287, in bf16 (steps of 2) 286 or 288.

    The specimen adds in bf16: 256 + 1 is 256 again, 31 times over.
    """
    num_experts, x = 32, torch.zeros(1, 1, 32)
    x[..., 0] = 1
    specimen, layer = specimen_of_logits(32, 32, capacity_factor=32.0), of_logits(32, 32)
    outputs = torch.ones(num_experts).index_fill(0, torch.tensor(0), 256.0) * num_experts  # the weights are all 1/32
    with torch.no_grad():
        for expert, output in zip(specimen.experts, outputs, strict=True):
            expert[2].bias.fill_(output)
        for router in (specimen.router, layer.router):
            router.weight.zero_()
        layer.experts.gate_up_proj.zero_()[:, [0, 12], 0] = 1  # a gate and a value of 1: silu(1) = .7311
        layer.experts.down_proj.zero_()[:, 0, 0] = outputs / torch.tensor(1.0).sigmoid()
    assert specimen.bfloat16()(x.bfloat16())[0, 0, 0].item() == 256
    assert layer.bfloat16()(x.bfloat16())[0, 0, 0].item() in (286, 288)


def test_b18_more_choices_than_experts_are_refused_at_once():
    specimen = ListingMoE(D, num_experts=2, top_k=3)
    with pytest.raises(RuntimeError, match="out of range"):
        specimen(torch.randn(1, 4, D))
    with pytest.raises(ValueError, match="expected at most num_experts = 2, got 3; lower k or add experts"):
        MoE(D, D, 2, router=TopK(k=3))


# ---------------------------------------------------------------------------------------------- expert parallelism


def ids_of_four_tokens() -> Tensor:
    """(1, 4, K): two ranks with four experts each; every token has a choice on both."""
    return torch.tensor([[[0, 4], [1, 5], [4, 0], [5, 1]]])


def test_b29_the_exchange_asks_for_a_process_group_that_nobody_made():
    with pytest.raises(ValueError, match="process group"):
        listing.exchange(torch.randn(1, 4, D), ids_of_four_tokens(), E, world=2)


def test_b30_b32_nothing_is_exchanged_and_nobody_could_put_it_back():
    """Rank 1 goes on with its own tokens, in another shape, and without a word on which expert was meant.

    The parts of two ranks have to add up to the layer. Ours do: each row keeps its token, expert and weight.
    """
    x = torch.full((1, 4, D), 1.0)  # rank 1's tokens are ones, rank 0 has zeros
    received, _ = listing.exchange(x, ids_of_four_tokens(), E, world=2, rank=1)
    assert received.unique().tolist() == [1.0]
    assert received.shape != x.shape
    other_experts, _ = listing.exchange(x, ids_of_four_tokens() ^ 1, E, world=2, rank=1)
    assert torch.equal(received, other_experts)

    x, whole, parts = torch.randn(12, D), ours(), []
    for rank in range(2):
        part = ours()
        part.load_state_dict(whole.state_dict())
        with torch.no_grad():
            part.experts.down_proj[4 * (1 - rank) : 4 * (2 - rank)] = 0  # the other rank's experts
        parts.append(part(x))
    torch.testing.assert_close(parts[0] + parts[1], whole(x))


def test_b31_a_rank_without_tokens_works():
    """Nobody wants rank 1's experts: the specimen fails. Ours computes what there is, also when that is nothing."""
    x, ids = torch.randn(1, 4, D), ids_of_four_tokens() % 4
    with pytest.raises((RuntimeError, ValueError), match="non-empty"):
        listing.exchange(x, ids, E, world=2, rank=1)
    for num_tokens in (4, 0):
        y, routed = forward_and_see(of_logits(E), 5 * torch.eye(E)[:num_tokens])
        assert y.shape == (num_tokens, E)
        assert not routed.plan.counts_e[4:].any()


def test_b33_experts_that_do_not_divide_are_reached():
    """10 experts on 4 ranks: 10 // 4 = 2 each, and experts 8 and 9 have no rank. Our layer has no such grid."""
    with pytest.raises(IndexError):
        listing.exchange(torch.randn(1, 1, D), torch.tensor([[[9, 0]]]), num_experts=10, world=4, rank=0)
    _, routed = forward_and_see(of_logits(10), 5 * torch.eye(10))
    assert routed.plan.counts_e.tolist() == [1] * 10


def test_b34_a_token_travels_once():
    """Both choices of each token are on rank 0: the specimen sends 8 rows for 4 tokens, our seam hands over 4."""
    x, ids = torch.randn(1, 4, D), torch.tensor([[[0, 1], [1, 2], [2, 3], [3, 0]]])
    _, buckets = listing.exchange(x, ids, E, world=2, rank=0)
    assert [len(bucket) for bucket in buckets] == [8, 0]
    layer = ours()
    [sent] = LocalDispatcher().dispatch(x[0], Fitted(layer.router(x[0], None, None)))
    assert torch.equal(sent.wait().rows, x[0])
