"""Numbers as PTX types them: widths, decoding to NumPy floats, and rounding back.

A register holds bits; a type says how an instruction reads them. Types narrower than fp32 are
decoded to float64, where one operation on them is either exact or rounded so much finer than the
result that rounding again cannot differ (53 >= 2 * 11 + 2, Figueroa 1995), then rounded once.

Source   PTX ISA, "Fundamental Types", "Alternate Floating-Point Data Formats", "Packed Data Types".
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

UNSIGNED: dict[int, np.dtype[Any]] = {n: np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)}
_SIGNED = {n: np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)}

# How the bits of each type appear as a NumPy array. Formats NumPy lacks stay unsigned: see decode.
DTYPES: dict[str, np.dtype[Any]] = {
    "pred": np.dtype(bool),
    **{f"b{n}": dtype for n, dtype in UNSIGNED.items()},
    **{f"u{n}": dtype for n, dtype in UNSIGNED.items()},
    **{f"s{n}": dtype for n, dtype in _SIGNED.items()},
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    **dict.fromkeys(("f16", "bf16", "e4m3x2", "e5m2x2"), UNSIGNED[16]),
    **dict.fromkeys(("f16x2", "bf16x2"), UNSIGNED[32]),
    "f32x2": UNSIGNED[64],
}


@dataclass(frozen=True)
class FloatFormat:
    """An IEEE-like format: stored significand bits, smallest normal exponent, largest finite."""

    mantissa_bits: int
    min_exponent: int
    max_finite: float


FLOAT_FORMATS = {
    "f32": FloatFormat(23, -126, float(np.finfo(np.float32).max)),
    "f16": FloatFormat(10, -14, 65504.0),
    "bf16": FloatFormat(7, -126, (2 - 2**-7) * 2.0**127),
    "e4m3": FloatFormat(3, -6, 448.0),
    "e5m2": FloatFormat(2, -14, 57344.0),
}

_ROUND_TO_INTEGER = {"rn": np.rint, "rz": np.trunc, "rm": np.floor, "rp": np.ceil}


def bits_of(type_name: str) -> int:
    """Width of a type in bits; a predicate has 1."""
    return 1 if type_name == "pred" else DTYPES[type_name].itemsize * 8


def round_to(value: Array, float_format: FloatFormat, rounding: str = "rn") -> Array:
    """float64 `value` rounded once to `float_format`, still as float64, denormals kept.

    `rounding` is rn (ties to even), rz, rm (down) or rp (up). Overflow follows IEEE 754: infinity,
    or the largest finite value where the mode rounds towards it.

    1 + 2**-8 lies half-way between two bf16 numbers: rn gives 1.0, rp gives 1.0078125.
    """
    _, exponent = np.frexp(value)
    quantum = np.maximum(exponent - 1, float_format.min_exponent) - float_format.mantissa_bits
    rounded: Array = np.ldexp(_ROUND_TO_INTEGER[rounding](np.ldexp(value, -quantum)), quantum)
    over = np.isfinite(value) & (np.abs(rounded) > float_format.max_finite)
    to_infinity = {
        "rn": np.ones_like(over),
        "rz": np.zeros_like(over),
        "rm": value < 0,
        "rp": value > 0,
    }[rounding]
    limit = np.copysign(np.where(to_infinity, np.inf, float_format.max_finite), value)
    return np.where(over, limit, rounded)


def bf16_bits_from_f32(value: Array) -> Array:
    """cvt.rn.bf16.f32: ties to even, NaN becomes 0x7fff.

    0x3f808000 (1 + 2**-8, a tie) becomes 0x3f80; 0x3f818000 becomes 0x3f82.
    """
    bits = value.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def canonical_nan(value: Array) -> Array:
    """fp32 with every NaN as 0x7fffffff, the one NaN that NVIDIA's fp32 arithmetic returns."""
    nan = np.isnan(value)
    if not nan.any():
        return value
    return np.where(nan, np.uint32(0x7FFFFFFF), value.view(np.uint32)).view(np.float32)


def flush_denormals(value: Array) -> Array:
    """fp32 with denormals replaced by zero of the same sign (.ftz)."""
    tiny = np.finfo(np.float32).tiny
    return np.where(np.abs(value) < tiny, np.copysign(np.float32(0), value), value)


def saturate(value: Array) -> Array:
    """Clamped to [0, 1], NaN to +0 (.sat)."""
    clamped = np.minimum(np.maximum(value, value.dtype.type(0)), value.dtype.type(1))
    return np.where(clamped > 0, clamped, value.dtype.type(0))


def decode(type_name: str, bits: Array) -> tuple[Array, ...]:
    """The float values in a register, lowest bits first: two for a packed type, else one.

    f32 and f64 keep their dtype; narrower formats come as float64.
    """
    if type_name.endswith("x2"):
        half = bits.dtype.itemsize * 4
        parts = (bits, bits >> bits.dtype.type(half))
        element = UNSIGNED[half]
        return tuple(decode(type_name[:-2], part.astype(element))[0] for part in parts)
    if type_name == "bf16":
        return ((bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64),)
    if type_name == "f16":
        return (bits.view(np.float16).astype(np.float64),)
    if type_name in ("e4m3", "e5m2"):
        return (_FP8_VALUES[type_name][bits],)
    return (bits.view(DTYPES[type_name]),)


def encode(type_name: str, values: tuple[Array, ...]) -> Array:
    """The register for `values` (lowest bits first), each rounded once to nearest even.

    NaN becomes the format's canonical one; finite values beyond fp8's range saturate.
    """
    if type_name.endswith("x2"):
        low, high = (encode(type_name[:-2], (value,)) for value in values)
        half = low.dtype.itemsize * 8
        wide = UNSIGNED[2 * half].type
        unsigned = UNSIGNED[half]
        packed: Array = low.view(unsigned).astype(wide) | (
            high.view(unsigned).astype(wide) << wide(half)
        )
        return packed
    (value,) = values
    if type_name == "f32":
        return canonical_nan(value.astype(np.float32, copy=False))
    if type_name == "f64":
        return value
    if type_name == "f16":
        return np.where(
            np.isnan(value), np.uint16(0x7FFF), value.astype(np.float16).view(np.uint16)
        )
    if type_name == "bf16":
        if value.dtype == np.float64:
            value = round_to(value, FLOAT_FORMATS["bf16"]).astype(np.float32)
        return bf16_bits_from_f32(value)
    return _encode_fp8(type_name, value)


def _encode_fp8(type_name: str, value: Array) -> Array:
    """cvt.rn.satfinite to e4m3 or e5m2: NaN becomes 0x7f."""
    limit = FLOAT_FORMATS[type_name].max_finite
    rounded = round_to(value.astype(np.float64), FLOAT_FORMATS[type_name])
    magnitude = np.minimum(np.abs(rounded), limit)
    table = _FP8_VALUES[type_name][: 0x7F if type_name == "e4m3" else 0x7C]
    code = np.searchsorted(table, magnitude).astype(np.uint8)
    sign = np.signbit(value).astype(np.uint8) << np.uint8(7)
    return np.where(np.isnan(value), np.uint8(0x7F), code | sign)


def _fp8_values(float_format: FloatFormat, specials: dict[int, float]) -> Array:
    """The 256 values of an fp8 format, indexed by their bits."""
    codes = np.arange(128)
    fraction = codes & ((1 << float_format.mantissa_bits) - 1)
    biased = codes >> float_format.mantissa_bits
    significand = np.where(biased > 0, fraction + (1 << float_format.mantissa_bits), fraction)
    exponent = np.maximum(biased, 1) - 1 + float_format.min_exponent - float_format.mantissa_bits
    values = np.ldexp(significand.astype(np.float64), exponent)
    for code, special in specials.items():
        values[code] = special
    return np.concatenate([values, -values])


_FP8_VALUES = {
    "e4m3": _fp8_values(FLOAT_FORMATS["e4m3"], {0x7F: np.nan}),
    "e5m2": _fp8_values(
        FLOAT_FORMATS["e5m2"], {0x7C: np.inf, 0x7D: np.nan, 0x7E: np.nan, 0x7F: np.nan}
    ),
}
