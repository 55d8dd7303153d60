"""mov and cvt: widths, rounding modes, saturation, packing."""

import numpy as np
import pytest
import torch

from verify.ptx import UnsupportedInstruction


def f32(*hexadecimal):
    return np.array(hexadecimal, np.uint32).view(np.float32)


def random_f32(count=4000):
    """Random bit patterns: all exponents, infinities and NaN among them."""
    return np.random.default_rng(0).integers(0, 2**32, count, np.uint64).astype(np.uint32)


@pytest.mark.parametrize(
    ("mode", "want"),
    # 1 + 2**-8 is a tie between 0x3f80 and 0x3f81; 1 + 3 * 2**-8 one between 0x3f81 and 0x3f82.
    [
        ("rn", [0x3F80, 0x3F82, 0x3F81, 0xBF80]),
        ("rz", [0x3F80, 0x3F81, 0x3F80, 0xBF80]),
        ("rm", [0x3F80, 0x3F81, 0x3F80, 0xBF81]),
        ("rp", [0x3F81, 0x3F82, 0x3F81, 0xBF80]),
    ],
)
def test_bf16_rounding_modes(execute, mode, want):
    a = f32(0x3F808000, 0x3F818000, 0x3F808001, 0xBF808000)
    got = execute(f"cvt.{mode}.bf16.f32 %x, %a;", a, out=np.uint16)
    assert [hex(v) for v in got] == [hex(v) for v in want]


@pytest.mark.parametrize(
    ("mode", "want"),
    # 2049 is a tie of fp16 (spacing 2); 65520 is the tie with infinity; 2**-25 one with zero.
    [
        ("rn", [0x6800, 0x7C00, 0x0000, 0xFC00]),
        ("rz", [0x6800, 0x7BFF, 0x0000, 0xFBFF]),
        ("rm", [0x6800, 0x7BFF, 0x0000, 0xFC00]),
        ("rp", [0x6801, 0x7C00, 0x0001, 0xFBFF]),
    ],
)
def test_fp16_rounding_modes(execute, mode, want):
    a = np.array([2049, 65520, 2.0**-25, -70000], np.float32)
    got = execute(f"cvt.{mode}.f16.f32 %x, %a;", a, out=np.uint16)
    assert [hex(v) for v in got] == [hex(v) for v in want]


@pytest.mark.parametrize(
    ("name", "dtype", "nan"),
    [("bf16", torch.bfloat16, 0x7FFF), ("f16", torch.float16, 0x7FFF)],
)
def test_narrowing_agrees_with_torch(execute, name, dtype, nan):
    a = random_f32()
    want = torch.from_numpy(a.view(np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint16)
    want = np.where(np.isnan(a.view(np.float32)), nan, want)
    np.testing.assert_array_equal(execute(f"cvt.rn.{name}.f32 %x, %a;", a, out=np.uint16), want)
    packed = execute(f"cvt.rn.{name}x2.f32 %x, %a, %b;", a, a[::-1].copy())
    np.testing.assert_array_equal(packed >> 16, want)
    np.testing.assert_array_equal(packed & 0xFFFF, want[::-1])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_widening_is_exact_for_every_value(execute, name, dtype):
    a = np.arange(2**16, dtype=np.uint16)
    want = torch.from_numpy(a.view(np.int16)).view(dtype).float().numpy()
    got = execute(f"cvt.f32.{name} %x, %a;", a, out=np.float32)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(
        np.signbit(got[~np.isnan(got)]), np.signbit(want[~np.isnan(want)])
    )


@pytest.mark.parametrize(
    ("name", "dtype", "limit"),
    [("e4m3x2", torch.float8_e4m3fn, 448), ("e5m2x2", torch.float8_e5m2, 57344)],
)
def test_fp8_agrees_with_torch(execute, name, dtype, limit):
    values = torch.from_numpy(random_f32().view(np.float32)).nan_to_num(0)
    values[::2] = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * limit / 4
    values = values.numpy()
    values[:3] = [np.nan, np.inf, -np.inf]
    clamped = torch.from_numpy(values).clamp(-limit, limit).to(dtype).view(torch.uint8).numpy()
    clamped = np.where(np.isnan(values), 0x7F, clamped)
    packed = execute(
        f"cvt.rn.satfinite.{name}.f32 %x, %a, %b;", values, np.zeros_like(values), out=np.uint16
    )
    np.testing.assert_array_equal(packed >> 8, clamped)
    np.testing.assert_array_equal(packed & 0xFF, 0)
    codes = np.arange(256, dtype=np.uint16)
    halves = execute(f"cvt.rn.f16x2.{name} %x, %a;", codes | 0x0100)
    want = torch.from_numpy(codes.astype(np.uint8)).view(dtype).half().numpy()
    np.testing.assert_array_equal((halves & 0xFFFF).astype(np.uint16).view(np.float16), want)


@pytest.mark.parametrize(
    ("mode", "want"),
    [
        ("rni", [2, 4, -2, 2, 0]),
        ("rzi", [2, 3, -2, 1, 0]),
        ("rmi", [2, 3, -3, 1, -1]),
        ("rpi", [3, 4, -2, 2, 0]),
    ],
)
def test_integer_rounding_modes(execute, mode, want):
    a = np.array([2.5, 3.5, -2.5, 1.5, -0.25], np.float32)
    np.testing.assert_array_equal(execute(f"cvt.{mode}.s32.f32 %x, %a;", a, out=np.int32), want)
    got = execute(f"cvt.{mode}.f32.f32 %x, %a;", a, out=np.float32)
    np.testing.assert_array_equal(got, want)


def test_float_to_integer_saturates(execute):
    a = np.array([np.inf, -np.inf, np.nan, 3e9, -3e9, 2147483520.0, 256.0, -1.0], np.float32)
    got = execute("cvt.rzi.s32.f32 %x, %a;", a, out=np.int32)
    top, low = 2**31 - 1, -(2**31)
    np.testing.assert_array_equal(got, [top, low, 0, top, low, 2147483520, 256, -1])
    got = execute("cvt.rzi.u32.f32 %x, %a;", a)
    np.testing.assert_array_equal(got, [2**32 - 1, 0, 0, 3000000000, 0, 2147483520, 256, 0])
    # An 8-bit result is extended into its register by its own sign.
    got = execute("cvt.rzi.s8.f32 %x, %a;", a, out=np.int32)
    np.testing.assert_array_equal(got, [127, -128, 0, 127, -128, 127, 127, -1])
    got = execute("cvt.rzi.s64.f32 %x, %a;", a, out=np.int64)
    top, low = 2**63 - 1, -(2**63)
    np.testing.assert_array_equal(got[:5], [top, low, low, 3000000000, -3000000000])
    got = execute("cvt.rzi.s32.f64 %x, %a;", a.astype(np.float64), out=np.int32)
    assert got[2] == -(2**31)
    edge = np.array([2.0**63, 2.0**63 - 1024, 2.0**64], np.float64)
    got = execute("cvt.rzi.u64.f64 %x, %a;", edge, out=np.uint64)
    np.testing.assert_array_equal(got, np.array([2**63, 2**63 - 1024, 2**64 - 1], np.uint64))


def test_integer_to_float(execute):
    a = np.array([2**24 + 1, -(2**24) - 1, 2**31 - 1, 0, -1], np.int32)
    for mode, want in (
        ("rn", [2**24, -(2**24), 2**31, 0, -1]),
        ("rz", [2**24, -(2**24), 2**31 - 128, 0, -1]),
        ("rp", [2**24 + 2, -(2**24), 2**31, 0, -1]),
        ("rm", [2**24, -(2**24) - 2, 2**31 - 128, 0, -1]),
    ):
        got = execute(f"cvt.{mode}.f32.s32 %x, %a;", a, out=np.float32)
        np.testing.assert_array_equal(got, np.array(want, np.float32), err_msg=mode)
    wide = np.array([2**63 + 2**39 + 1, 2**63 + 2**39, 2**64 - 1], np.uint64)
    got = execute("cvt.rn.f32.u64 %x, %a;", wide, out=np.float32)
    np.testing.assert_array_equal(got, np.array([2.0**63 + 2**40, 2.0**63, 2.0**64], np.float32))


def test_integer_widths(execute):
    a = np.array([0xFFFF_FF80, 0x7F, 0x180], np.uint32)
    for body, dtype, want in (
        ("cvt.s32.s8 %x, %a", np.int32, [-128, 127, -128]),
        ("cvt.u32.u8 %x, %a", np.uint32, [0x80, 0x7F, 0x80]),
        ("cvt.s64.s32 %x, %a", np.int64, [-128, 127, 384]),
        ("cvt.u64.u32 %x, %a", np.uint64, [0xFFFF_FF80, 0x7F, 0x180]),
        ("cvt.u16.u32 %x, %a", np.uint16, [0xFF80, 0x7F, 0x180]),
        ("cvt.u32.s8 %x, %a", np.uint32, [0xFFFF_FF80, 0x7F, 0xFFFF_FF80]),
        ("cvt.sat.u8.s32 %x, %a", np.uint32, [0, 127, 255]),
        ("cvt.sat.s8.s32 %x, %a", np.int32, [-128, 127, 127]),
        ("cvt.sat.s32.u32 %x, %a", np.int32, [2**31 - 1, 127, 384]),
        ("cvt.sat.u32.s32 %x, %a", np.uint32, [0, 127, 384]),
    ):
        np.testing.assert_array_equal(execute(f"{body};", a, out=dtype), want, err_msg=body)


def test_sat_and_ftz_between_floats(execute):
    a = np.array([1.5, -0.5, np.nan, 0.25, 1e-40], np.float32)
    got = execute("cvt.sat.f32.f32 %x, %a;", a, out=np.float32)
    np.testing.assert_array_equal(got, np.array([1, 0, 0, 0.25, 1e-40], np.float32))
    assert execute("cvt.rn.ftz.f16.f32 %x, %a;", a, out=np.uint16)[4] == 0
    double = np.array([1 + 2.0**-24, 1e-40], np.float64)
    got = execute("cvt.rn.f32.f64 %x, %a;", double, out=np.float32)
    np.testing.assert_array_equal(got, np.array([1, 1e-40], np.float32))
    assert execute("cvt.rp.f32.f64 %x, %a;", double, out=np.float32)[0] == 1 + np.float32(2) ** -23
    assert execute("cvt.rn.ftz.f32.f64 %x, %a;", double, out=np.float32)[1] == 0


def test_relu_packs_no_negative(execute):
    a, b = np.array([-1, 2], np.float32), np.array([3, -0.5], np.float32)
    got = execute("cvt.rn.relu.bf16x2.f32 %x, %a, %b;", a, b)
    assert [hex(v) for v in got] == ["0x4040", "0x40000000"]


def test_mov_packs_and_unpacks(execute):
    a, b = np.array([0x11112222], np.uint32), np.array([0x33334444], np.uint32)
    got = execute("mov.b64 %x, {%a, %b};", a, b, out=np.uint64)
    assert hex(got[0]) == "0x3333444411112222"
    body = "mov.b64 %q1, {%a, %b}; mov.b64 {_, %x}, %q1;"
    assert hex(execute(body, a, b)[0]) == "0x33334444"
    body = "mov.b64 %q1, {%a, %b}; mov.b64 {%h0, %h1, %h2, %h3}, %q1; mov.b32 %x, {%h2, %h1};"
    assert hex(execute(body, a, b)[0]) == "0x11114444"


def test_mov_literals(execute):
    assert execute("mov.f32 %x, 0f3FC00000;", out=np.float32)[0] == 1.5
    assert execute("mov.b32 %x, -2;", out=np.int32)[0] == -2
    assert execute("mov.f64 %x, 0d3FF8000000000000;", out=np.float64)[0] == 1.5
    assert execute("mov.u64 %x, 0xFFFFFFFFFFFFFFFF;", out=np.uint64)[0] == 2**64 - 1


@pytest.mark.parametrize("body", ["cvt.rn.f16.s64 %x, %a;", "cvt.rz.bf16x2.f32 %x, %a, %a;"])
def test_conversions_left_out_raise(execute, body):
    with pytest.raises(UnsupportedInstruction, match=body.split()[0].replace(".", r"\.")):
        execute(body, np.zeros(1, np.int64 if "s64" in body else np.float32), out=np.uint32)
