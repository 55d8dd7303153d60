"""Floating-point instructions of every width, scalar and packed.

Results are rounded once to nearest even with denormals kept, unless the instruction says .ftz.
Approximate instructions (.approx, .full) are computed to the nearest representable value: more
exactly than a GPU does, so their last bits prove nothing.

Source   PTX ISA, "Floating-Point Instructions", "Half Precision Floating-Point Instructions",
         "Mixed Precision Floating-Point Instructions".
"""

from fractions import Fraction

import numpy as np

from .formats import Array, flush_denormals
from .operations import arithmetic, elementwise
from .parse import Instruction

_SMALL = ".f16|f16x2|bf16|bf16x2"


@arithmetic(
    "add [.rn] [.ftz] [.sat] .f32",
    "add [.rn] [.ftz] .f32x2",
    "add [.rn] .f64",
    f"add [.rn] {_SMALL}",
)
def _add(a: Array, b: Array) -> Array:
    """a + b"""
    return a + b


@arithmetic(
    "sub [.rn] [.ftz] [.sat] .f32",
    "sub [.rn] [.ftz] .f32x2",
    "sub [.rn] .f64",
    f"sub [.rn] {_SMALL}",
)
def _sub(a: Array, b: Array) -> Array:
    """a - b"""
    return a - b


@arithmetic(
    "mul [.rn] [.ftz] [.sat] .f32",
    "mul [.rn] [.ftz] .f32x2",
    "mul [.rn] .f64",
    f"mul [.rn] {_SMALL}",
)
def _mul(a: Array, b: Array) -> Array:
    """a * b"""
    return a * b


@arithmetic("add [.rn] .f32 .f16|bf16", sources=("t",))
def _add_mixed(a: Array, b: Array) -> Array:
    """a + b in fp32, with a 16-bit a."""
    return a + b


@arithmetic("sub [.rn] .f32 .f16|bf16", sources=("t",))
def _sub_mixed(a: Array, b: Array) -> Array:
    """a - b in fp32, with a 16-bit a."""
    return a - b


@arithmetic("fma .rn .f32 .f16|bf16", sources=("t", "t"))
def _fma_mixed(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in fp32, rounded once, with 16-bit a and b."""
    return _fused(a, b, c)


@arithmetic(
    "fma .rn [.ftz] [.sat] .f32",
    "fma .rn [.ftz] .f32x2",
    f"fma .rn {_SMALL}",
    "mad .rn [.ftz] .f32",
)
def _fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once."""
    return _fused(a, b, c)


def _fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of values of at most 24 significant bits, as float64 rounded to odd.

    The product is exact in float64. The sum's error, exact by Knuth's TwoSum, says whether the sum
    was rounded; if so its last bit is made odd, on the side where the exact sum lies. A second
    rounding to 24 bits or fewer then sees which side of every tie it is on (Boldo and Melquiond,
    "Emulation of FMA and Correctly Rounded Sums", 2008).

    a = b = 1 + 2**-12, c = -1 - 2**-11: the product's lowest bit, 2**-24, is what remains.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    to_odd = (error != 0) & (bits & 1 == 0) & np.isfinite(total)
    if not to_odd.any():
        return total
    away_from_zero = (error > 0) == (total > 0)
    odd = np.where(away_from_zero, bits + 1, bits - 1)
    return np.where(to_odd, odd, bits).view(np.float64)


@arithmetic("fma .rn .f64")
def _fma_f64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in fp64, rounded once, by rational arithmetic; slow, for short final sums."""
    rounded = a * b + c
    columns = [np.broadcast_to(x, rounded.shape).tolist() for x in (a, b, c)]
    for index in np.flatnonzero(np.isfinite(columns).all(axis=0)):
        x, y, z = (Fraction(column[index]) for column in columns)
        exact = x * y + z
        # An exact zero keeps the sign that a * b + c gave it.
        if exact:
            rounded[index] = _nearest_float(exact)
    return rounded


def _nearest_float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


@arithmetic("div .rn|full|approx [.ftz] .f32", "div .rn .f64")
def _div(a: Array, b: Array) -> Array:
    """a / b, correctly rounded for .full and .approx too."""
    return a / b


@arithmetic("rcp .rn|approx [.ftz] .f32", "rcp .rn .f64")
def _rcp(a: Array) -> Array:
    """1 / a"""
    return a.dtype.type(1) / a


@arithmetic("sqrt .rn|approx [.ftz] .f32", "sqrt .rn .f64")
def _sqrt(a: Array) -> Array:
    """The square root; -0 for -0, NaN below."""
    return np.sqrt(a)


@arithmetic("rsqrt .approx [.ftz] .f32", "rsqrt .approx .f64")
def _rsqrt(a: Array) -> Array:
    """1 / sqrt(a)"""
    return 1 / np.sqrt(a.astype(np.float64))


@arithmetic("ex2 .approx [.ftz] .f32", "ex2 .approx .f16|f16x2", "ex2 .approx .ftz .bf16|bf16x2")
def _ex2(a: Array) -> Array:
    """2 ** a"""
    return np.exp2(a.astype(np.float64))


@arithmetic("lg2 .approx [.ftz] .f32")
def _lg2(a: Array) -> Array:
    """log2(a)"""
    return np.log2(a.astype(np.float64))


@arithmetic("sin .approx [.ftz] .f32")
def _sin(a: Array) -> Array:
    """sin(a), a in radians"""
    return np.sin(a.astype(np.float64))


@arithmetic("cos .approx [.ftz] .f32")
def _cos(a: Array) -> Array:
    """cos(a), a in radians"""
    return np.cos(a.astype(np.float64))


@arithmetic("tanh .approx .f32", f"tanh .approx {_SMALL}")
def _tanh(a: Array) -> Array:
    """tanh(a)"""
    return np.tanh(a.astype(np.float64))


@arithmetic("min [.ftz] .f32", "min .f64", f"min {_SMALL}")
def _min(a: Array, b: Array, *more: Array) -> Array:
    """The smallest, passing over NaN; -0 is below +0. NaN where every source is."""
    return _extreme(np.less, a, b, *more)


@arithmetic("max [.ftz] .f32", "max .f64", f"max {_SMALL}")
def _max(a: Array, b: Array, *more: Array) -> Array:
    """The largest, passing over NaN; +0 is above -0. NaN where every source is."""
    return _extreme(np.greater, a, b, *more)


@arithmetic("min [.ftz] .NaN .f32", f"min .NaN {_SMALL}")
def _min_nan(a: Array, b: Array, *more: Array) -> Array:
    """The smallest; NaN where any source is."""
    return _propagate(_extreme(np.less, a, b, *more), a, b, *more)


@arithmetic("max [.ftz] .NaN .f32", f"max .NaN {_SMALL}")
def _max_nan(a: Array, b: Array, *more: Array) -> Array:
    """The largest; NaN where any source is."""
    return _propagate(_extreme(np.greater, a, b, *more), a, b, *more)


def _extreme(beats: np.ufunc, first: Array, *rest: Array) -> Array:
    """min (`beats` less) or max (greater) of two or three sources, zeros ordered by sign."""
    best = first
    for value in rest:
        negative_first = np.signbit(value) & ~np.signbit(best)
        zero_wins = negative_first if beats is np.less else np.signbit(best) & ~np.signbit(value)
        wins = beats(value, best) | ((value == best) & zero_wins) | np.isnan(best)
        best = np.where(wins, value, best)
    return best


def _propagate(result: Array, *sources: Array) -> Array:
    for source in sources:
        result = np.where(np.isnan(source), source, result)
    return result


@elementwise("abs [.ftz] .f32", "abs .f64|f16|bf16|f16x2|bf16x2")
def _abs(instruction: Instruction, a: Array) -> Array:
    """a with its sign bits cleared."""
    bits = _flushed_bits(instruction, a)
    return bits & ~_sign_bits(instruction, bits)


@elementwise("neg [.ftz] .f32", "neg .f64|f16|bf16|f16x2|bf16x2")
def _neg(instruction: Instruction, a: Array) -> Array:
    """a with its sign bits flipped."""
    bits = _flushed_bits(instruction, a)
    return bits ^ _sign_bits(instruction, bits)


@elementwise("copysign .f32|f64")
def _copysign(_: Instruction, a: Array, b: Array) -> Array:
    """b with the sign of a."""
    return np.copysign(b, a)


def _flushed_bits(instruction: Instruction, a: Array) -> Array:
    if "ftz" in instruction.modifiers:
        a = flush_denormals(a)
    return a.view(f"u{a.dtype.itemsize}")


def _sign_bits(instruction: Instruction, bits: Array) -> Array:
    width = bits.dtype.itemsize * 8
    sign = 1 << (width - 1)
    if instruction.type.endswith("x2"):
        sign |= 1 << (width // 2 - 1)
    return np.array([sign], bits.dtype)
