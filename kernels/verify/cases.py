"""Every Triton kernel of dpmem_kernels, in the variants that its launcher asks for.

A case holds what the compiler needs (signature, compile-time values, which arguments are divisible
by 16) and what a check of the machine code needs (how many bytes a program reads and writes on its
wide path). What executes compiled kernels or holds them to a budget reads the same list.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton.language as tl

from dpmem_kernels.mask import BLOCK_BOOLS, BLOCK_BYTES
from dpmem_kernels.mask_triton import ROWS, pack_mask_kernel, unpack_mask_kernel
from dpmem_kernels.quantize_triton import BLOCK, dequantize_kernel, quantize_kernel
from dpmem_kernels.tensor_table import CHUNK
from dpmem_kernels.tensor_table_triton import sum_kernel, walk_kernel

DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class KernelCase:
    """One compiled variant of one kernel.

    `signature` gives the run-time arguments' types as Triton writes them ("*bf16", "i64"),
    `constexprs` the rest. `read_bytes` and `written_bytes` are what the wide (16-byte) paths of
    one program move, all paths of one compiled kernel added up; None where width does not matter.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    aligned: tuple[str, ...]
    elements_per_program: int
    read_bytes: int | None
    written_bytes: int | None
    num_warps: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)


def _walk(name: str, source: str | None, destination: str | None, **flags: Any) -> KernelCase:
    """The walk compiles one wide path for each dtype that a list's tensors can have."""
    own_bytes = sum(ITEM_BYTES.values())
    store, load_scale = flags["STORE"], flags["LOAD_SCALE"]
    signature = {"table_ptr": "*i64", "addresses_ptr": "*i64"}
    constexprs = {
        "SOURCE": None if source is None else DTYPES[source],
        "DESTINATION": None if destination is None else DTYPES[destination],
        "SKIP_IF_ONE": False,
        "BLOCK": CHUNK,
        **flags,
    }
    if load_scale:
        signature["scale"] = "*fp32"
    elif store:
        signature["scale"] = "fp32"
    else:
        constexprs["scale"] = None
    signature |= {"found_inf_ptr": "*fp32", "partials_ptr": "*fp32"}
    read = 3 * ITEM_BYTES[source] if source else own_bytes
    written = 3 * ITEM_BYTES[destination] if destination else own_bytes
    return KernelCase(
        name=name,
        kernel=walk_kernel,
        signature=signature,
        constexprs=constexprs,
        aligned=("table_ptr", "addresses_ptr", "partials_ptr"),
        elements_per_program=CHUNK,
        read_bytes=read * CHUNK,
        written_bytes=written * CHUNK if store else None,
        options={"enable_fp_fusion": True},
    )


def _quantize(dtype: str, bits: int, group_size: int, assembly: bool) -> KernelCase:
    words = ("key_low", "key_high", "stream", "step", "rank")
    return KernelCase(
        name=f"quantize_{dtype}_{bits}bit" + ("" if assembly else "_portable"),
        kernel=quantize_kernel,
        signature={"x_ptr": f"*{dtype}", "codes_ptr": "*u8", "meta_ptr": "*i32", "n": "i64"}
        | dict.fromkeys(words, "i32"),
        constexprs={
            "G": group_size,
            "BITS": bits,
            "ROWS": BLOCK // group_size,
            "WIDE": True,
            "ASM": assembly,
        },
        aligned=("x_ptr", "codes_ptr", "meta_ptr"),
        elements_per_program=BLOCK,
        read_bytes=BLOCK * ITEM_BYTES[dtype],
        written_bytes=BLOCK * bits // 8,
        options={"enable_fp_fusion": False},
    )


def _dequantize(dtype: str, bits: int, group_size: int, assembly: bool) -> KernelCase:
    elements = BLOCK * 2 // ITEM_BYTES[dtype]
    return KernelCase(
        name=f"dequantize_{dtype}_{bits}bit" + ("" if assembly else "_portable"),
        kernel=dequantize_kernel,
        signature={"codes_ptr": "*u8", "meta_ptr": "*i32", "out_ptr": f"*{dtype}", "n": "i64"},
        constexprs={
            "G": group_size,
            "BITS": bits,
            "ROWS": elements // group_size,
            "ASM": assembly,
        },
        aligned=("codes_ptr", "meta_ptr", "out_ptr"),
        elements_per_program=elements,
        # A thread writes four fp32 numbers at a time, whose codes do not fill a wide load.
        read_bytes=None if dtype == "fp32" else elements * bits // 8,
        written_bytes=elements * ITEM_BYTES[dtype],
        options={"enable_fp_fusion": False},
    )


def _mask(name: str, kernel: Any, arguments: tuple[str, str], pack: bool) -> KernelCase:
    bools, packed = ROWS * BLOCK_BOOLS, ROWS * BLOCK_BYTES
    return KernelCase(
        name=name,
        kernel=kernel,
        signature=dict.fromkeys(arguments, "*u8") | {"n": "i64"},
        constexprs={"ROWS": ROWS, "WIDE": True},
        aligned=arguments,
        elements_per_program=bools,
        read_bytes=bools if pack else packed,
        written_bytes=packed if pack else bools,
    )


GRADIENT_CASES = (
    _walk("grad_stats", None, None, STORE=False, LOAD_SCALE=False),
    _walk("grad_unscale", None, None, STORE=True, LOAD_SCALE=True),
    _walk("grad_scale", None, None, STORE=True, LOAD_SCALE=True, SKIP_IF_ONE=True),
    *(_walk(f"pack_{d}", None, d, STORE=True, LOAD_SCALE=False) for d in DTYPES),
    *(_walk(f"unpack_{d}", d, None, STORE=True, LOAD_SCALE=True) for d in DTYPES),
    KernelCase(
        name="sum",
        kernel=sum_kernel,
        signature={"partials_ptr": "*fp32", "n": "i32", "sum_ptr": "*fp32"},
        constexprs={"BLOCK": 1024},
        aligned=("partials_ptr", "sum_ptr"),
        elements_per_program=1024,
        read_bytes=None,
        written_bytes=None,
    ),
)


def activation_cases(assembly: bool) -> tuple[KernelCase, ...]:
    """The activation kernels, with NVIDIA's inline assembly or (other GPUs) without."""
    formats = [(dtype, bits) for dtype in DTYPES for bits in (8, 4, 2)]
    return (
        *(_quantize(dtype, bits, 64, assembly) for dtype, bits in formats),
        *(_dequantize(dtype, bits, 64, assembly) for dtype, bits in formats),
        _mask("pack_mask", pack_mask_kernel, ("mask_ptr", "bits_ptr"), pack=True),
        _mask("unpack_mask", unpack_mask_kernel, ("bits_ptr", "mask_ptr"), pack=False),
    )
