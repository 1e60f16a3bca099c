"""Everything that adapts once per optimizer step: counted once, summed over the step, frozen, saved, cast, reset alike.

What each rule makes of the numbers is in test_balancers and test_adaptive_rules.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from equipoise.layer import Capacity, MoE, reduce_and_update
from equipoise.routing import (
    BALANCERS,
    COEFFICIENTS,
    BiasBalance,
    DropRateCoef,
    QuantileBalance,
    ReLURouting,
    SparsityCoef,
    SparsityLoss,
    SwitchLoss,
    Threshold,
    TopK,
)
from equipoise.routing.adaptive import Adaptive

T, D, E = 32, 8, 4
# What a layer is built with to have one piece of adapting state.
LAYERS = {
    "sign": {"balance": (BiasBalance(0.1),)},
    "proportional": {"balance": (BiasBalance(0.1, "proportional"),)},
    "smooth": {"balance": (BiasBalance(0.1, "smooth"),)},
    "quantile": {"balance": (QuantileBalance(),)},
    "quantile-ema": {"balance": (QuantileBalance(ema=0.5), SwitchLoss())},
    "thresholds": {"router": Threshold(warmup=2, ema=0.5)},
    "drop-rate": {"balance": (SwitchLoss(DropRateCoef(beta=0.5)),), "capacity": Capacity(0.75)},
    "sparsity": {"router": ReLURouting(), "balance": (SparsityLoss(SparsityCoef()),)},
}
EACH = pytest.mark.parametrize("name", LAYERS)


def build(name: str) -> tuple[MoE, Adaptive]:
    """(layer, what adapts in it), always with the same weights."""
    torch.manual_seed(5)
    layer = MoE(D, 8, E, **LAYERS[name])
    layer.init_weights(0.5, 0.5)
    (state,) = layer.adaptive
    return layer, state


def batch(seed: int = 0, num_tokens: int = T) -> Tensor:
    """Tokens that prefer the same experts, so that there is something to adapt to."""
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(seed)) + 1


def saved(state: Adaptive) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[key], two[key]) for key in one)


def pending_of(name: str, *batches: Tensor) -> Tensor:
    """What a new layer has pending after these forwards."""
    layer, state = build(name)
    for x in batches:
        layer(x)
    return state.pending.clone()


def implementations(cls: type = Adaptive) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield from implementations(sub)
        if not inspect.isabstract(sub):
            yield sub


def test_everything_that_adapts_is_covered():
    covered = {type(build(name)[1]) for name in LAYERS}
    assert covered == set(implementations())
    built = {type(config().build(E, 2)) for config in (*BALANCERS, *COEFFICIENTS[-2:])}
    assert built < covered


class TestObservation:
    @EACH
    def test_a_recomputed_forward_counts_once(self, name):
        expected = pending_of(name, batch())
        assert expected.any()
        for reentrant in (True, False):
            layer, state = build(name)
            x = batch().requires_grad_()
            checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
            assert torch.equal(state.pending, expected)

    @EACH
    def test_micro_batches_add_up(self, name):
        one, two = batch(1, 20), batch(2, 12)
        both = pending_of(name, one, two)
        assert torch.equal(both, pending_of(name, one) + pending_of(name, two))
        if name != "drop-rate":  # each forward has a capacity of its own
            assert torch.equal(both, pending_of(name, torch.cat([one, two])))

    @EACH
    def test_neither_padding_nor_an_empty_batch_counts(self, name):
        layer, state = build(name)
        padding = torch.arange(T)[None] >= 20
        layer(batch()[None], padding_mask=padding)
        assert torch.equal(state.pending, pending_of(name, batch()[:20]))
        assert not pending_of(name, batch()[:0]).any()

    @EACH
    def test_eval_is_never_observed(self, name):
        layer, state = build(name)
        before = saved(state)
        layer.eval()(batch())
        assert not state.pending.any()
        reduce_and_update([layer])
        assert same(saved(state), before)

    @EACH
    def test_autocast_changes_no_count(self, name):
        layer, state = build(name)
        with torch.autocast("cpu", torch.bfloat16):
            layer(batch())
        assert torch.equal(state.pending, pending_of(name, batch()))

    @EACH
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
    def test_compiled_counts_alike(self, name):
        torch._dynamo.reset()
        layer, state = build(name)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            torch.compile(layer, fullgraph=True, backend="aot_eager")(batch())
        assert torch.equal(state.pending, pending_of(name, batch()))


class TestUpdate:
    @EACH
    def test_moves_the_state_once_and_starts_anew(self, name):
        layer, state = build(name)
        before = saved(state)
        layer(batch())
        assert same(saved(state), before)  # a forward alone moves nothing
        reduce_and_update([layer])
        after = saved(state)
        assert not same(after, before)
        assert not state.pending.any()
        if name != "smooth":  # whose momentum carries on
            reduce_and_update([layer])
            assert same(saved(state), after)

    @EACH
    def test_of_nothing_moves_nothing(self, name):
        layer, state = build(name)
        before = saved(state)
        reduce_and_update([layer])
        layer(batch()[:0])
        reduce_and_update([layer])
        assert same(saved(state), before)

    @EACH
    def test_sees_the_sum_over_ranks(self, name):
        """Two ranks, each with its own tokens: the state is that of one rank which saw both."""
        mine, theirs = batch(1), batch(2)
        (one, state), (single, expected) = build(name), build(name)
        one(mine)
        single(mine)
        single(theirs)
        reduced = []

        def reduce(pending: Tensor) -> None:
            reduced.append(pending)
            pending.add_(pending_of(name, theirs))

        reduce_and_update([one], reduce)
        reduce_and_update([single])
        assert len(reduced) == 1
        assert reduced[0].data_ptr() == state.pending.data_ptr()
        assert same(saved(state), saved(expected))

    @EACH
    def test_is_not_part_of_the_graph(self, name):
        layer, state = build(name)
        for step in range(3):
            layer(batch(step)).sum().backward()
            reduce_and_update([layer], step=step)
        assert not any(buffer.requires_grad for buffer in state.buffers())


class TestFrozen:
    @EACH
    def test_keeps_its_state_and_forgets_what_it_saw(self, name):
        layer, state = build(name)
        layer(batch())
        reduce_and_update([layer])
        state.freeze()
        before = saved(state)
        layer(batch(1))
        assert state.pending.any()
        reduce_and_update([layer], step=1)
        assert same(saved(state), before)
        assert not state.pending.any()

        resumed, other = build(name)
        resumed.load_state_dict(layer.state_dict())
        resumed(batch(1))
        reduce_and_update([resumed], step=1)
        assert same(saved(other), before)  # also after a checkpoint
        other.unfreeze()
        resumed(batch(1))
        reduce_and_update([resumed], step=1)
        assert not same(saved(other), before)


class TestState:
    @EACH
    def test_is_buffers_and_what_is_pending_is_not_saved(self, name):
        layer, state = build(name)
        layer(batch())
        assert list(state.parameters()) == []
        pointers = {value.data_ptr() for value in state.state_dict(keep_vars=True).values()}
        assert state.pending.data_ptr() not in pointers
        assert state.pending.data_ptr() in {value.data_ptr() for value in state.buffers()}
        assert all(value.dtype in (torch.float32, torch.int64, torch.bool) for value in state.state_dict().values())

    @EACH
    def test_a_resumed_run_goes_on_alike(self, name):
        (layer, state), (resumed, other) = build(name), build(name)
        for step in range(3):
            layer(batch(step))
            reduce_and_update([layer], step=step)
        resumed.load_state_dict(layer.state_dict())
        assert same(saved(other), saved(state))
        for step in range(3, 6):
            for each in (layer, resumed):
                each(batch(step))
                reduce_and_update([each], step=step)
        assert same(saved(other), saved(state))

    @EACH
    @pytest.mark.parametrize(
        "cast",
        [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()],
        ids=["bfloat16", "half", "to", "double"],
    )
    def test_stays_as_it_is_when_the_model_is_cast(self, name, cast):
        layer, state = build(name)
        layer(batch())
        reduce_and_update([layer])
        layer(batch(1))
        before = {key: buffer.clone() for key, buffer in state.named_buffers()}
        cast(layer)
        after = dict(state.named_buffers())
        assert {key: buffer.dtype for key, buffer in after.items()} == {key: b.dtype for key, b in before.items()}
        assert same(after, before)

    @EACH
    def test_reset_makes_it_as_new(self, name):
        layer, state = build(name)
        for step in range(3):
            layer(batch(step))
            reduce_and_update([layer], step=step)
        layer(batch())
        state.freeze()
        state.reset()
        assert same(dict(state.named_buffers()), dict(build(name)[1].named_buffers()))

    @EACH
    def test_a_copy_is_independent(self, name):
        layer, state = build(name)
        twin = copy.deepcopy(layer)
        before = saved(state)
        twin(batch())
        reduce_and_update([twin])
        assert same(saved(state), before)
        assert not state.pending.any()
        assert not same(saved(twin.adaptive[0]), before)

    @EACH
    def test_a_layer_from_the_meta_device_starts_as_new(self, name):
        with torch.device("meta"):
            layer = MoE(D, 8, E, **LAYERS[name])
        assert {buffer.device.type for buffer in layer.adaptive[0].buffers()} == {"meta"}
        layer.to_empty(device="cpu").init_weights(0.5, 0.5)
        assert same(dict(layer.adaptive[0].named_buffers()), dict(build(name)[1].named_buffers()))


def test_a_layer_may_have_several():
    balance = (BiasBalance(), SwitchLoss(DropRateCoef()))
    layer = MoE(D, 8, E, router=TopK(), balance=balance, capacity=Capacity(0.5))
    layer(batch())
    reduced = []
    reduce_and_update([layer], reduced.append)
    assert len(reduced) == len(layer.adaptive) == 2
    assert not any(state.pending.any() for state in layer.adaptive)
