"""The Triton kernels through Triton's compiler, down to machine code, for GPUs that are not here.

The interpreter takes what the compiler would refuse. Not collected by itself: test_under_interpreter.py runs it.
"""

import warnings

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from equipoise.ops.triton.kernels import order, products
from equipoise.ops.triton.order import Blocks, blocks_for

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # bytes a block may have, CUDA programming guide
TYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
INT64 = ("token_ids_ptr", "rows_ptr", "token_ends_ptr", "keys_ptr", "order_ptr")
INT32 = ("table_ptr", "ends_ptr", "starts_ptr")
FP32 = ("scale_ptr", "partial_ptr")


def signature(kernel, constants: dict, dtype: str) -> dict[str, str]:
    """Types of the arguments, as a launch on tensors would find them."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif not name.endswith("_ptr"):
            types[name] = "i32"
        elif name == "counts_ptr":
            types[name] = "*i64" if kernel is order.tile_table_kernel else "*i32"
        else:
            kind = "i64" if name in INT64 else "i32" if name in INT32 else "fp32" if name in FP32 else dtype
            types[name] = f"*{kind}"
    return types


def shared_bytes(kernel, constants: dict, dtype: str, capability: int, blocks: Blocks | None = None) -> int:
    """Compile to machine code; the shared memory it asks for."""
    types = signature(kernel, constants, dtype)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, constexprs=values, attrs=aligned)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages} if blocks else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a default that Triton is about to change
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > 0
    return compiled.metadata.shared


def cut(blocks: Blocks) -> dict:
    return {"BLOCK_M": blocks.rows, "BLOCK_N": blocks.cols, "BLOCK_K": blocks.inner, "GROUP": 8}


VARIANTS = {
    "up": (products.up_kernel, {"ACTIVATION": "swiglu", "GATED": True, "STORE_Z": True}),
    "up-clamped": (products.up_kernel, {"ACTIVATION": "clamped_swiglu", "GATED": True, "STORE_Z": False}),
    "up-gelu": (products.up_kernel, {"ACTIVATION": "gelu", "GATED": False, "STORE_Z": True}),
    "down": (products.rows_kernel, {"TRANSPOSED": False, "SCALED": True}),
    "grad-x": (products.rows_kernel, {"TRANSPOSED": True, "SCALED": False}),
    "grad-z": (products.grad_z_kernel, {"ACTIVATION": "swiglu", "GATED": True}),
    "grad-z-clamped": (products.grad_z_kernel, {"ACTIVATION": "clamped_swiglu", "GATED": True}),
    "grad-z-gelu": (products.grad_z_kernel, {"ACTIVATION": "gelu", "GATED": False}),
    "grad-down": (products.weights_kernel, {"GATHER_LEFT": True, "GATHER_RIGHT": False}),
    "grad-up": (products.weights_kernel, {"GATHER_LEFT": False, "GATHER_RIGHT": True}),
}


ALL = [pytest.param(name, marks=pytest.mark.slow if "-gelu" in name or "-clamped" in name else ()) for name in VARIANTS]


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize(
    ("dtype", "capability", "mean_rows"),
    [
        ("bf16", 90, 1000),
        pytest.param("bf16", 80, 1000, marks=pytest.mark.slow),
        pytest.param("fp16", 86, 1, marks=pytest.mark.slow),
        pytest.param("fp32", 86, 1000, marks=pytest.mark.slow),
    ],
)
def test_products_compile_and_fit(variant, dtype, capability, mean_rows):
    kernel, constants = VARIANTS[variant]
    blocks = blocks_for(mean_rows * 8, 8, TYPES[dtype])
    assert shared_bytes(kernel, constants | cut(blocks), dtype, capability, blocks) <= SHARED_MEMORY[capability]


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        (order.histogram_kernel, {"BLOCK": 128, "BLOCK_KEYS": 64}),
        (order.place_kernel, {"BLOCK": 128}),
        (order.tile_table_kernel, {"BLOCK_M": 128, "BLOCK_E": 512, "BLOCK_TILES": 16}),
        (products.sum_kernel, {"RAGGED": True, "BLOCK_D": 1024}),
        (products.sum_kernel, {"RAGGED": False, "BLOCK_D": 1024}),
    ],
    ids=["histogram", "place", "tile-table", "sum-ragged", "sum"],
)
def test_the_others_compile(kernel, constants):
    assert shared_bytes(kernel, constants, "bf16", 80) <= SHARED_MEMORY[80]
