"""Integer, bit, comparison and selection instructions, against Python integers."""

import random

import numpy as np
import pytest

from verify.ptx import UnsupportedInstruction

DTYPES = {
    f"{kind}{bits}": np.dtype(f"{name}{bits}")
    for kind, name in (("u", "uint"), ("s", "int"))
    for bits in (16, 32, 64)
}


def edges(type_name):
    """Pairs of operands: extremes, small values and random ones, in every combination."""
    dtype, generator = DTYPES[type_name], random.Random(0)
    limits = np.iinfo(dtype)
    values = {limits.min, limits.max, limits.min + 1, limits.max - 1, limits.max // 2 + 1, 0, 1, 3}
    values |= {-1, -7} if limits.min < 0 else {7}
    values |= {generator.randint(limits.min, limits.max) for _ in range(6)}
    ordered = sorted(values)
    a, b = np.meshgrid(np.array(ordered, dtype), np.array(ordered, dtype))
    return a.ravel(), b.ravel()


def wrapped(values, dtype):
    bits = np.dtype(dtype).itemsize * 8
    return np.array([int(v) & (2**bits - 1) for v in values], f"uint{bits}").view(dtype)


def truncated_quotient(a, b):
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


REFERENCES = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": truncated_quotient,
    "rem": lambda a, b: a if b == 0 else a - b * truncated_quotient(a, b),
}


@pytest.mark.parametrize("type_name", DTYPES)
@pytest.mark.parametrize("opcode", REFERENCES)
def test_arithmetic_wraps(execute, opcode, type_name):
    a, b = edges(type_name)
    got = execute(f"{opcode}.{type_name} %x, %a, %b;", a, b, out=DTYPES[type_name])
    reference = REFERENCES[opcode]
    want = [reference(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    np.testing.assert_array_equal(got, wrapped(want, DTYPES[type_name]))


@pytest.mark.parametrize("type_name", DTYPES)
def test_high_product_and_mad(execute, type_name):
    dtype = DTYPES[type_name]
    bits = dtype.itemsize * 8
    a, b = edges(type_name)
    products = [x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    got = execute(f"mul.hi.{type_name} %x, %a, %b;", a, b, out=dtype)
    np.testing.assert_array_equal(got, wrapped([p >> bits for p in products], dtype))
    c = b[::-1].copy()
    for part, shift in (("lo", 0), ("hi", bits)):
        got = execute(f"mad.{part}.{type_name} %x, %a, %b, %c;", a, b, c, out=dtype)
        want = [(p >> shift) + z for p, z in zip(products, c.tolist(), strict=True)]
        np.testing.assert_array_equal(got, wrapped(want, dtype))


@pytest.mark.parametrize("type_name", ["u16", "s16", "u32", "s32"])
def test_wide_product(execute, type_name):
    a, b = edges(type_name)
    wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    products = [x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    got = execute(f"mul.wide.{type_name} %x, %a, %b;", a, b, out=wide)
    np.testing.assert_array_equal(got, np.array(products, wide))
    c = np.full(a.size, np.iinfo(wide).max, wide)
    got = execute(f"mad.wide.{type_name} %x, %a, %b, %c;", a, b, c, out=wide)
    want = [p + np.iinfo(wide).max for p in products]
    np.testing.assert_array_equal(got, wrapped(want, wide))


def test_wide_product_of_64_bits_is_refused(execute):
    with pytest.raises(UnsupportedInstruction, match=r"mul\.wide\.u64"):
        execute("mul.wide.u64 %x, %a, %a;", np.zeros(1, np.uint64), out=np.uint64)


def test_abs_and_neg_of_the_smallest_integer(execute):
    a = np.array([-(2**31), -1, 0, 5], np.int32)
    np.testing.assert_array_equal(execute("abs.s32 %x, %a;", a, out=np.int32), [-(2**31), 1, 0, 5])
    np.testing.assert_array_equal(execute("neg.s32 %x, %a;", a, out=np.int32), [-(2**31), 1, 0, -5])


@pytest.mark.parametrize("bits", [32, 64])
def test_counting_bits(execute, bits):
    values = [0, 1, 2, 3, 2 ** (bits - 1), 2**bits - 1, 0x00F0, 2 ** (bits // 2)]
    a = np.array(values, f"uint{bits}")
    got = execute(f"popc.b{bits} %x, %a;", a)
    np.testing.assert_array_equal(got, [v.bit_count() for v in values])
    got = execute(f"clz.b{bits} %x, %a;", a)
    np.testing.assert_array_equal(got, [bits - v.bit_length() for v in values])


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize(
    ("opcode", "reference"),
    [
        ("and", lambda a, b: a & b),
        ("or", lambda a, b: a | b),
        ("xor", lambda a, b: a ^ b),
    ],
)
def test_bitwise(execute, opcode, reference, bits):
    a, b = edges(f"u{bits}")
    got = execute(f"{opcode}.b{bits} %x, %a, %b;", a, b, out=a.dtype)
    want = [reference(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    np.testing.assert_array_equal(got, np.array(want, a.dtype))


def test_not(execute):
    a = np.array([0, 1, 0xFFFFFFFF, 0x80000000], np.uint32)
    got = execute("not.b32 %x, %a;", a)
    np.testing.assert_array_equal(got, [0xFFFFFFFF, 0xFFFFFFFE, 0, 0x7FFFFFFF])


def test_predicate_logic(execute):
    a = np.array([0, 0, 1, 1], np.uint32)
    b = np.array([0, 1, 0, 1], np.uint32)
    for opcode, want in (
        ("and.pred %p3, %p1, %p2", [0, 0, 0, 1]),
        ("or.pred %p3, %p1, %p2", [0, 1, 1, 1]),
        ("xor.pred %p3, %p1, %p2", [0, 1, 1, 0]),
        ("not.pred %p3, %p1", [1, 1, 0, 0]),
        ("mov.pred %p3, -1", [1, 1, 1, 1]),
        ("setp.ne.and.u32 %p3, %a, 0, !%p2", [0, 0, 1, 0]),
    ):
        body = f"setp.ne.u32 %p1, %a, 0; setp.ne.u32 %p2, %b, 0;{opcode}; selp.u32 %x, 1, 0, %p3;"
        np.testing.assert_array_equal(execute(body, a, b), want, err_msg=opcode)


SHIFTS = np.array([0, 1, 7, 15, 16, 31, 32, 33, 63, 64, 65, 0xFFFFFFFF], np.uint32)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("value", [0x8000_0000_0000_0001, 0xA5A5_C3C3_F00F_8421])
def test_shift_beyond_the_width(execute, bits, value):
    value &= 2**bits - 1
    unsigned, signed = np.dtype(f"uint{bits}"), np.dtype(f"int{bits}")
    a = np.full(SHIFTS.size, value, unsigned)
    negative = value - 2**bits if value >> (bits - 1) else value
    counts = [min(int(s), 200) for s in SHIFTS]
    np.testing.assert_array_equal(
        execute(f"shl.b{bits} %x, %a, %b;", a, SHIFTS, out=unsigned),
        wrapped([value << s for s in counts], unsigned),
    )
    for kind in "bu":
        np.testing.assert_array_equal(
            execute(f"shr.{kind}{bits} %x, %a, %b;", a, SHIFTS, out=unsigned),
            np.array([value >> s for s in counts], unsigned),
        )
    np.testing.assert_array_equal(
        execute(f"shr.s{bits} %x, %a, %b;", a, SHIFTS, out=signed),
        np.array([negative >> s for s in counts], signed),
    )


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(execute, mode):
    low, high = 0x89ABCDEF, 0x01234567
    both = high << 32 | low
    counts = [int(s) & 31 if mode == "wrap" else min(int(s), 32) for s in SHIFTS]
    a, b = (np.full(SHIFTS.size, v, np.uint32) for v in (low, high))
    np.testing.assert_array_equal(
        execute(f"shf.l.{mode}.b32 %x, %a, %b, %c;", a, b, SHIFTS),
        np.array([(both << s) >> 32 & 0xFFFFFFFF for s in counts], np.uint32),
    )
    np.testing.assert_array_equal(
        execute(f"shf.r.{mode}.b32 %x, %a, %b, %c;", a, b, SHIFTS),
        np.array([both >> s & 0xFFFFFFFF for s in counts], np.uint32),
    )


def bfe(value, position, length, bits, signed):
    """The PTX manual's pseudocode, bit by bit."""
    position, length, msb = position & 0xFF, length & 0xFF, bits - 1
    bit = lambda index: value >> index & 1  # noqa: E731
    sign = bit(min(position + length - 1, msb)) if signed and length else 0
    result = 0
    for index in range(bits):
        inside = index < length and position + index <= msb
        result |= (bit(position + index) if inside else sign) << index
    return result


def bfi(a, b, position, length, bits):
    """The PTX manual's pseudocode, bit by bit."""
    position, length = position & 0xFF, length & 0xFF
    for index in range(length):
        if position + index < bits:
            at = position + index
            b = (b & ~(1 << at)) | ((a >> index & 1) << at)
    return b


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields(execute, bits):
    fields = [0, 1, 4, 5, 16, 31, 32, 33, 63, 64, 65, 200, 256]
    p, n = (m.ravel().astype(np.uint32) for m in np.meshgrid(fields, fields))
    for value in (0xA5A5_C3C3_F00F_8421, 0x5A3C_0FF0_7BDE_1234):
        value &= 2**bits - 1
        a = np.full(p.size, value, f"uint{bits}")
        pairs = list(zip(p.tolist(), n.tolist(), strict=True))
        for kind in "us":
            got = execute(f"bfe.{kind}{bits} %x, %a, %b, %c;", a, p, n, out=a.dtype)
            want = [bfe(value, x, y, bits, kind == "s") for x, y in pairs]
            np.testing.assert_array_equal(got, np.array(want, a.dtype))
        base = np.full(p.size, 0x0123_4567_89AB_CDEF & (2**bits - 1), a.dtype)
        got = execute(f"bfi.b{bits} %x, %a, %b, %c, %d;", a, base, p, n, out=a.dtype)
        want = [bfi(value, int(base[0]), x, y, bits) for x, y in pairs]
        np.testing.assert_array_equal(got, np.array(want, a.dtype))


def test_prmt(execute):
    a, b = np.array([0x8342_0180], np.uint32), np.array([0xFF7F_C501], np.uint32)
    for selector, want in (
        ("0x3210", 0x8342_0180),
        ("0x7654", 0xFF7F_C501),
        ("0x7610", 0xFF7F_0180),
        ("0x0123", 0x8001_4283),
        ("0x888B", 0xFFFF_FFFF),
        ("0x9DEF", 0x00FF_00FF),
    ):
        got = execute(f"prmt.b32 %x, %a, %b, {selector};", a, b)
        assert hex(got[0]) == hex(want), selector


def test_lop3_is_its_table(execute):
    rows = np.arange(8, dtype=np.uint32)
    a, b, c = (np.where(rows & bit, 0xFFFFFFFF, 0).astype(np.uint32) for bit in (4, 2, 1))
    for table in (0x00, 0xFF, 0xC0, 0x96, 0xEA, 0x1B):
        got = execute(f"lop3.b32 %x, %a, %b, %c, {table};", a, b, c)
        want = [0xFFFFFFFF if table >> row & 1 else 0 for row in range(8)]
        np.testing.assert_array_equal(got, np.array(want, np.uint32))


@pytest.mark.parametrize("type_name", ["u32", "s32", "s16", "u64"])
def test_setp_on_integers(execute, type_name):
    a, b = edges(type_name)
    for comparison, want in (
        ("eq", a == b), ("ne", a != b), ("lt", a < b),
        ("le", a <= b), ("gt", a > b), ("ge", a >= b),
    ):  # fmt: skip
        body = f"setp.{comparison}.{type_name} %p1|%p2, %a, %b; selp.b32 %x, 1, 0, %p1;"
        np.testing.assert_array_equal(execute(body, a, b), want, err_msg=comparison)
        body = body.replace("0, %p1", "0, %p2")
        np.testing.assert_array_equal(execute(body, a, b), ~want, err_msg=comparison)


def test_setp_unsigned_names(execute):
    a, b = edges("u32")
    for comparison, want in (("lo", a < b), ("ls", a <= b), ("hi", a > b), ("hs", a >= b)):
        body = f"setp.{comparison}.u32 %p1, %a, %b; selp.b32 %x, 1, 0, %p1;"
        np.testing.assert_array_equal(execute(body, a, b), want, err_msg=comparison)


def test_setp_with_nan(execute):
    nan, one, two = np.float32(np.nan), np.float32(1), np.float32(2)
    a, b = np.array([one, two, one, nan, one, nan]), np.array([two, one, one, one, nan, nan])
    for comparison, want in (
        ("eq", [0, 0, 1, 0, 0, 0]), ("ne", [1, 1, 0, 0, 0, 0]), ("lt", [1, 0, 0, 0, 0, 0]),
        ("ge", [0, 1, 1, 0, 0, 0]), ("equ", [0, 0, 1, 1, 1, 1]), ("neu", [1, 1, 0, 1, 1, 1]),
        ("ltu", [1, 0, 0, 1, 1, 1]), ("leu", [1, 0, 1, 1, 1, 1]), ("gtu", [0, 1, 0, 1, 1, 1]),
        ("geu", [0, 1, 1, 1, 1, 1]), ("num", [1, 1, 1, 0, 0, 0]), ("nan", [0, 0, 0, 1, 1, 1]),
    ):  # fmt: skip
        body = f"setp.{comparison}.f32 %p1, %a, %b; selp.b32 %x, 1, 0, %p1;"
        np.testing.assert_array_equal(execute(body, a, b), want, err_msg=comparison)


def test_setp_flushes_denormals_with_ftz_only(execute):
    a, zero = np.array([1e-40], np.float32), np.zeros(1, np.float32)
    for flush, want in (("", 1), (".ftz", 0)):
        body = f"setp.gt{flush}.f32 %p1, %a, %b; selp.b32 %x, 1, 0, %p1;"
        assert execute(body, a, zero)[0] == want


def test_selp_keeps_nan_bits(execute):
    a, b = np.array([0x7FA12345], np.uint32), np.array([0xFFC00001], np.uint32)
    body = "setp.eq.u32 %p1, %index1, 0; selp.f32 %x, %a, %b, %p1;"
    got = execute(body, np.repeat(a, 2), np.repeat(b, 2))
    assert [hex(v) for v in got] == ["0x7fa12345", "0xffc00001"]


@pytest.mark.parametrize(
    "body", ["add.sat.s32 %x, %a, %a;", "frob.b32 %x, %a;", "add.u8 %x, %a, %a;"]
)
def test_what_is_unknown_raises_by_name(execute, body):
    with pytest.raises(UnsupportedInstruction, match=body.split()[0].replace(".", r"\.")):
        execute(body, np.zeros(1, np.uint32))


@pytest.mark.parametrize("type_name", ["f16x2", "bf16x2"])
def test_setp_of_halves(execute, type_name):
    # 1.0 has these bits in fp16 and in bf16, and 0xffff is a NaN in both.
    one = {"f16x2": 0x3C00, "bf16x2": 0x3F80}[type_name]
    halves = [(0, one), (one, 0), (0xFFFF, one), (0x8000, 0)]
    a = np.array([low | high << 16 for low, high in halves], np.uint32)
    for comparison, low, high in (
        ("gt", [0, 1, 0, 0], [1, 0, 1, 0]), ("gtu", [0, 1, 1, 0], [1, 0, 1, 0]),
        ("eq", [1, 0, 0, 1], [0, 1, 0, 1]), ("nan", [0, 0, 1, 0], [0, 0, 0, 0]),
    ):  # fmt: skip
        body = f"setp.{comparison}.{type_name} %p1|%p2, %a, 0; "
        for predicate, want in (("%p1", low), ("%p2", high)):
            got = execute(f"{body} selp.b32 %x, 1, 0, {predicate};", a)
            np.testing.assert_array_equal(got, want, err_msg=f"{comparison} {predicate}")
