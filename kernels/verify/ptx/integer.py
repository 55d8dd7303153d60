"""Integer, bit and logic instructions, comparison and selection.

Source   PTX ISA, "Integer Arithmetic", "Extended-Precision Integer Arithmetic", "Comparison and
         Selection", "Logic and Shift", and `prmt`, `lop3`, `bfe`, `bfi`.
"""

from typing import TYPE_CHECKING

import numpy as np

from .errors import UnsupportedInstruction
from .formats import DTYPES, Array, bits_of, decode, flush_denormals
from .operations import Active, elementwise, operation
from .parse import Instruction

if TYPE_CHECKING:
    from .machine import Machine

_ANY_INT = ".u16|s16|u32|s32|u64|s64"
_ANY_BITS = ".b16|b32|b64"


@elementwise(f"add {_ANY_INT}")
def _add(_: Instruction, a: Array, b: Array) -> Array:
    """d = a + b, wrapping."""
    return a + b


@elementwise(f"sub {_ANY_INT}")
def _sub(_: Instruction, a: Array, b: Array) -> Array:
    """d = a - b, wrapping."""
    return a - b


@elementwise(f"mul .lo|hi|wide {_ANY_INT}")
def _mul(instruction: Instruction, a: Array, b: Array) -> Array:
    """The low half, the high half, or all of the product a * b."""
    return _product(instruction, a, b)


@operation(f"mad .lo|hi|wide {_ANY_INT}")
def _mad(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """d = product(a, b) + c, wrapping; c and d are twice as wide with .wide."""
    destination, a, b, c = instruction.operands
    own = instruction.type
    product = _product(instruction, machine.read(a, own, active), machine.read(b, own, active))
    addend = machine.read(c, f"{own[0]}{product.dtype.itemsize * 8}", active)
    machine.write(destination, product + addend, active)


def _product(instruction: Instruction, a: Array, b: Array) -> Array:
    part, bits = instruction.pick("lo", "hi", "wide"), bits_of(instruction.type)
    if part == "lo":
        return a * b
    if bits == 64:
        if part == "wide":
            raise UnsupportedInstruction(f"no 128-bit registers: {instruction.text}")
        return _high_product_64(a, b)
    wide = DTYPES[f"{instruction.type[0]}{2 * bits}"]
    product = a.astype(wide) * b.astype(wide)
    return product if part == "wide" else (product >> wide.type(bits)).astype(a.dtype)


def _high_product_64(a: Array, b: Array) -> Array:
    """Bits 64..127 of a * b by 32-bit halves; a negative factor's share is subtracted."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    a0, a1, b0, b1 = ua & low, ua >> half, ub & low, ub >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    high = a1 * b1 + (middle >> half) + (((middle & low) + a0 * b1) >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return high.view(a.dtype)


@elementwise(f"div {_ANY_INT}")
def _div(_: Instruction, a: Array, b: Array) -> Array:
    """d = a / b, truncated towards zero; all ones where b is 0, as GPUs return."""
    return _quotient(a, b)


@elementwise(f"rem {_ANY_INT}")
def _rem(_: Instruction, a: Array, b: Array) -> Array:
    """d = a - b * (a / b), of a's sign; a where b is 0."""
    return np.where(b == 0, a, a - b * _quotient(a, b))


def _quotient(a: Array, b: Array) -> Array:
    divisor = np.where(b == 0, b.dtype.type(1), b)
    floor = a // divisor
    # NumPy floors; PTX truncates: one more where a remainder is left and the signs differ.
    inexact = (floor * divisor != a) & ((a < 0) != (divisor < 0))
    return np.where(b == 0, np.invert(b), floor + inexact.astype(a.dtype))


@elementwise(f"min {_ANY_INT}")
def _min(_: Instruction, a: Array, b: Array) -> Array:
    """The smaller of a and b."""
    return np.minimum(a, b)


@elementwise(f"max {_ANY_INT}")
def _max(_: Instruction, a: Array, b: Array) -> Array:
    """The larger of a and b."""
    return np.maximum(a, b)


@elementwise("abs .s16|s32|s64")
def _abs(_: Instruction, a: Array) -> Array:
    """|a|, wrapping: |MIN| is MIN."""
    return np.abs(a)


@elementwise("neg .s16|s32|s64")
def _neg(_: Instruction, a: Array) -> Array:
    """-a, wrapping: -MIN is MIN."""
    return -a


@elementwise("popc .b32|b64")
def _popc(_: Instruction, a: Array) -> Array:
    """The number of one bits, as .u32."""
    return np.bitwise_count(a).astype(np.uint32)


@elementwise("clz .b32|b64")
def _clz(instruction: Instruction, a: Array) -> Array:
    """The number of leading zeros, as .u32; the width where a is 0."""
    bits = bits_of(instruction.type)
    filled = a
    for shift in (1, 2, 4, 8, 16, 32)[: bits.bit_length() - 1]:
        filled = filled | (filled >> a.dtype.type(shift))
    return (bits - np.bitwise_count(filled).astype(np.int64)).astype(np.uint32)


@elementwise(f"and {_ANY_BITS}|pred", bitwise=True)
def _and(_: Instruction, a: Array, b: Array) -> Array:
    """a & b"""
    return a & b


@elementwise(f"or {_ANY_BITS}|pred", bitwise=True)
def _or(_: Instruction, a: Array, b: Array) -> Array:
    """a | b"""
    return a | b


@elementwise(f"xor {_ANY_BITS}|pred", bitwise=True)
def _xor(_: Instruction, a: Array, b: Array) -> Array:
    """a ^ b"""
    return a ^ b


@elementwise(f"not {_ANY_BITS}|pred", bitwise=True)
def _not(_: Instruction, a: Array) -> Array:
    """~a"""
    return ~a


@elementwise(f"shl {_ANY_BITS}", sources=("t", "u32"))
def _shl(instruction: Instruction, a: Array, shift: Array) -> Array:
    """a << shift, 0 from the width on."""
    bits = bits_of(instruction.type)
    shifted = a << np.minimum(shift, bits - 1).astype(a.dtype)
    return np.where(shift < bits, shifted, a.dtype.type(0))


@elementwise("shr .b16|b32|b64|u16|u32|u64|s16|s32|s64", sources=("t", "u32"))
def _shr(instruction: Instruction, a: Array, shift: Array) -> Array:
    """a >> shift, from the width on 0, or the sign of a signed type throughout."""
    bits = bits_of(instruction.type)
    shifted = a >> np.minimum(shift, bits - 1).astype(a.dtype)
    if a.dtype.kind == "i":
        return shifted
    return np.where(shift < bits, shifted, a.dtype.type(0))


@elementwise("shf .l|r .wrap|clamp .b32")
def _shf(instruction: Instruction, low: Array, high: Array, shift: Array) -> Array:
    """Funnel shift of high:low: its upper word shifted left, or its lower word shifted right.

    The count is taken modulo 32 (.wrap) or at most 32 (.clamp).
    """
    wrap = instruction.pick("wrap", "clamp") == "wrap"
    count = (shift & np.uint32(31) if wrap else np.minimum(shift, 32)).astype(np.uint64)
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    if instruction.pick("l", "r") == "l":
        return ((both << count) >> np.uint64(32)).astype(np.uint32)
    return (both >> count).astype(np.uint32)


@elementwise("bfe .u32|s32|u64|s64", sources=("t", "u32", "u32"))
def _bfe(instruction: Instruction, a: Array, position: Array, length: Array) -> Array:
    """Bits [position, position + length) of a, zero- or sign-extended.

    The sign is that of the field's top bit, or of a where the field ends beyond it.
    """
    bits = bits_of(instruction.type)
    start = (position & np.uint32(0xFF)).astype(np.int64)
    size = (length & np.uint32(0xFF)).astype(np.int64)
    signed = a.dtype.kind == "i"
    # A signed shift repeats a's sign beyond its top, which is the extension the field needs there.
    field = a >> np.minimum(start, bits - 1).astype(a.dtype)
    if not signed:
        field = np.where(start < bits, field, a.dtype.type(0))
    spare = np.clip(bits - size, 0, bits - 1).astype(a.dtype)
    extended = (field << spare) >> spare
    return np.where(size == 0, a.dtype.type(0), extended)


@elementwise("bfi .b32|b64", sources=("t", "t", "u32", "u32"))
def _bfi(instruction: Instruction, a: Array, b: Array, position: Array, length: Array) -> Array:
    """b with its bits [position, position + length) replaced by the low bits of a."""
    bits = bits_of(instruction.type)
    start, size = position & np.uint32(0xFF), length & np.uint32(0xFF)
    one = a.dtype.type(1)
    ones = np.where(
        size < bits, (one << np.minimum(size, bits - 1).astype(a.dtype)) - one, ~(one ^ one)
    )
    amount = np.minimum(start, bits - 1).astype(a.dtype)
    mask = np.where(start < bits, ones << amount, a.dtype.type(0))
    return (b & ~mask) | ((a << amount) & mask)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    permuted = np.zeros(1, np.uint32)
    for byte in range(4):
        choice = (selector >> np.uint32(4 * byte)) & np.uint32(15)
        shift = ((choice & np.uint32(7)) << np.uint32(3)).astype(np.uint64)
        chosen = (both >> shift).astype(np.uint32) & np.uint32(0xFF)
        sign = np.where(chosen & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        chosen = np.where(choice & np.uint32(8), sign, chosen)
        permuted = permuted | (chosen << np.uint32(8 * byte))
    return permuted


@operation("prmt .b32")
def _prmt(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """Four bytes chosen from b:a by the selector's nibbles; its bit 3 repeats the byte's sign.

    Bytes that are not chosen may be undefined, and undefined bits move with their bytes.
    """
    destination, *sources, selector = instruction.operands
    choice = machine.read(selector, "b32", active)
    machine.require_defined(instruction, active)
    values: list[Array] = []
    taints: list[Array] = []
    for source in sources:
        machine.taint = None
        values.append(machine.read(source, "b32", active))
        taint = np.zeros(1, np.uint64) if machine.taint is None else machine.taint
        taints.append(taint.astype(np.uint32))
    undefined = _permute(taints[0], taints[1], choice).astype(np.uint64)
    machine.taint = machine.spread(undefined) if undefined.any() else None
    machine.write(destination, _permute(values[0], values[1], choice), active, precise=True)


@elementwise("lop3 .b32")
def _lop3(_: Instruction, a: Array, b: Array, c: Array, table: Array) -> Array:
    """Any function of three bits: bit 4a + 2b + c of the table, for each bit position."""
    result = np.zeros(1, np.uint32)
    for row in range(8):
        term = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        result = np.where(table >> np.uint32(row) & np.uint32(1), result | term, result)
    return result


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_FLOAT_COMPARISONS = "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan"
_BOOLEANS = "[.and|or|xor]"


def _compared(instruction: Instruction, left: Array, right: Array) -> Array:
    """The comparison that the instruction's first modifier names."""
    comparison = instruction.modifiers[0]
    if "ftz" in instruction.modifiers:
        left, right = flush_denormals(left), flush_denormals(right)
    if left.dtype.kind != "f":
        return _COMPARE[comparison](left, right)
    unordered = np.isnan(left) | np.isnan(right)
    if comparison in ("num", "nan"):
        return unordered if comparison == "nan" else ~unordered
    if comparison in _COMPARE:
        return _COMPARE[comparison](left, right) & ~unordered
    return _COMPARE[comparison[:-1]](left, right) | unordered


@operation(
    f"setp .eq|ne|lt|le|gt|ge|lo|ls|hi|hs {_BOOLEANS} .b16|b32|b64|u16|u32|u64|s16|s32|s64",
    f"setp .{_FLOAT_COMPARISONS} {_BOOLEANS} [.ftz] .f32",
    f"setp .{_FLOAT_COMPARISONS} {_BOOLEANS} .f16|bf16|f64|f16x2|bf16x2",
)
def _setp(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """p = a cmp b, and q = not that; either is then combined with a predicate c by .and|or|xor.

    Of packed halves p compares the lower and q the upper ones. With a NaN the plain comparisons are
    false and those ending in u true; .num asks for none.
    """
    combined = instruction.modifiers[1] in _COMBINE
    *destinations, a, b = instruction.operands[:-1] if combined else instruction.operands
    own = instruction.type
    left, right = (decode(own, machine.read(operand, own, active)) for operand in (a, b))
    results = [_compared(instruction, *halves) for halves in zip(left, right, strict=True)]
    if not own.endswith("x2"):
        results.append(~results[0])
    for destination, value in zip(destinations, results, strict=False):
        if combined:
            third = machine.read(instruction.operands[-1], "pred", active)
            value = _COMBINE[instruction.modifiers[1]](value, third)
        machine.write(destination, value, active)


@operation("selp .b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64|f16|bf16")
def _selp(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """a where the predicate holds, else b; bits unchanged, NaNs included.

    What is not selected may be undefined.
    """
    destination, *sources, predicate = instruction.operands
    choice = machine.read(predicate, "pred", active)
    machine.require_defined(instruction, active)
    values: list[Array] = []
    taints: list[Array | None] = []
    for source in sources:
        machine.taint = None
        values.append(machine.read(source, f"b{bits_of(instruction.type)}", active))
        taints.append(machine.taint)
    if any(taint is not None for taint in taints):
        first, second = (np.uint64(0) if taint is None else taint for taint in taints)
        machine.taint = np.where(choice, first, second)
    machine.write(destination, np.where(choice, *values), active, precise=True)
