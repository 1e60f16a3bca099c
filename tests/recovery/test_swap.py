"""Replacing live weights: all that is wrong is listed, nothing is half done, and the way back is exact to the bit."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from equipoise.layer import MoE, reduce_and_update
from equipoise.recovery.swap import digest, swap
from equipoise.routing import BiasBalance, TopK

D, F, E = 8, 12, 4


def build(seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"a": MoE(D, F, E, router=TopK(k=2), balance=(BiasBalance(),)), "norm": nn.LayerNorm(D)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def clones(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def bits(tensors):
    """Everything, to the bit."""
    return {
        name: (t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8).tolist()) for name, t in tensors.items()
    }


def bits_of(model):
    return bits(model.state_dict())


# ------------------------------------------------------------------------------------------------ what is refused


def test_everything_that_is_wrong_is_listed_at_once_and_nothing_is_changed():
    model, wrong = build(), clones(build(seed=1))
    wrong["nobody"] = torch.zeros(1)
    del wrong["norm.bias"]
    wrong["a.router.weight"] = torch.zeros(D, E)
    wrong["a.balancer.frozen"] = torch.tensor(0.0)
    wrong["a.experts.down_proj"][1, 2, 3] = math.nan
    before = bits_of(model)
    with pytest.raises(ValueError, match="nothing was changed") as error:
        swap(model, wrong, whole=True)
    message = str(error.value)
    for problem in (
        "nobody is unknown",
        "norm.bias is missing",
        f"a.router.weight has shape ({D}, {E}), expected ({E}, {D})",
        "a.balancer.frozen is torch.float32, expected torch.bool",
        "a.experts.down_proj is not finite",
    ):
        assert problem in message
    assert message.count(";") == 4  # these five, and no other
    assert message.endswith("Load weights of this very model")
    assert bits_of(model) == before


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(bad):
    model, new = build(), torch.ones(D)
    new[0] = bad
    with pytest.raises(ValueError, match=r"norm\.bias is not finite"):
        swap(model, {"norm.bias": new})


def test_tensors_without_dense_values_are_listed_too():
    model, before = build(), bits_of(build())
    with pytest.raises(ValueError, match="nothing was changed") as error:
        swap(model, {"norm.bias": torch.ones(D, device="meta"), "norm.weight": torch.ones(D).to_sparse()})
    assert "norm.bias has no dense values (torch.strided on meta); norm.weight has no dense values (torch.spar" in str(
        error.value
    )
    assert bits_of(model) == before
    with pytest.raises(ValueError, match=r"weight has no dense values in the model \(torch\.strided on meta\)"):
        swap(nn.LayerNorm(D, device="meta"), {"weight": torch.ones(D)})


def test_a_part_may_be_missing_unless_the_whole_is_asked_for():
    model = build()
    assert swap(model, {"norm.bias": torch.ones(D)}).changed == ("norm.bias",)
    with pytest.raises(ValueError, match=r"norm\.weight is missing"):
        swap(model, {"norm.bias": torch.ones(D)}, whole=True)


class Typed(nn.Module):
    """A target of any type."""

    def __init__(self, target):
        super().__init__()
        self.register_buffer("x", target)


@pytest.mark.parametrize(
    ("target", "new", "problem"),
    [
        (torch.int64, torch.tensor([1.0]), "x is torch.float32, expected torch.int64"),
        (torch.float32, torch.tensor([1]), "x is torch.int64, expected torch.float32"),
        (torch.float32, torch.tensor([1j]), "x is torch.complex64, expected torch.float32"),
        (torch.bool, torch.tensor([2]), "x is torch.int64 with values that torch.bool can't hold"),
        (torch.int8, torch.tensor([128]), "x is torch.int64 with values that torch.int8 can't hold"),
        (torch.float16, torch.tensor([70000.0]), "x is torch.float32 with values that torch.float16 can't hold"),
    ],
)
def test_types_that_do_not_fit(target, new, problem):
    model = Typed(torch.ones(1, dtype=target))
    with pytest.raises(ValueError, match=problem):
        swap(model, {"x": new})
    assert model.x.item() == 1


@pytest.mark.parametrize(
    ("target", "new"),
    [
        (torch.int8, torch.tensor([127])),
        (torch.bool, torch.tensor([0])),
        (torch.float16, torch.tensor([65504.0])),
        (torch.bfloat16, torch.tensor([0.1], dtype=torch.float64)),
        (torch.float8_e4m3fn, torch.tensor([0.5]).to(torch.float8_e4m3fn)),
        (torch.complex64, torch.tensor([1 + 2j])),
    ],
)
def test_types_that_fit_are_cast_and_come_back(target, new):
    model = Typed(torch.ones(1).to(target))
    before = bits_of(model)
    done = swap(model, {"x": new})
    assert model.x.dtype == target
    assert bits_of(model) == bits({"x": new.to(target)})
    done.undo()
    assert bits_of(model) == before


# ------------------------------------------------------------------------------------------- in place, and what it says


def test_parameters_stay_the_same_objects_and_the_optimizer_keeps_its_state():
    model, new = build(), clones(build(seed=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    objects = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    state = copy.deepcopy(optimizer.state_dict())
    swap(model, new, whole=True)
    assert bits_of(model) == bits(new)
    assert {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]} == objects
    after = optimizer.state_dict()
    for index, values in state["state"].items():
        assert all(torch.equal(value, after["state"][index][name]) for name, value in values.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model["norm"](model["a"](torch.randn(16, D))).square().sum().backward()
        optimizer.step()
        reduce_and_update([model["a"]])


def test_changed_are_those_whose_values_differ():
    model = build()
    new = clones(model)
    new["norm.bias"][3] += 1
    new["a.router.weight"] = new["a.router.weight"].double()  # another type, the same values
    assert swap(model, new).changed == ("norm.bias",)
    assert swap(model, {}).changed == ()


def test_cast_are_those_of_another_floating_point_type():
    model = build()
    new = clones(model)
    new["norm.bias"] = new["norm.bias"].double()
    new["a.router.weight"] = new["a.router.weight"].bfloat16()
    new["a.balancer.frozen"] = new["a.balancer.frozen"].long()  # exact or refused, and so nothing to tell
    done = swap(model, new)
    assert set(done.cast) == {"norm.bias", "a.router.weight"}
    assert done.changed == ("a.router.weight",)  # rounded; the other holds the same values
    assert swap(model, clones(model)).cast == ()


def test_minus_zero_is_a_change_and_goes_back():
    model = Typed(torch.tensor([0.0, 1.0]))
    done = swap(model, {"x": torch.tensor([-0.0, 1.0])})
    assert done.changed == ("x",)
    assert math.copysign(1, model.x[0]) == -1
    done.undo()
    assert math.copysign(1, model.x[0]) == 1


def test_the_digest_is_of_what_the_model_holds():
    model = build().bfloat16()
    new = {name: tensor.float() for name, tensor in clones(build(seed=1)).items() if name.startswith("norm")}
    done = swap(model, new)
    held = {name: model.state_dict()[name] for name in new}
    assert held["norm.bias"].dtype == torch.bfloat16
    assert done.digest == digest(held)


def test_two_names_of_one_tensor_are_fine_and_two_values_for_it_are_not():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    before, new = bits_of(model), torch.randn(5, 3)
    done = swap(model, {"embed.weight": new, "head.weight": new}, whole=True)
    assert torch.equal(model["head"].weight, new)
    assert model["head"].weight is model["embed"].weight
    done.undo()
    assert bits_of(model) == before
    with pytest.raises(RuntimeError, match=r"embed\.weight does not hold what was copied into it; all was put back"):
        swap(model, {"embed.weight": new, "head.weight": new + 1})
    assert bits_of(model) == before


def test_live_weights_can_be_exchanged_with_each_other():
    model = build()
    before, live = clones(model), model.state_dict()
    done = swap(model, {"norm.weight": live["norm.bias"], "norm.bias": live["norm.weight"]})
    assert torch.equal(model["norm"].bias, before["norm.weight"])
    assert torch.equal(model["norm"].weight, before["norm.bias"])
    done.undo()
    assert bits_of(model) == bits(before)


def test_the_given_tensors_stay_their_owners():
    model, new = build(), {"norm.bias": torch.ones(D)}
    swap(model, new)
    with torch.no_grad():
        model["norm"].bias.add_(1)
    assert new["norm.bias"].eq(1).all()


class WithExtra(nn.Linear):
    """A module that saves something beside its tensors."""

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        raise AssertionError("nobody asked for it")


def test_extra_state_is_no_weight():
    model = WithExtra(2, 2)
    swap(model, {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, whole=True)
    assert model.weight.eq(1).all()


# ------------------------------------------------------------------------------------------------------- the way back


def test_undo_is_exact_after_further_training_and_twice_is_once():
    model, new = build(), clones(build(seed=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    before = bits_of(model)
    done = swap(model, new)
    train(model, optimizer)
    assert bits_of(model) != before
    for _ in range(2):
        done.undo()
        assert bits_of(model) == before
    again = bits_of(build(seed=1))
    swap(model, new)
    assert bits_of(model) == again


def test_undo_of_a_part_leaves_the_rest_as_training_made_it():
    model = build()
    done = swap(model, {"norm.bias": torch.ones(D)})
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    after = bits_of(model)
    done.undo()
    assert {name for name, each in bits_of(model).items() if each != after[name]} == {"norm.bias"}


def test_undo_brings_broken_weights_back_as_they_were():
    """NaN with another payload, infinities and -0.0: what a rollback replaced is evidence."""
    broken = torch.tensor([0x7FC00001, 0x7F800000, -0x00800000, -0x80000000, 0x7F7FFFFF], dtype=torch.int64)
    model = Typed(broken.to(torch.int32).view(torch.float32))
    before = bits_of(model)
    done = swap(model, {"x": torch.zeros(5)})
    done.undo()
    assert bits_of(model) == before
    done.undo()
    assert bits_of(model) == before


def test_undo_finds_a_model_whose_buffers_were_replaced():
    model = build()
    before = clones(model)
    done = swap(model, {"a.balancer.bias_E": torch.arange(4.0)})
    model.double()  # makes new buffers
    done.undo()
    assert torch.equal(model["a"].balancer.bias_E, before["a.balancer.bias_E"].double())


def test_undo_tells_types_apart_that_have_the_same_bytes():
    model = Typed(torch.ones(1, dtype=torch.float16))
    done = swap(model, {"x": torch.zeros(1)})
    model.x = torch.tensor([0x3C00], dtype=torch.int16).view(torch.bfloat16)  # 1.0 in float16, 2**-7 in bfloat16
    assert model.x.item() == 2**-7
    done.undo()
    assert model.x.item() == 1.0


class Refusing(torch.Tensor):
    """A tensor that refuses any copy into it, as a device that is lost would."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            raise RuntimeError("the device is lost")
        return super().__torch_function__(func, types, args, kwargs or {})


def three(middle):
    model = nn.Module()
    model.register_buffer("first", torch.tensor([0.0, math.nan, 3.0]))
    model.register_buffer("middle", middle)
    model.register_buffer("last", torch.tensor([1, 2, 3]))
    return model


NEW = {"first": torch.tensor([-0.0, 1.0, 3.0]), "middle": torch.ones(3), "last": torch.tensor([3, 2, 1])}


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (torch.zeros(1).expand(3), "more than one element of the written-to tensor refers to a single memory location"),
        (torch.zeros(3).as_subclass(Refusing), "the device is lost"),
    ],
    ids=["expanded view", "refusing"],
)
@pytest.mark.parametrize(
    "order", [("first", "middle", "last"), ("last", "first", "middle"), ("middle", "last", "first")]
)
def test_a_copy_that_fails_halfway_puts_everything_back_to_the_bit(middle, message, order):
    model = three(middle)
    before = bits_of(model)
    with pytest.raises(RuntimeError, match=message) as error:
        swap(model, {name: NEW[name] for name in order})
    assert bits_of(model) == before
    assert error.value.__context__ is None  # what never took a copy was not copied into again, and failed once


class Drifting(torch.Tensor):
    """A tensor that takes a copy wrongly the first time, and refuses the next."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            if args[0].sum() != 0:
                raise RuntimeError("the device is lost")
            return super().__torch_function__(func, types, (args[0], args[1] + 1), kwargs or {})
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_copy_that_is_not_what_was_given_is_found_and_one_that_cannot_go_back_does_not_keep_the_others():
    model = three(torch.zeros(3).as_subclass(Drifting))
    before = bits_of(model)
    with pytest.raises(RuntimeError, match="the device is lost") as error:
        swap(model, {name: NEW[name] for name in ("middle", "first", "last")})
    assert "middle does not hold what was copied into it" in str(error.value.__context__)
    after = bits_of(model)
    assert {name for name in after if after[name] != before[name]} == {"middle"}


# ----------------------------------------------------------------------------------------------------------- the digest


def test_the_digest_does_not_depend_on_order_layout_or_gradients():
    a, b = torch.randn(3, 4), torch.randn(2)
    assert digest({"a": a, "b": b}) == digest({"b": b.clone().requires_grad_(), "a": a.T.contiguous().T})


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(2, 2)},
        {"a": torch.zeros(4)},
        {"a": torch.zeros(1, 4)},
        {"a": torch.zeros(2, 2, dtype=torch.int32)},
        {"a": torch.tensor([[0.0, 0.0], [0.0, -0.0]])},
        {"a": torch.zeros(2, 2), "b": torch.zeros(0)},
        {},
    ],
)
def test_the_digest_depends_on_name_shape_type_and_sign(other):
    assert digest(other) != digest({"a": torch.zeros(2, 2)})


@given(index=st.integers(0, 11), bit=st.integers(0, 15))
def test_the_digest_depends_on_every_single_bit(index, bit):
    tensor = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    flipped = tensor.clone()
    flipped.view(torch.int16).view(-1)[index] ^= (1 << bit) if bit < 15 else -(1 << 15)
    assert digest({"a": tensor}) != digest({"a": flipped})
    assert digest({"a": tensor}) == digest({"a": tensor.clone()})
