"""Weights in few bits: no weight is further off than half a step, and products are those of the unpacked weights."""

import pytest
import torch

from equipoise.ops.packed import GROUPS, Full, Int4, Int8, num_bytes

O, I = 48, 128  # noqa: E741
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FORMATS = [Int8(torch.float32), *(Int4(group, torch.float32) for group in GROUPS)]
ALL = pytest.mark.parametrize("format", FORMATS, ids=[each.name for each in FORMATS])


def weights() -> dict[str, torch.Tensor]:
    """What weights may look like, and what they had better not."""
    normal = torch.randn(O, I)
    return {
        "normal": 0.02 * normal,
        "one outlier": torch.where(torch.arange(I) == 5, 50.0, 0.01 * normal),
        "rows of other sizes": normal * torch.logspace(-6, 6, O)[:, None],
        "all of one sign": normal.abs() + 1.0,
        "zeros": torch.zeros(O, I),
        "all equal": torch.full((O, I), 0.3),
        "one row of zeros": torch.where(torch.arange(O)[:, None] == 3, 0.0, normal),
    }


def in_dtype(format, dtype):
    return type(format)(format.group, dtype) if isinstance(format, Int4) else Int8(dtype)


@DTYPES
@pytest.mark.parametrize("name", weights())
def test_int8_is_at_most_half_a_step_off(name, dtype):
    weight = weights()[name]
    format = Int8(dtype)
    values, scale_O = format.pack(weight)
    assert values.dtype == torch.int8
    assert int(values.int().abs().max()) <= 127
    off = (format.unpack((values, scale_O)) - weight).abs()
    assert (off <= scale_O.float()[:, None] / 2 * (1 + 1e-5)).all()
    steps = weight.abs().amax(1) / 127  # the step itself: a 127th of the row's largest weight, rounded to the type
    busy = steps > 0
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(scale_O.float()[busy], steps[busy], rtol=rounding, atol=0)


@DTYPES
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", weights())
def test_int4_is_at_most_half_a_step_off(name, group, dtype):
    """In bf16 the zero is rounded too, by at most a 256th of itself."""
    weight = weights()[name]
    format = Int4(group, dtype)
    values, scales_and_zeros = format.quantised(weight)
    assert int(values.min()) >= 0
    assert int(values.max()) <= 15
    scale, zero = (each.repeat_interleave(group, 1) for each in scales_and_zeros.float().transpose(0, 1).unbind(-1))
    off = (format.dequantised(values, scales_and_zeros) - weight).abs()
    rounded = zero.abs() * 2**-8 if dtype == torch.bfloat16 else zero.abs() * 1e-6
    assert (off <= scale / 2 * (1 + 1e-5) + rounded).all()
    low, high = (f(weight.unflatten(1, (-1, group)), 2) for f in (torch.amin, torch.amax))
    steps, kept = (high - low) / 15, scales_and_zeros.float()[..., 0].t()
    busy = steps > 0
    torch.testing.assert_close(kept[busy], steps[busy], rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_int4_by_hand():
    """A group from -1 to 2: steps of 0.2, zero at -1 + 8 * 0.2 = 0.6. 0.29 is 1.29 above the lowest: 6.45 steps, 6."""
    weight = torch.zeros(16, 32)
    weight[0, :3] = torch.tensor([-1.0, 2.0, 0.29])
    format = Int4(32, torch.float32)
    values, scales_and_zeros = format.quantised(weight)
    torch.testing.assert_close(scales_and_zeros[0, 0], torch.tensor([0.2, 0.6]))
    assert values[0, :4].tolist() == [0, 15, 6, 5]  # 0.0 is 5 steps above -1
    torch.testing.assert_close(format.dequantised(values, scales_and_zeros)[0, 2], torch.tensor(0.2))


@pytest.mark.parametrize("group", GROUPS)
def test_the_kernels_order_hides_the_same_values(group):
    weight = torch.randn(O, I)
    format = Int4(group, torch.float32)
    torch.testing.assert_close(
        format.unpack(format.pack(weight)), format.dequantised(*format.quantised(weight)), rtol=0, atol=1e-6
    )


@ALL
@DTYPES
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 33, 100])
@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16], ids=["x fp32", "x bf16"])
def test_products_are_those_of_the_unpacked_weight(format, dtype, rows, of_x):
    format = in_dtype(format, dtype)
    parts, x = format.pack(torch.randn(O, I)), torch.randn(rows, I).to(of_x)
    y = format.product(x, parts)
    assert y.dtype == of_x
    assert y.shape == (rows, O)
    expected = x.double() @ format.unpack(parts).double().t()
    largest = expected.abs().max() if rows else 1.0
    exact = dtype == of_x == torch.float32
    assert ((y.double() - expected).abs() <= largest * (1e-5 if exact else 2**-7)).all()


@ALL
@DTYPES
def test_sizes_are_what_was_described(format, dtype):
    format = in_dtype(format, dtype)
    parts, described = format.pack(torch.randn(O, I)), format.describe(O, I)
    assert [(part.dtype, tuple(part.shape)) for part in parts] == list(described)
    scale = dtype.itemsize
    per_weight = 1 + scale / I if isinstance(format, Int8) else 0.5 + 2 * scale / format.group
    assert sum(part.nbytes for part in parts) == num_bytes(described) == O * I * per_weight


def test_full_is_the_weight_itself():
    weight = torch.randn(O, I)
    format = Full()
    assert torch.equal(format.unpack(format.pack(weight)), weight)
    x = torch.randn(3, I)
    assert torch.equal(format.product(x, format.pack(weight)), x @ weight.t())


@pytest.mark.parametrize(
    ("format", "shape", "message"),
    [
        (Int8(), (16, 24), r"int8: expected inputs in multiples of 16, got 24: torch's kernel would read past"),
        (
            Int4(64),
            (16, 96),
            r"int4-64: expected inputs in multiples of 64 .* weight of 16 by 96; take groups of 32",
        ),
        (Int4(32), (24, 64), r"outputs in multiples of 16, got a weight of 24 by 64; take int8"),
    ],
    ids=["int8", "group", "outputs"],
)
def test_sizes_that_the_kernels_can_not_take(format, shape, message):
    with pytest.raises(ValueError, match=message):
        format.pack(torch.randn(shape))


@ALL
def test_what_has_no_nearest_step(format):
    weight = torch.randn(O, I)
    weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=f"{format.name}: a weight is not finite"):
        format.pack(weight)


def test_types_groups_and_devices_that_are_none():
    with pytest.raises(
        ValueError, match=r"int8: expected products in float32 or bfloat16, got torch.float64; take bfloat16"
    ):
        Int8(torch.float64)
    with pytest.raises(ValueError, match=r"int4: expected groups of 32, 64, 128 weights, got 48"):
        Int4(48)
    with pytest.raises(ValueError, match=r"int8: expected weights on the CPU, got meta"):
        Int8().pack(torch.empty(16, 16, device="meta"))
