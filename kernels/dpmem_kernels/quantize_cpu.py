"""The CPU backend of quantize.py: loops compiled by numba, at memory speed.

It is imported by the first call that needs it, so that importing dpmem_kernels costs no compiler.

A word's halves are neighbours, so that a quarter of a group is as many half-words as elements:
noise and codes are taken as arrays of halves, and every loop runs over neighbours in memory, which
LLVM turns into vector code.
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from torch import Tensor

from .cpu_loop import loop
from .cpu_threads import threads_for
from .numba_intrinsics import bits_to_float, decode, encode, float_to_bits, fma, typed_array
from .philox import philox_scalar
from .quantize import NAN_META, ROUND_UP, SCALE_LIMIT, SMALLEST_SCALE

# Groups per unit of parallel work: enough to hide the start of a unit, few enough to balance.
_CHUNK = 256

philox = numba.njit(inline="always")(philox_scalar)


@numba.njit(inline="always")
def _from_key(key: Any) -> Any:
    """The bit pattern of the float whose place in the order of integers is `key`."""
    sign = np.int32(key >> np.int32(31))
    return np.uint32(np.int32(key ^ np.int32(sign & np.int32(0x7FFFFFFF))))


@numba.njit(inline="always")
def _is_finite(pattern: Any) -> Any:
    return np.uint32(pattern & np.uint32(0x7FFFFFFF)) < np.uint32(0x7F800000)


@numba.njit(inline="always")
def _code(stored: Any, zero: Any, inverse: Any, noise: Any, base: Any, shift: Any) -> Any:
    """One element's code; above its 8 bits the exponent of the rounded sum goes."""
    addend = bits_to_float(np.uint32(base | np.uint32(noise)))
    total = fma(np.float32(decode(stored) - zero), inverse, addend)
    return np.uint32((float_to_bits(total) >> shift) & np.uint32(0xFF))


@numba.njit
def _range_of(row: Any) -> Any:
    """The bits of the minimum and maximum; a NaN, if there is one, is either."""
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for i in range(row.size):
        # Floats in the order of integers, NaNs at both ends: unlike a floating-point minimum this
        # becomes a vector instruction and cannot drop a NaN.
        pattern = np.int32(float_to_bits(decode(row[i])))
        sign = np.int32(pattern >> np.int32(31))
        key = np.int32(pattern ^ np.int32(sign & np.int32(0x7FFFFFFF)))
        low, high = min(low, key), max(high, key)
    return _from_key(low), _from_key(high)


@numba.njit
def _draw(random: Any, counter: Any, noise: Any) -> None:
    """Fill random [4, words] with the Philox blocks of counters from `counter` on."""
    for j in range(random.shape[1]):
        random[0, j], random[1, j], random[2, j], random[3, j] = philox(
            np.uint32(counter + j), noise[2], noise[3], noise[4], noise[0], noise[1]
        )


@numba.njit
def _narrow_to_15_bits(random: Any) -> None:
    """Leave the low 15 bits of each word's low half and the high 15 of its high half."""
    for k in range(4):
        for j in range(random.shape[1]):
            low_half = np.uint32(random[k, j] & np.uint32(0x7FFF))
            high_half = np.uint32(np.uint32(random[k, j] >> np.uint32(17)) << np.uint32(16))
            random[k, j] = np.uint32(low_half | high_half)


@numba.njit
def _encode_bytes(row: Any, codes: Any, zero: Any, inverse: Any, noise: Any) -> None:
    """The 8-bit codes of a group, two quarters in each half of `codes`."""
    quarter = row.size // 4
    base, shift = np.uint32(0x43800000), np.uint32(15)
    for pair in range(2):
        a, b = row[2 * pair * quarter :], row[(2 * pair + 1) * quarter :]
        u, v, out = noise[2 * pair], noise[2 * pair + 1], codes[pair * quarter :]
        for e in range(quarter):
            c0 = _code(a[e], zero, inverse, u[e], base, shift)
            c1 = _code(b[e], zero, inverse, v[e], base, shift)
            out[e] = np.uint32(c0 | np.uint32(c1 << np.uint32(8)))


@numba.njit
def _encode_fields(row: Any, codes: Any, bits: int, zero: Any, inverse: Any, noise: Any) -> None:
    """The 4- or 2-bit codes of a group, all four quarters in each of `codes`."""
    quarter = row.size // 4
    base, shift, step = np.uint32(0x43000000), np.uint32(16), np.uint32(bits)
    x0, x1, x2, x3 = row, row[quarter:], row[2 * quarter :], row[3 * quarter :]
    u0, u1, u2, u3 = noise[0], noise[1], noise[2], noise[3]
    for e in range(quarter):
        c0 = _code(x0[e], zero, inverse, u0[e], base, shift)
        c1 = _code(x1[e], zero, inverse, u1[e], base, shift)
        c2 = _code(x2[e], zero, inverse, u2[e], base, shift)
        c3 = _code(x3[e], zero, inverse, u3[e], base, shift)
        upper = np.uint32(c2 | np.uint32(c3 << step))
        lower = np.uint32(c0 | np.uint32(c1 << step))
        codes[e] = np.uint32(lower | np.uint32(upper << np.uint32(2 * step)))


@numba.njit
def _quantize_group(
    row: Any, codes: Any, bits: int, noise: Any, counter: Any, random: Any, random_halves: Any
) -> np.int32:
    """Fill the group's `codes`, half-words of the format; its metadata.

    `random` [4, words] is scratch memory, and `random_halves` the same as halves of words.
    """
    low_bits, high_bits = _range_of(row)
    finite = _is_finite(low_bits) and _is_finite(high_bits)
    if low_bits == np.uint32(0x80000000):
        low_bits = np.uint32(0)
    if low_bits > np.uint32(0x80000000):
        low_bits = np.uint32(low_bits + np.uint32(0xFFFF))
    zero_bits = np.uint32(low_bits & np.uint32(0xFFFF0000))
    zero = bits_to_float(zero_bits)
    per_level = np.float32(1.0 / ((1 << bits) - 1))
    raw_scale = np.float32(np.float32(bits_to_float(high_bits) - zero) * per_level)
    raised = np.uint32((float_to_bits(raw_scale) & np.uint32(0x7FFFFFFF)) + np.uint32(ROUND_UP))
    if not finite or raised >= np.uint32(SCALE_LIMIT):
        codes[:] = 0
        return np.int32(NAN_META)
    scale_bits = max(np.uint32(raised & np.uint32(0xFFFF0000)), np.uint32(SMALLEST_SCALE))
    inverse = np.float32(np.float32(1.0) / bits_to_float(scale_bits))
    _draw(random, counter, noise)
    if bits == 8:
        _narrow_to_15_bits(random)
        _encode_bytes(row, codes, zero, inverse, random_halves)
    else:
        _encode_fields(row, codes, bits, zero, inverse, random_halves)
    return np.int32(scale_bits | (zero_bits >> np.uint32(16)))


@loop()
def _quantize_groups(
    x: Any, codes: Any, meta: Any, bits: int, group_size: int, noise: Any, first: int, last: int
) -> None:
    """Groups first .. last. `codes` as halves of the format's words: bytes for 2 bits."""
    words, halves_out = group_size // 8, codes.size // meta.size
    random = np.empty((4, words), np.uint32)
    random_halves = random.view(np.uint16)
    for g in range(first, min(last, x.size // group_size)):
        row = x[g * group_size : (g + 1) * group_size]
        out = codes[g * halves_out : (g + 1) * halves_out]
        counter = np.uint32(g * words)
        meta[g] = _quantize_group(row, out, bits, noise, counter, random, random_halves)
    if last * group_size > x.size:
        # After the loop: an array that may be either costs it a reference count for each slice.
        g = last - 1
        present = x[g * group_size :]
        padded = np.empty(group_size, x.dtype)
        padded[: present.size] = present
        padded[present.size :] = present[-1]
        out = codes[g * halves_out :]
        counter = np.uint32(g * words)
        meta[g] = _quantize_group(padded, out, bits, noise, counter, random, random_halves)


@loop(parallel=True)
def _quantize_parallel(
    x: Any, codes: Any, meta: Any, bits: int, group_size: int, noise: Any
) -> None:
    for chunk in numba.prange((meta.size + _CHUNK - 1) // _CHUNK):
        first = chunk * _CHUNK
        last = min(first + _CHUNK, meta.size)
        _quantize_groups(x, codes, meta, bits, group_size, noise, first, last)


@numba.njit(inline="always")
def _value(half: Any, shift: Any, mask: Any, scale: Any, zero: Any, like: Any) -> Any:
    """The element whose code starts at bit `shift` of a half-word, as it is stored."""
    code = np.int32(np.uint32(np.uint32(half) >> shift) & mask)
    return encode(fma(np.float32(code), scale, zero), like)


@numba.njit
def _dequantize_group(codes: Any, meta: Any, row: Any, bits: int) -> None:
    """Fill the row from the group's `codes`, half-words of the format, and metadata."""
    quarter = row.size // 4
    scale = bits_to_float(np.uint32(np.uint32(meta) & np.uint32(0xFFFF0000)))
    zero = bits_to_float(np.uint32(np.uint32(meta) << np.uint32(16)))
    mask, step = np.uint32((1 << bits) - 1), np.uint32(bits)
    y0, y1 = row[:quarter], row[quarter : 2 * quarter]
    y2, y3 = row[2 * quarter : 3 * quarter], row[3 * quarter :]
    if bits == 8:
        for e in range(quarter):
            y0[e] = _value(codes[e], np.uint32(0), mask, scale, zero, y0[e])
            y1[e] = _value(codes[e], step, mask, scale, zero, y0[e])
            y2[e] = _value(codes[quarter + e], np.uint32(0), mask, scale, zero, y0[e])
            y3[e] = _value(codes[quarter + e], step, mask, scale, zero, y0[e])
    else:
        for e in range(quarter):
            y0[e] = _value(codes[e], np.uint32(0), mask, scale, zero, y0[e])
            y1[e] = _value(codes[e], step, mask, scale, zero, y0[e])
            y2[e] = _value(codes[e], np.uint32(2 * step), mask, scale, zero, y0[e])
            y3[e] = _value(codes[e], np.uint32(3 * step), mask, scale, zero, y0[e])


@loop()
def _dequantize_groups(
    codes: Any, meta: Any, out: Any, bits: int, group_size: int, first: int, last: int
) -> None:
    """Groups first .. last. `codes` as halves of the format's words: bytes for 2 bits."""
    halves_in = codes.size // meta.size
    for g in range(first, min(last, out.size // group_size)):
        source = codes[g * halves_in : (g + 1) * halves_in]
        _dequantize_group(source, meta[g], out[g * group_size : (g + 1) * group_size], bits)
    if last * group_size > out.size:
        g = last - 1
        whole = np.empty(group_size, out.dtype)
        _dequantize_group(codes[g * halves_in :], meta[g], whole, bits)
        row = out[g * group_size :]
        row[:] = whole[: row.size]


@loop(parallel=True)
def _dequantize_parallel(codes: Any, meta: Any, out: Any, bits: int, group_size: int) -> None:
    for chunk in numba.prange((meta.size + _CHUNK - 1) // _CHUNK):
        first = chunk * _CHUNK
        last = min(first + _CHUNK, meta.size)
        _dequantize_groups(codes, meta, out, bits, group_size, first, last)


def _halves(codes: Tensor, bits: int) -> Any:
    """The format's words, 16 bits wide for 2 bits and else 32, as an array of their halves."""
    return codes.numpy().view(np.uint8 if bits == 2 else np.uint16)


def quantize(
    x: Tensor, codes: Tensor, meta: Tensor, bits: int, group_size: int, noise: Sequence[int]
) -> None:
    """Fill `codes` and `meta` from x, which has an element or more."""
    arguments = (
        typed_array(x),
        _halves(codes, bits),
        meta.numpy(),
        bits,
        group_size,
        tuple(np.array(noise, np.uint32)),
    )
    if threads_for(meta.numel() // _CHUNK) == 1:
        _quantize_groups(*arguments, 0, meta.numel())
    else:
        _quantize_parallel(*arguments)


def dequantize(codes: Tensor, meta: Tensor, out: Tensor, bits: int, group_size: int) -> None:
    """Fill `out`, which has an element or more."""
    arguments = (_halves(codes, bits), meta.numpy(), typed_array(out), bits, group_size)
    if threads_for(meta.numel() // _CHUNK) == 1:
        _dequantize_groups(*arguments, 0, meta.numel())
    else:
        _dequantize_parallel(*arguments)
