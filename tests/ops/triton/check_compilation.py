"""The Triton kernels through Triton's compiler, down to machine code, for GPUs that are not here.

The interpreter takes what the compiler would refuse. Not collected by itself: test_kernels.py runs it.
"""

import warnings

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from equipoise.ops.triton.blocks import Blocks, cut_for
from equipoise.ops.triton.kernels import order, products, rows

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # bytes a block may have, CUDA programming guide
TYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
INT64 = ("token_ids_ptr", "rows_ptr", "token_ends_ptr", "keys_ptr", "order_ptr")
INT32 = ("table_ptr", "ends_ptr", "starts_ptr")
FP32 = ("scale_ptr", "grad_scale_ptr")


def signature(kernel, constants: dict, dtype: str, blocks_of: dict) -> dict[str, str]:
    """Types of the arguments, as a launch on tensors would find them."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in blocks_of:
            types[name] = f"tensordesc<{dtype}{list(blocks_of[name])}>"
        elif not name.endswith("_ptr"):
            types[name] = "i32"
        elif name == "counts_ptr":
            types[name] = "*i64" if kernel is order.tile_table_kernel else "*i32"
        else:
            kind = "i64" if name in INT64 else "i32" if name in INT32 else "fp32" if name in FP32 else dtype
            types[name] = f"*{kind}"
    return types


def shared_bytes(kernel, constants: dict, dtype: str, capability: int, blocks=None, blocks_of=()) -> int:
    """Compile to machine code; the shared memory it asks for. blocks_of: sizes of the blocks of each descriptor."""
    types = signature(kernel, constants, dtype, dict(blocks_of))
    plain = [name for name in kernel.arg_names if name not in constants and not types[name].startswith("tensordesc")]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in plain if name != "num_tiles"}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, constexprs=values, attrs=aligned)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages} if blocks else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a default that Triton is about to change
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > 0
    return compiled.metadata.shared


def sides(blocks: Blocks) -> dict:
    return {"BLOCK_M": blocks.rows, "BLOCK_N": blocks.cols, "BLOCK_K": blocks.inner, "GROUP": 8}


def of_rows(blocks: Blocks, transposed: bool) -> dict:
    weight = (1, blocks.inner, blocks.cols) if transposed else (1, blocks.cols, blocks.inner)
    return {"in_desc": (blocks.rows, blocks.inner), "weight_desc": weight}


def of_weights(blocks: Blocks) -> dict:
    return {"left_desc": (blocks.inner, blocks.rows), "right_desc": (blocks.inner, blocks.cols)}


VARIANTS = {
    "up": ("up", products.up_kernel, {"ACTIVATION": "swiglu", "GATED": True, "STORE_Z": True}),
    "up-clamped": ("up", products.up_kernel, {"ACTIVATION": "clamped_swiglu", "GATED": True, "STORE_Z": False}),
    "up-gelu": ("up", products.up_kernel, {"ACTIVATION": "gelu", "GATED": False, "STORE_Z": True}),
    "down": ("down", products.rows_kernel, {"TRANSPOSED": False, "SCALED": True}),
    "grad-a": ("grad_a", products.rows_kernel, {"TRANSPOSED": True, "SCALED": False}),
    "grad-x": ("grad_x", products.rows_kernel, {"TRANSPOSED": True, "SCALED": False}),
    "weights": ("weights", products.weights_kernel, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "capability", "mean_rows"),
    [
        ("bf16", 90, 1000),
        pytest.param("bf16", 90, 1, marks=pytest.mark.slow),
        pytest.param("bf16", 80, 1000, marks=pytest.mark.slow),
        pytest.param("fp16", 86, 1, marks=pytest.mark.slow),
        pytest.param("fp32", 86, 1000, marks=pytest.mark.slow),
        pytest.param("fp32", 90, 20, marks=pytest.mark.slow),
    ],
)
def test_products_compile_and_fit(variant, dtype, capability, mean_rows):
    name, kernel, constants = VARIANTS[variant]
    blocks = getattr(cut_for(mean_rows * 8, 8, TYPES[dtype], SHARED_MEMORY[capability] - 2048), name)
    if name == "up":
        blocks_of = {"up_desc": (1, blocks.cols, blocks.inner)}
    else:
        blocks_of = of_weights(blocks) if name == "weights" else of_rows(blocks, constants["TRANSPOSED"])
    taken = shared_bytes(kernel, constants | sides(blocks), dtype, capability, blocks, blocks_of)
    assert taken <= SHARED_MEMORY[capability]


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        (order.histogram_kernel, {"BLOCK": 128, "BLOCK_KEYS": 64}),
        (order.place_kernel, {"BLOCK": 128}),
        (order.tile_table_kernel, {"BLOCK_M": 128, "BLOCK_E": 512, "BLOCK_TILES": 16}),
        (rows.sum_kernel, {"RAGGED": True, "BLOCK_D": 1024}),
        (rows.sum_kernel, {"RAGGED": False, "BLOCK_D": 1024}),
        (rows.activation_backward_kernel, {"ACTIVATION": "swiglu", "GATED": True, "BLOCK_F": 1024}),
        (rows.activation_backward_kernel, {"ACTIVATION": "clamped_swiglu", "GATED": True, "BLOCK_F": 512}),
        (rows.activation_backward_kernel, {"ACTIVATION": "gelu", "GATED": False, "BLOCK_F": 1024}),
    ],
    ids=["histogram", "place", "tile-table", "sum-ragged", "sum", "swiglu", "clamped", "gelu"],
)
def test_the_others_compile(kernel, constants):
    assert shared_bytes(kernel, constants, "bf16", 80) <= SHARED_MEMORY[80]
