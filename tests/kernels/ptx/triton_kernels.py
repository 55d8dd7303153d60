"""Small Triton kernels, and a program that prints what they compile to, as JSON.

Run as a script, without TRITON_INTERPRET: Triton reads it when a kernel is decorated, and tests
set it. Prints {kernel: {architecture: {"ptx": text, "shared": bytes}}}.
"""

import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dpmem_kernels.assembly_triton import as_float32, interleave_bytes, rounded_pair, upper_halves


@triton.jit
def masked_add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x + y, mask=mask)


@triton.jit
def row_sum(x_ptr, out_ptr, n_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < n_columns
        total += tl.load(x_ptr + row * n_columns + columns, mask=mask, other=0.0)
    tl.store(out_ptr + row, tl.sum(total))


@triton.jit
def philox_words(out_ptr, n, seed, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.randint(seed, offsets), mask=offsets < n)


@triton.jit
def cast_bf16(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x.to(tl.bfloat16), mask=mask)


@triton.jit
def pack_int4(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Rounds down, clamps to [-8, 7], packs two neighbours into a byte."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    codes = tl.minimum(tl.maximum(tl.floor(x), -8.0), 7.0).to(tl.int32) & 15
    low, high = tl.split(tl.reshape(codes, (BLOCK // 2, 2)))
    pairs = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    tl.store(out_ptr + pairs, (low | (high << 4)).to(tl.uint8), mask=pairs < n // 2)


@triton.jit
def transpose(x_ptr, out_ptr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + rows * SIZE + columns)
    tl.store(out_ptr + rows * SIZE + columns, tl.trans(x))


@triton.jit
def histogram(x_ptr, counts_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0)
    tl.atomic_add(counts_ptr + x, tl.full((BLOCK,), 1, tl.int32), mask=mask, sem="relaxed")


@triton.jit
def float32_of(x_ptr, out_ptr, ASM: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, as_float32(tl.load(x_ptr + offsets), ASM))


@triton.jit
def words_of_pairs(x_ptr, out_ptr, Element: tl.constexpr, ASM: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = x_ptr + 2 * offsets
    word = rounded_pair(tl.load(x), tl.load(x + 1), Element, ASM)
    tl.store(out_ptr + offsets, word)


@triton.jit
def permuted_bytes(x_ptr, upper_ptr, bytes_ptr, ASM: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x_ptr + 2 * offsets), tl.load(x_ptr + 2 * offsets + 1)
    tl.store(upper_ptr + offsets, upper_halves(a, b, ASM))
    tl.store(bytes_ptr + offsets, interleave_bytes(a, b, ASM))


def with_twin(name: str, kernel: object, types: str, **constants: object) -> dict[str, tuple]:
    """A kernel of what is assembly or not, both ways."""
    return {
        f"{name} {form}": (kernel, types, {**constants, "ASM": level, "BLOCK": 1024})
        for form, level in (("assembly", 80), ("plain", 0))
    }


KERNELS = {
    "masked_add": (masked_add, "*fp32 *fp32 *fp32 i32", {"BLOCK": 1024}),
    "row_sum": (row_sum, "*fp32 *fp32 i32", {"BLOCK": 1024}),
    "philox_words": (philox_words, "*i32 i32 i32", {"BLOCK": 512}),
    "cast_bf16": (cast_bf16, "*fp32 *bf16 i32", {"BLOCK": 1024}),
    "pack_int4": (pack_int4, "*fp32 *u8 i32", {"BLOCK": 1024}),
    "transpose": (transpose, "*fp16 *fp16", {"SIZE": 64}),
    "histogram": (histogram, "*i32 *i32 i32", {"BLOCK": 256}),
    **with_twin("bf16 as float32", float32_of, "*bf16 *fp32"),
    **with_twin("fp16 as float32", float32_of, "*fp16 *fp32"),
    **with_twin("pairs of bf16", words_of_pairs, "*fp32 *u32", Element=tl.bfloat16),
    **with_twin("pairs of fp16", words_of_pairs, "*fp32 *u32", Element=tl.float16),
    **with_twin("bytes", permuted_bytes, "*u32 *u32 *u32"),
}
ARCHITECTURES = (80, 90, 100, 120)


def compile_kernel(name: str, architecture: int) -> dict[str, object]:
    kernel, types, constants = KERNELS[name]
    signature = dict(zip(kernel.arg_names, types.split(), strict=False))
    aligned = [[["tt.divisibility", 16]] if t.startswith("*") else [] for t in signature.values()]
    source = ASTSource(
        kernel,
        signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(index,): attribute for index, attribute in enumerate(aligned) if attribute},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    return {"ptx": compiled.asm["ptx"], "shared": compiled.metadata.shared}


if __name__ == "__main__":
    json.dump({n: {a: compile_kernel(n, a) for a in ARCHITECTURES} for n in KERNELS}, sys.stdout)
