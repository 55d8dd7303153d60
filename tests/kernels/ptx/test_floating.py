"""Floating-point instructions, bit for bit, against rational arithmetic and the IEEE rules.

Signed zeros, infinities and NaN follow from the operation's definition and stand as tables;
finite results come from `rounded`, which rounds an exact Fraction once.
"""

import math
import random
from fractions import Fraction

import numpy as np
import pytest

# Significand bits with the hidden one, smallest normal exponent, largest exponent, storage bits.
FORMATS = {
    "f16": (11, -14, 15, 16),
    "bf16": (8, -126, 127, 16),
    "f32": (24, -126, 127, 32),
    "f64": (53, -1022, 1023, 64),
}


def rounded(exact, name):
    """The bits of a nonzero Fraction in format `name`, nearest with ties to even."""
    precision, low, high, width = FORMATS[name]
    sign, magnitude = (exact < 0) << (width - 1), abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length() - 1
    exponent = max(exponent, low)
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > low and magnitude < Fraction(2) ** exponent:
        exponent -= 1
    scaled = magnitude / Fraction(2) ** (exponent - precision + 1)
    count, rest = divmod(scaled.numerator, scaled.denominator)
    twice = 2 * rest
    count += twice > scaled.denominator or (twice == scaled.denominator and count & 1)
    biased = (exponent - low) << (precision - 1)
    # Counting on from the exponent's first number: a carry moves into the next exponent by itself.
    return sign | min(biased + count, (high - low + 2) << (precision - 1))


def value_of(bits, name):
    """The Fraction that finite `bits` stand for, by the format's definition."""
    precision, low, _, width = FORMATS[name]
    magnitude = bits & (2 ** (width - 1) - 1)
    biased, fraction = magnitude >> (precision - 1), magnitude & (2 ** (precision - 1) - 1)
    if biased:
        fraction += 2 ** (precision - 1)
    value = Fraction(fraction) * Fraction(2) ** (max(biased, 1) - 1 + low - precision + 1)
    return -value if bits >> (width - 1) else value


def finite_bits(name, count, seed):
    """Random finite bit patterns: every exponent, denormals and extremes included."""
    precision, low, high, width = FORMATS[name]
    generator = random.Random(seed)
    infinity = (high - low + 2) << (precision - 1)
    one = -low << (precision - 1)
    patterns = [0, 1, 2 ** (precision - 1) - 1, 2 ** (precision - 1), infinity - 1, one, one + 1]
    patterns += [generator.randrange(infinity) for _ in range(count // 2)]
    near = 6 << (precision - 1)
    patterns += [generator.randrange(one - near, one + near) for _ in range(count // 2)]
    chosen = [
        generator.choice(patterns) | generator.getrandbits(1) << (width - 1) for _ in range(count)
    ]
    return np.array(chosen, f"uint{width}")


def check(got, exact, name, context):
    """Every nonzero exact result equals its rounding; zeros have their own tests."""
    compared = 0
    for index, value in enumerate(exact):
        if value:
            assert got[index] == rounded(value, name), (context, index, hex(got[index]), value)
            compared += 1
    assert compared > len(exact) // 2


OPERATIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("opcode", OPERATIONS)
def test_rounds_once(execute, opcode, name):
    a, b = finite_bits(name, 2000, 1), finite_bits(name, 2000, 2)
    rn = ".rn" if name.startswith("f") and name != "f16" else ""
    got = execute(f"{opcode}{rn}.{name} %x, %a, %b;", a, b, out=a.dtype)
    operation = OPERATIONS[opcode]
    exact = [operation(value_of(int(x), name), value_of(int(y), name)) for x, y in zip(a, b)]  # noqa: B905
    check(got, exact, name, opcode)


@pytest.mark.parametrize("name", FORMATS)
def test_fma_rounds_once(execute, name):
    a, b = finite_bits(name, 2000, 3), finite_bits(name, 2000, 4)
    values = [[value_of(int(v), name) for v in column] for column in (a, b)]
    # Half of the addends nearly cancel the product, where rounding it first would show.
    near = [rounded(-x * y, name) if x * y else 0 for x, y in zip(*values, strict=True)]
    infinity = (FORMATS[name][2] - FORMATS[name][1] + 2) << (FORMATS[name][0] - 1)
    near = [v if v & (2 ** (FORMATS[name][3] - 1) - 1) < infinity else 0 for v in near]
    c = np.where(np.arange(a.size) % 2, finite_bits(name, 2000, 5), np.array(near, a.dtype))
    got = execute(f"fma.rn.{name} %x, %a, %b, %c;", a, b, c, out=a.dtype)
    addends = [value_of(int(v), name) for v in c]
    exact = [x * y + z for x, y, z in zip(*values, addends, strict=True)]
    check(got, exact, name, "fma")


def test_fma_keeps_what_a_rounded_product_loses(execute):
    one, ulp = 1.0, 2.0**-12
    a = np.array([one + ulp], np.float32)
    c = np.array([-(1 + 2 * ulp)], np.float32)
    assert execute("fma.rn.f32 %x, %a, %a, %b;", a, c, out=np.float32)[0] == 2.0**-24


def test_fma_breaks_a_tie_by_the_bits_below_double(execute):
    """4097**2 is a tie of fp32, which an addend far below double's last bit decides."""
    tiny = np.array([2.0**-60], np.float32)
    a, b = np.array([4097.0], np.float32), np.array([4097.0], np.float32)
    assert Fraction(4097) ** 2 == 2**24 + 2**13 + 1
    for sign, want in ((1, 2.0**24 + 2**13 + 2), (-1, 2.0**24 + 2**13)):
        got = execute("fma.rn.f32 %x, %a, %b, %c;", a, b, sign * tiny, out=np.float32)
        assert got[0] == want


def test_packed_types_work_by_halves(execute):
    for name in ("f16", "bf16"):
        low, high = (
            np.stack([finite_bits(name, 500, s) for s in seeds]) for seeds in ((6, 7), (8, 9))
        )
        packed = low.astype(np.uint32) | high.astype(np.uint32) << 16
        for opcode in ("add.rn", "sub.rn", "mul.rn", "min", "max"):
            whole = execute(f"{opcode}.{name}x2 %x, %a, %b;", *packed)
            for half, shift in ((low, 0), (high, 16)):
                scalar = execute(f"{opcode}.{name} %x, %a, %b;", *half, out=np.uint16)
                np.testing.assert_array_equal((whole >> shift).astype(np.uint16), scalar)
    low, high = (
        np.stack([finite_bits("f32", 500, s) for s in seeds]) for seeds in ((1, 2), (3, 4))
    )
    packed = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    whole = execute("fma.rn.f32x2 %x, %a, %b, %a;", *packed, out=np.uint64)
    for half, shift in ((low, 0), (high, 32)):
        scalar = execute("fma.rn.f32 %x, %a, %b, %a;", *half)
        np.testing.assert_array_equal((whole >> np.uint64(shift)).astype(np.uint32), scalar)


def test_mixed_precision(execute):
    a, b = np.array([1.5], np.float16), np.array([2.0**-20], np.float32)
    assert execute("add.f32.f16 %x, %a, %b;", a, b, out=np.float32)[0] == 1.5 + 2.0**-20
    bf16 = np.array([0x3FC0], np.uint16)
    assert execute("sub.f32.bf16 %x, %a, %b;", bf16, b, out=np.float32)[0] == 1.5 - 2.0**-20
    assert execute("fma.rn.f32.bf16 %x, %a, %a, %b;", bf16, b, out=np.float32)[0] == 2.25 + 2.0**-20


SPECIALS = {"inf": 0x7F800000, "-inf": 0xFF800000, "nan": 0xFFC12345, "0": 0, "-0": 0x80000000,
            "1": 0x3F800000, "-1": 0xBF800000, "max": 0x7F7FFFFF}  # fmt: skip
CANONICAL = 0x7FFFFFFF


@pytest.mark.parametrize(
    ("body", "operands", "want"),
    [
        ("add.f32 %x, %a, %b", "inf -inf", CANONICAL),
        ("add.f32 %x, %a, %b", "nan 1", CANONICAL),
        ("add.f32 %x, %a, %b", "1 -1", 0),
        ("add.f32 %x, %a, %b", "-0 -0", 0x80000000),
        ("add.f32 %x, %a, %b", "-0 0", 0),
        ("add.f32 %x, %a, %b", "max max", 0x7F800000),
        ("sub.f32 %x, %a, %b", "0 0", 0),
        ("mul.f32 %x, %a, %b", "-0 1", 0x80000000),
        ("mul.f32 %x, %a, %b", "0 inf", CANONICAL),
        ("fma.rn.f32 %x, %a, %b, %a", "0 inf", CANONICAL),
        ("fma.rn.f32 %x, %a, %b, %b", "1 -inf", 0xFF800000),
        ("fma.rn.f32 %x, %a, %b, %a", "-0 1", 0x80000000),
        ("fma.rn.f32 %x, %a, %b, %b", "1 nan", CANONICAL),
        ("div.rn.f32 %x, %a, %b", "1 -0", 0xFF800000),
        ("div.full.f32 %x, %a, %b", "0 0", CANONICAL),
        ("div.rn.f32 %x, %a, %b", "-1 inf", 0x80000000),
        ("rcp.rn.f32 %x, %a", "-0", 0xFF800000),
        ("rcp.approx.ftz.f32 %x, %a", "inf", 0),
        ("sqrt.rn.f32 %x, %a", "-1", CANONICAL),
        ("sqrt.rn.f32 %x, %a", "-0", 0x80000000),
        ("rsqrt.approx.f32 %x, %a", "-0", 0xFF800000),
        ("ex2.approx.ftz.f32 %x, %a", "-inf", 0),
        ("lg2.approx.f32 %x, %a", "0", 0xFF800000),
        ("min.f32 %x, %a, %b", "nan 1", 0x3F800000),
        ("min.f32 %x, %a, %b", "1 nan", 0x3F800000),
        ("min.f32 %x, %a, %b", "nan nan", CANONICAL),
        ("min.NaN.f32 %x, %a, %b", "1 nan", CANONICAL),
        ("min.f32 %x, %a, %b", "0 -0", 0x80000000),
        ("min.f32 %x, %a, %b", "-0 0", 0x80000000),
        ("max.f32 %x, %a, %b", "nan -inf", 0xFF800000),
        ("max.NaN.f32 %x, %a, %b", "nan 1", CANONICAL),
        ("max.f32 %x, %a, %b", "0 -0", 0),
        ("max.f32 %x, %a, %b", "-0 0", 0),
        ("max.f32 %x, %a, %b, %b", "-1 1", 0x3F800000),
        ("min.NaN.f32 %x, %b, %b, %a", "nan 1", CANONICAL),
        ("abs.f32 %x, %a", "-0", 0),
        ("neg.f32 %x, %a", "0", 0x80000000),
        ("copysign.f32 %x, %a, %b", "-0 1", 0xBF800000),
        ("add.sat.f32 %x, %a, %b", "nan 1", 0),
        ("add.sat.f32 %x, %a, %b", "1 1", 0x3F800000),
        ("add.sat.f32 %x, %a, %b", "-1 0", 0),
    ],
)  # fmt: skip
def test_special_values(execute, body, operands, want):
    arrays = [np.array([SPECIALS[name]], np.uint32) for name in operands.split()]
    assert hex(execute(f"{body};", *arrays)[0]) == hex(want)


@pytest.mark.parametrize(("name", "nan"), [("f16", 0x7FFF), ("bf16", 0x7FFF)])
def test_canonical_nan_of_16_bits(execute, name, nan):
    a = np.array([0xFE01 if name == "f16" else 0xFFC1], np.uint16)
    assert execute(f"add.{name} %x, %a, %a;", a, out=np.uint16)[0] == nan
    assert execute(f"max.NaN.{name} %x, %a, %a;", a, out=np.uint16)[0] == nan


def test_denormals_live_without_ftz_and_die_with_it(execute):
    tiny, half = np.array([1, 0x80000001], np.uint32), np.full(2, 0x3F000000, np.uint32)
    smallest = np.full(2, 0x00800000, np.uint32)
    assert [hex(v) for v in execute("add.f32 %x, %a, %a;", tiny)] == ["0x2", "0x80000002"]
    assert [hex(v) for v in execute("add.ftz.f32 %x, %a, %a;", tiny)] == ["0x0", "0x80000000"]
    assert hex(execute("mul.f32 %x, %a, %b;", smallest, half)[0]) == "0x400000"
    assert hex(execute("mul.ftz.f32 %x, %a, %b;", smallest, half)[0]) == "0x0"
    big = np.full(2, 0x7F000000, np.uint32)
    assert hex(execute("mul.ftz.f32 %x, %a, %b;", tiny, big)[1]) == "0x80000000"
    assert execute("mul.f32 %x, %a, %b;", tiny, big, out=np.float32)[1] == -(2.0**-22)
    assert hex(execute("abs.ftz.f32 %x, %a;", tiny)[1]) == "0x0"


def test_division_and_roots_round_correctly(execute):
    a = np.array([1, 2, 1e-40, 3e38, 7], np.float32)
    b = np.array([3, 7, 3, 0.3, 1e-3], np.float32)
    got = execute("div.rn.f32 %x, %a, %b;", a, b)
    exact = [Fraction(float(x)) / Fraction(float(y)) for x, y in zip(a, b, strict=True)]
    check(got, exact, "f32", "div")
    # A correctly rounded root r has r - ulp/2 < sqrt(a) < r + ulp/2.
    roots = execute("sqrt.rn.f32 %x, %a;", a, out=np.float32)
    for value, root in zip(a, roots, strict=True):
        below, above = np.nextafter(root, np.float32(0)), np.nextafter(root, np.float32(np.inf))
        r, low, high = (Fraction(float(v)) for v in (root, below, above))
        assert ((r + low) / 2) ** 2 < Fraction(float(value)) < ((r + high) / 2) ** 2


@pytest.mark.parametrize(
    ("opcode", "argument", "want"),
    [
        ("ex2.approx.f32", 3.0, 8.0),
        ("ex2.approx.f32", 0.5, math.sqrt(2)),
        ("lg2.approx.f32", 8.0, 3.0),
        ("sin.approx.f32", 1.0, math.sin(1)),
        ("cos.approx.f32", 1.0, math.cos(1)),
        ("tanh.approx.f32", 0.5, math.tanh(0.5)),
        ("rcp.approx.f32", 3.0, 1 / 3),
        ("sqrt.approx.f32", 2.0, math.sqrt(2)),
        ("rsqrt.approx.f32", 2.0, 1 / math.sqrt(2)),
    ],
)
def test_approximate_functions_are_the_nearest_value(execute, opcode, argument, want):
    got = execute(f"{opcode} %x, %a;", np.array([argument], np.float32), out=np.float32)
    assert got[0] == np.float32(want)


def test_neg_and_abs_of_packed_halves(execute):
    a = np.array([0x8000_7C00], np.uint32)
    assert hex(execute("neg.f16x2 %x, %a;", a)[0]) == "0xfc00"
    assert hex(execute("abs.bf16x2 %x, %a;", a)[0]) == "0x7c00"
