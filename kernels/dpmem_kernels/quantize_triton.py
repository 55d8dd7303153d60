"""quantize and dequantize on GPUs: the Triton kernels for the format in quantize.py."""

# Arguments of Triton kernels have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .assembly_triton import (
    assembly_of,
    fma_of_difference,
    instruction,
    interleave_bytes,
    max_nan_bf16x2,
    max_nan_f16x2,
    middle_bytes,
    min_nan_bf16x2,
    min_nan_f16x2,
    reciprocal,
    rounded_pair,
    upper_halves,
)
from .philox_triton import philox
from .quantize import NAN_META, ROUND_UP, SCALE_LIMIT, SMALLEST_SCALE, Quantized

_NAN_META = tl.constexpr(NAN_META)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_SCALE_LIMIT = tl.constexpr(SCALE_LIMIT)
_ROUND_UP = tl.constexpr(ROUND_UP)

# Elements in a program: four 128-bit loads of 16-bit elements a thread with 4 warps.
BLOCK = 4096


@triton.jit
def _max_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _min_nan(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _split(w, Element: tl.constexpr):
    """A word of two neighbours -> (first, second) in float32."""
    if Element == tl.bfloat16:
        first = (w << 16).to(tl.float32, bitcast=True)
        second = (w & 0xFFFF0000).to(tl.float32, bitcast=True)
    elif Element == tl.float16:
        first = w.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (w >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        first = w.to(tl.uint32).to(tl.float32, bitcast=True)
        second = (w >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def _join(a, b, Element: tl.constexpr, ASM: tl.constexpr):
    """Two neighbours in float32 -> their word, rounded to nearest even."""
    if Element == tl.float32:
        low = a.to(tl.uint32, bitcast=True).to(tl.uint64)
        return low | (b.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
    else:
        return rounded_pair(a, b, Element, ASM)


@triton.jit
def _element_word(p, e, last):
    """The word of elements e and e + 1 read one by one, both clamped to `last`."""
    SIZE: tl.constexpr = p.dtype.element_ty.primitive_bitwidth
    half: tl.constexpr = tl.uint32 if SIZE == 32 else tl.uint16
    word: tl.constexpr = tl.uint64 if SIZE == 32 else tl.uint32
    p = p.to(tl.pointer_type(half))
    low = tl.load(p + tl.minimum(e, last)).to(word)
    return low | (tl.load(p + tl.minimum(e + 1, last)).to(word) << SIZE)


@triton.jit
def _word_pointer(p):
    if p.dtype.element_ty == tl.float32:
        return p.to(tl.pointer_type(tl.uint64))
    else:
        return p.to(tl.pointer_type(tl.uint32))


@triton.jit
def _code_pair(
    w, r, zero, inverse, unknown, Element: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr
):
    """Codes of a word's two elements in the halves of a word: for 8 bits in their lower bytes,
    below what else was in the sum; for fewer each plus 0x4300, the exponent of the rounded sum,
    left in place because removing it costs.

    `unknown` is 0. A shift and the sum with a base that the compiler does not know are one
    instruction; with a constant the sum becomes an or, and two."""
    a, b = _split(w, Element)
    if BITS == 8:
        base = unknown + 0x43800000
        u = (r & 0x7FFF) | base
        v = (r >> 17) + base
    elif ASM:
        base = tl.full(r.shape, 0x43000000, tl.uint32)
        u = instruction("prmt.b32 $0, $1, $2, 0x7610;", r, base)
        v = instruction("prmt.b32 $0, $1, $2, 0x7632;", r, base)
    else:
        base = unknown + 0x43000000
        u = (r & 0xFFFF) | base
        v = (r >> 16) + base
    u = u.to(tl.float32, bitcast=True)
    v = v.to(tl.float32, bitcast=True)
    u, v = fma_of_difference(a, b, zero, inverse, u, v, ASM)
    u = u.to(tl.uint32, bitcast=True)
    v = v.to(tl.uint32, bitcast=True)
    if BITS == 8:
        return middle_bytes(u, v, ASM)
    else:
        return upper_halves(u, v, ASM)


@triton.jit
def _store_codes(
    w0, w1, w2, w3, pin, unknown, inside, codes_ptr, meta_ptr, g0,
    key_low, key_high, stream, step, rank,
    Element: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Groups g0 .. g0 + ROWS, as the words of their quarters [ROWS, W], to codes and meta.

    `inside` [ROWS, 1] says which exist; None says all."""
    W: tl.constexpr = G // 8
    LEVELS: tl.constexpr = (1 << BITS) - 1
    row = tl.arange(0, ROWS)[:, None]
    word = tl.arange(0, W)[None, :]

    if ASM and Element == tl.float16:
        high = max_nan_f16x2(max_nan_f16x2(w0, w1), max_nan_f16x2(w2, w3))
        low = min_nan_f16x2(min_nan_f16x2(w0, w1), min_nan_f16x2(w2, w3))
        a, b = _split(tl.reduce(high, 1, max_nan_f16x2, keep_dims=True), Element)
        c, d = _split(tl.reduce(low, 1, min_nan_f16x2, keep_dims=True), Element)
        high = _max_nan(a, b)
        low = _min_nan(c, d)
    elif ASM and Element == tl.bfloat16:
        high = max_nan_bf16x2(max_nan_bf16x2(w0, w1), max_nan_bf16x2(w2, w3))
        low = min_nan_bf16x2(min_nan_bf16x2(w0, w1), min_nan_bf16x2(w2, w3))
        a, b = _split(tl.reduce(high, 1, max_nan_bf16x2, keep_dims=True), Element)
        c, d = _split(tl.reduce(low, 1, min_nan_bf16x2, keep_dims=True), Element)
        high = _max_nan(a, b)
        low = _min_nan(c, d)
    else:
        a0, b0 = _split(w0, Element)
        a1, b1 = _split(w1, Element)
        a2, b2 = _split(w2, Element)
        a3, b3 = _split(w3, Element)
        high = _max_nan(_max_nan(a0, b0), _max_nan(a1, b1))
        high = _max_nan(high, _max_nan(_max_nan(a2, b2), _max_nan(a3, b3)))
        low = _min_nan(_min_nan(a0, b0), _min_nan(a1, b1))
        low = _min_nan(low, _min_nan(_min_nan(a2, b2), _min_nan(a3, b3)))
        high = tl.reduce(high, 1, _max_nan, keep_dims=True)
        low = tl.reduce(low, 1, _min_nan, keep_dims=True)

    z = tl.where(low == 0.0, 0.0, low).to(tl.int32, bitcast=True)
    z = (z + ((z >> 31) & 0xFFFF)) & -65536
    zero = z.to(tl.float32, bitcast=True)
    raw_scale = (high - zero) * (1.0 / LEVELS)
    raised = (raw_scale.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) + _ROUND_UP
    representable = raised < _SCALE_LIMIT
    s = tl.minimum(tl.maximum(raised & 0xFFFF0000, _SMALLEST_SCALE), _SCALE_LIMIT)
    inverse = reciprocal(s.to(tl.float32, bitcast=True), ASM)
    meta = tl.where(representable, s | (z.to(tl.uint32, bitcast=True) >> 16), _NAN_META)
    tl.store(meta_ptr + g0 + row, meta.to(tl.int32, bitcast=True), mask=inside)

    counter = (g0.to(tl.uint32) * W + (row * W + word).to(tl.uint32)) | pin
    blank = tl.zeros_like(counter)
    r0, r1, r2, r3 = philox(
        counter, blank + stream.to(tl.uint32), blank + step.to(tl.uint32),
        blank + rank.to(tl.uint32), key_low.to(tl.uint32), key_high.to(tl.uint32), ASM,
    )  # fmt: skip
    f0 = _code_pair(w0, r0, zero, inverse, unknown, Element, BITS, ASM)
    f1 = _code_pair(w1, r1, zero, inverse, unknown, Element, BITS, ASM)
    f2 = _code_pair(w2, r2, zero, inverse, unknown, Element, BITS, ASM)
    f3 = _code_pair(w3, r3, zero, inverse, unknown, Element, BITS, ASM)

    if BITS == 8:
        out = codes_ptr.to(tl.pointer_type(tl.uint32)) + g0 * (G // 4)
        out += row * (G // 4) + word
        first = tl.where(representable, interleave_bytes(f0, f1, ASM), 0)
        second = tl.where(representable, interleave_bytes(f2, f3, ASM), 0)
        tl.store(out, first, mask=inside)
        tl.store(out + W, second, mask=inside)
    else:
        # Horner's rule in both halves at once; the exponents add up to a known constant.
        STEP: tl.constexpr = 1 << BITS
        SUM: tl.constexpr = (0x43004300 * (1 + STEP + STEP**2 + STEP**3)) & 0xFFFFFFFF
        v = ((f3 * STEP + f2) * STEP + f1) * STEP + f0 - SUM
        v = tl.where(representable, v, 0)
        if BITS == 4:
            out = codes_ptr.to(tl.pointer_type(tl.uint32)) + g0 * W
            tl.store(out + (row * W + word), v, mask=inside)
        else:
            out = codes_ptr.to(tl.pointer_type(tl.uint16)) + g0 * W
            tl.store(out + (row * W + word), (v | (v >> 8)).to(tl.uint16), mask=inside)


@triton.jit(do_not_specialize=["n", "key_low", "key_high", "stream", "step", "rank"])
def quantize_kernel(
    x_ptr, codes_ptr, meta_ptr, n, key_low, key_high, stream, step, rank,
    G: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """ROWS groups a program. WIDE: x is 16-byte aligned and may be read in words."""
    W: tl.constexpr = G // 8
    Element: tl.constexpr = x_ptr.dtype.element_ty
    g0 = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    word = tl.arange(0, W)[None, :]
    x_ptr += g0 * G
    unknown = (n.to(tl.int64) >> 40).to(tl.uint32)  # zero: n is at most 2^35
    if WIDE and (g0 + ROWS) * G <= n:
        p = _word_pointer(x_ptr) + (row * (G // 2) + word)
        w0 = tl.load(p)
        w1 = tl.load(p + W)
        w2 = tl.load(p + 2 * W)
        w3 = tl.load(p + 3 * W)
        # All zero, though the compiler cannot know: made from loaded data it gives the noise
        # the layout of the data, which otherwise passes through shared memory to get it.
        pin = (w0.to(tl.uint64) >> 63 >> 1).to(tl.uint32)
        _store_codes(
            w0, w1, w2, w3, pin, unknown, None, codes_ptr, meta_ptr, g0,
            key_low, key_high, stream, step, rank, Element, G, BITS, ROWS, ASM,
        )  # fmt: skip
    else:
        e = row * G + 2 * word
        last = (n - 1 - g0 * G).to(tl.int32)
        inside = row * G <= last
        w0 = _element_word(x_ptr, e, last)
        w1 = _element_word(x_ptr, e + G // 4, last)
        w2 = _element_word(x_ptr, e + G // 2, last)
        w3 = _element_word(x_ptr, e + 3 * (G // 4), last)
        pin = tl.zeros((ROWS, W), tl.uint32)
        _store_codes(
            w0, w1, w2, w3, pin, unknown, inside, codes_ptr, meta_ptr, g0,
            key_low, key_high, stream, step, rank, Element, G, BITS, ROWS, ASM,
        )  # fmt: skip


@triton.jit
def _values(w, SHIFT: tl.constexpr, scale, zero, BITS: tl.constexpr):
    """(first, second) element of a word whose codes start at SHIFT in each half of w."""
    HALF: tl.constexpr = 8 if BITS == 2 else 16
    FIELD: tl.constexpr = ((1 << BITS) - 1) << SHIFT
    # 2^23 + code * 2^SHIFT written as bits: an exact conversion by the units that do the
    # arithmetic. The power of two comes out of the scale, exactly too.
    a = ((w & FIELD) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    b = (((w >> HALF) & FIELD) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    step = scale * (0.5**SHIFT)
    return tl.fma(a, step, zero), tl.fma(b, step, zero)


@triton.jit
def _restore(meta, v0, v1, BITS: tl.constexpr):
    """The elements of four quarters from metadata [ROWS, 1] and words of codes [ROWS, W]; v1 is
    the second half of the codes for 8 bits, and not used for fewer."""
    scale = (meta & -65536).to(tl.float32, bitcast=True)
    zero = (meta << 16).to(tl.float32, bitcast=True)
    a0, b0 = _values(v0, 0, scale, zero, BITS)
    a1, b1 = _values(v0, BITS, scale, zero, BITS)
    if BITS == 8:
        a2, b2 = _values(v1, 0, scale, zero, BITS)
        a3, b3 = _values(v1, BITS, scale, zero, BITS)
    else:
        a2, b2 = _values(v0, 2 * BITS, scale, zero, BITS)
        a3, b3 = _values(v0, 3 * BITS, scale, zero, BITS)
    return a0, b0, a1, b1, a2, b2, a3, b3


@triton.jit(do_not_specialize=["n"])
def dequantize_kernel(
    codes_ptr, meta_ptr, out_ptr, n,
    G: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """ROWS groups a program; out is 16-byte aligned and holds n elements, no padding."""
    W: tl.constexpr = G // 8
    Element: tl.constexpr = out_ptr.dtype.element_ty
    Word: tl.constexpr = tl.uint16 if BITS == 2 else tl.uint32
    STRIDE: tl.constexpr = 2 * W if BITS == 8 else W
    SECOND: tl.constexpr = W if BITS == 8 else 0
    g0 = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    word = tl.arange(0, W)[None, :]
    p = codes_ptr.to(tl.pointer_type(Word)) + g0 * STRIDE + (row * STRIDE + word)
    meta_ptr += g0 + row
    out_ptr += g0 * G
    if (g0 + ROWS) * G <= n:
        v = tl.load(p).to(tl.uint32)
        a0, b0, a1, b1, a2, b2, a3, b3 = _restore(
            tl.load(meta_ptr), v, tl.load(p + SECOND).to(tl.uint32), BITS
        )
        q = _word_pointer(out_ptr) + (row * (G // 2) + word)
        tl.store(q, _join(a0, b0, Element, ASM))
        tl.store(q + W, _join(a1, b1, Element, ASM))
        tl.store(q + 2 * W, _join(a2, b2, Element, ASM))
        tl.store(q + 3 * W, _join(a3, b3, Element, ASM))
    else:
        left = (n - g0 * G).to(tl.int32)
        inside = row * G < left
        v = tl.load(p, mask=inside, other=0).to(tl.uint32)
        second = tl.load(p + SECOND, mask=inside, other=0).to(tl.uint32)
        meta = tl.load(meta_ptr, mask=inside, other=0)
        a0, b0, a1, b1, a2, b2, a3, b3 = _restore(meta, v, second, BITS)
        e = row * G + 2 * word
        _store_pair(out_ptr, e, a0, b0, left)
        _store_pair(out_ptr, e + G // 4, a1, b1, left)
        _store_pair(out_ptr, e + G // 2, a2, b2, left)
        _store_pair(out_ptr, e + 3 * (G // 4), a3, b3, left)


@triton.jit
def _store_pair(p, e, a, b, left):
    tl.store(p + e, a.to(p.dtype.element_ty), mask=e < left)
    tl.store(p + e + 1, b.to(p.dtype.element_ty), mask=e + 1 < left)


def _as_int32(word: int) -> int:
    """A 32-bit word as the signed int that Triton passes as i32, whatever its value."""
    return word - (1 << 32) if word >> 31 else word


def launch_quantize(
    x: Tensor, out: Quantized, bits: int, group_size: int, noise: Sequence[int],
    block: int = BLOCK,
) -> None:  # fmt: skip
    """Fill `out` from x, which has an element or more; `block` elements a program."""
    rows = block // group_size
    with torch.cuda.device_of(x):
        quantize_kernel[(triton.cdiv(out.meta.numel(), rows),)](
            x,
            *out,
            x.numel(),
            *(_as_int32(word) for word in noise),
            G=group_size,
            BITS=bits,
            ROWS=rows,
            WIDE=x.data_ptr() % 16 == 0,
            ASM=assembly_of(x.device),
            num_warps=4,
            enable_fp_fusion=False,
        )


def launch_dequantize(
    quantized: Quantized, out: Tensor, bits: int, group_size: int, block: int | None = None
) -> None:
    """Fill `out`, which has an element or more; `block` elements a program."""
    rows = (block or BLOCK * 2 // out.itemsize) // group_size
    with torch.cuda.device_of(out):
        dequantize_kernel[(triton.cdiv(quantized.meta.numel(), rows),)](
            *quantized,
            out,
            out.numel(),
            G=group_size,
            BITS=bits,
            ROWS=rows,
            ASM=assembly_of(out.device),
            num_warps=4,
            enable_fp_fusion=False,
        )
