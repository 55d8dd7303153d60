"""The CPU backend of quantize.py: loops compiled by numba, at memory speed.

It is imported by the first call that needs it, so that importing dpmem_kernels costs no compiler.

A word's halves are neighbours, so that a quarter of a group is as many half-words as elements:
noise and codes are taken as halves, sixteen neighbours of each quarter at once (numba_lanes.py).
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from torch import Tensor

from .cpu_loop import loop
from .cpu_threads import threads_for
from .numba_intrinsics import LIKE, array_at, bits_to_float, decode, float_to_bits
from .numba_lanes import (
    LANES,
    draw,
    either,
    field,
    load_floats,
    load_words,
    rounded,
    scaled,
    store_floats,
    store_words,
    to_15_bits,
    will_read,
    will_write,
)
from .quantize import NAN_META, ROUND_UP, SCALE_LIMIT, SMALLEST_SCALE

# Groups per unit of parallel work: enough to hide the start of a unit, few enough to balance.
_CHUNK = 256
# Groups from the one at work to that which the processor is asked for. After a matrix product the
# caches hold little of a tensor, and a quarter of the time without this was waiting.
_AHEAD = 4


@numba.njit(inline="always")
def _zero_of(meta: Any) -> Any:
    return bits_to_float(np.uint32(meta << np.uint32(16)))


@numba.njit(inline="always")
def _scale_of(meta: Any) -> Any:
    return bits_to_float(np.uint32(meta & np.uint32(0xFFFF0000)))


@numba.njit(inline="always")
def _is_finite(pattern: Any) -> Any:
    return np.uint32(pattern & np.uint32(0x7FFFFFFF)) < np.uint32(0x7F800000)


@numba.njit
def _range_of(row: Any) -> Any:
    """The bits of the minimum and maximum; a NaN, if there is one, is either."""
    # As integers: unlike a floating-point minimum these become vector instructions and cannot drop
    # a NaN. The largest without its sign is the least of the negative ones, if there are any.
    low, high, largest = np.int32(0x7FFFFFFF), np.int32(-0x80000000), np.uint32(0)
    for i in range(row.size):
        pattern = float_to_bits(decode(row[i]))
        low, high = min(low, np.int32(pattern)), max(high, np.int32(pattern))
        largest = max(largest, pattern)
    return (
        largest if low < np.int32(0) else np.uint32(low),
        np.uint32(low) if high < np.int32(0) else np.uint32(high),
    )


@numba.njit(inline="always")
def _encode_bytes(
    x: Any, start: int, codes: Any, out: int, quarter: int, meta: Any, noise: Any, counter: Any
) -> None:
    """The 8-bit codes of the group at x[start], two quarters in each half of codes[out:]."""
    zero, inverse = _zero_of(meta), np.float32(np.float32(1.0) / _scale_of(meta))
    base, low, high = np.uint32(0x43800000), np.uint32(0xFF), np.uint32(0xFF00)
    for e in range(0, quarter, LANES):
        random = draw(np.uint32(counter + e // 2), noise)
        for pair in range(2):
            at = start + 2 * pair * quarter + e
            u, v = to_15_bits(random[2 * pair]), to_15_bits(random[2 * pair + 1])
            c0 = rounded(load_floats(x, at), zero, inverse, base, u)
            c1 = rounded(load_floats(x, at + quarter), zero, inverse, base, v)
            packed = either(field(c0, np.uint32(15), low), field(c1, np.uint32(7), high))
            store_words(codes, out + pair * quarter + e, packed)


@numba.njit(inline="always")
def _encode_fields(
    x: Any,
    start: int,
    codes: Any,
    out: int,
    bits: int,
    quarter: int,
    meta: Any,
    noise: Any,
    counter: Any,
) -> None:
    """The 4- or 2-bit codes of the group at x[start], all quarters in each of codes[out:]."""
    zero, inverse = _zero_of(meta), np.float32(np.float32(1.0) / _scale_of(meta))
    base, mask = np.uint32(0x43000000), np.uint32((1 << bits) - 1)
    for e in range(0, quarter, LANES):
        at, random = start + e, draw(np.uint32(counter + e // 2), noise)
        c0 = rounded(load_floats(x, at), zero, inverse, base, random[0])
        c1 = rounded(load_floats(x, at + quarter), zero, inverse, base, random[1])
        c2 = rounded(load_floats(x, at + 2 * quarter), zero, inverse, base, random[2])
        c3 = rounded(load_floats(x, at + 3 * quarter), zero, inverse, base, random[3])
        # What is above a code in the rounded sum is its exponent; each goes where it belongs.
        lower = either(
            field(c0, np.uint32(16), mask), field(c1, np.uint32(16 - bits), mask << bits)
        )
        upper = either(
            field(c2, np.uint32(16 - 2 * bits), mask << 2 * bits),
            field(c3, np.uint32(16 - 3 * bits), mask << 3 * bits),
        )
        store_words(codes, out + e, either(lower, upper))


@numba.njit
def _meta_of(low_bits: Any, high_bits: Any, bits: int) -> Any:
    """A group's metadata from the bits of its minimum and maximum."""
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
        return np.uint32(NAN_META)
    scale_bits = max(np.uint32(raised & np.uint32(0xFFFF0000)), np.uint32(SMALLEST_SCALE))
    return np.uint32(scale_bits | (zero_bits >> np.uint32(16)))


@numba.njit
def _quantize_whole(
    x: Any, codes: Any, meta: Any, bits: int, group_size: int, noise: Any, counter: Any
) -> bool:
    """Groups that are all there, with noise from `counter` on; whether each had a scale."""
    quarter, code_bytes = group_size // 4, group_size // 8 * bits
    whole_codes, halves = True, codes.view(np.uint16)
    for g in range(meta.size):
        start, out = g * group_size, g * (code_bytes // 2)
        for i in range(start + _AHEAD * group_size, start + (_AHEAD + 1) * group_size, LANES):
            will_read(x, i)
        low_bits, high_bits = _range_of(x[start : start + group_size])
        found = _meta_of(low_bits, high_bits, bits)
        meta[g] = np.int32(found)
        first = np.uint32(counter + g * (group_size // 8))
        if found == np.uint32(NAN_META):
            codes[g * code_bytes : (g + 1) * code_bytes] = 0
            whole_codes = False
        elif bits == 8:
            _encode_bytes(x, start, halves, out, quarter, found, noise, first)
        elif bits == 4:
            _encode_fields(x, start, halves, out, 4, quarter, found, noise, first)
        else:
            _encode_fields(x, start, codes, g * code_bytes, 2, quarter, found, noise, first)
    return whole_codes


@loop()
def _quantize_groups(
    x_at: int,
    like: Any,
    numel: int,
    codes_at: int,
    meta_at: int,
    bits: int,
    group_size: int,
    key_low: int,
    key_high: int,
    stream: int,
    step: int,
    rank: int,
    first: int,
    last: int,
) -> bool:
    """Groups first .. last of the tensors at these addresses; whether each had a scale."""
    words, code_bytes = group_size // 8, group_size // 8 * bits
    key = np.uint32(key_low), np.uint32(key_high)
    noise = (*key, np.uint32(stream), np.uint32(step), np.uint32(rank))
    x = array_at(x_at, numel, like)
    codes = array_at(codes_at, last * code_bytes, np.uint8(0))
    meta = array_at(meta_at, last, np.int32(0))
    whole, all_had = min(last, numel // group_size), True
    if first < whole:
        all_had = _quantize_whole(
            x[first * group_size : whole * group_size],
            codes[first * code_bytes : whole * code_bytes],
            meta[first:whole],
            bits,
            group_size,
            noise,
            np.uint32(first * words),
        )
    if whole < last:
        present = x[whole * group_size :]
        padded = np.empty(group_size, x.dtype)
        padded[: present.size] = present
        padded[present.size :] = present[-1]
        out = codes[whole * code_bytes :]
        counter = np.uint32(whole * words)
        all_had &= _quantize_whole(padded, out, meta[whole:], bits, group_size, noise, counter)
    return all_had


@loop(parallel=True)
def _quantize_parallel(
    x_at: int,
    like: Any,
    numel: int,
    codes_at: int,
    meta_at: int,
    bits: int,
    group_size: int,
    key_low: int,
    key_high: int,
    stream: int,
    step: int,
    rank: int,
    groups: int,
) -> bool:
    without = 0
    for chunk in numba.prange((groups + _CHUNK - 1) // _CHUNK):
        first = chunk * _CHUNK
        last = min(first + _CHUNK, groups)
        without += not _quantize_groups(
            x_at,
            like,
            numel,
            codes_at,
            meta_at,
            bits,
            group_size,
            key_low,
            key_high,
            stream,
            step,
            rank,
            first,
            last,
        )
    return without == 0


@numba.njit(inline="always")
def _decode_bytes(codes: Any, at: int, out: Any, start: int, quarter: int, meta: Any) -> None:
    """The elements out[start:] of a group from its 8-bit codes[at:]."""
    scale, zero, mask = _scale_of(meta), _zero_of(meta), np.uint32(0xFF)
    for e in range(0, quarter, LANES):
        for pair in range(2):
            words, to = load_words(codes, at + pair * quarter + e), start + 2 * pair * quarter + e
            c0, c1 = field(words, np.uint32(0), mask), field(words, np.uint32(8), mask)
            store_floats(out, to, scaled(c0, scale, zero))
            store_floats(out, to + quarter, scaled(c1, scale, zero))


@numba.njit(inline="always")
def _decode_fields(
    codes: Any, at: int, out: Any, start: int, bits: int, quarter: int, meta: Any
) -> None:
    """The elements out[start:] of a group from its 4- or 2-bit codes[at:]."""
    scale, zero, mask = _scale_of(meta), _zero_of(meta), np.uint32((1 << bits) - 1)
    for e in range(0, quarter, LANES):
        words, to = load_words(codes, at + e), start + e
        for k in range(4):
            code = field(words, np.uint32(k * bits), mask)
            store_floats(out, to + k * quarter, scaled(code, scale, zero))


@numba.njit
def _dequantize_whole(codes: Any, meta: Any, out: Any, bits: int, group_size: int) -> None:
    """Groups that are all there."""
    quarter, code_bytes = group_size // 4, group_size // 8 * bits
    halves = codes.view(np.uint16)
    for g in range(meta.size):
        at, start, found = g * (code_bytes // 2), g * group_size, np.uint32(meta[g])
        for i in range(start + _AHEAD * group_size, start + (_AHEAD + 1) * group_size, LANES):
            will_write(out, i)
        if bits == 8:
            _decode_bytes(halves, at, out, start, quarter, found)
        elif bits == 4:
            _decode_fields(halves, at, out, start, 4, quarter, found)
        else:
            _decode_fields(codes, g * code_bytes, out, start, 2, quarter, found)


@loop()
def _dequantize_groups(
    codes_at: int,
    meta_at: int,
    out_at: int,
    like: Any,
    numel: int,
    bits: int,
    group_size: int,
    first: int,
    last: int,
) -> None:
    """Groups first .. last of the tensors at these addresses."""
    code_bytes = group_size // 8 * bits
    codes = array_at(codes_at, last * code_bytes, np.uint8(0))
    meta = array_at(meta_at, last, np.int32(0))
    out = array_at(out_at, numel, like)
    whole = min(last, numel // group_size)
    if first < whole:
        _dequantize_whole(
            codes[first * code_bytes : whole * code_bytes],
            meta[first:whole],
            out[first * group_size : whole * group_size],
            bits,
            group_size,
        )
    if whole < last:
        padded = np.empty(group_size, out.dtype)
        _dequantize_whole(codes[whole * code_bytes :], meta[whole:], padded, bits, group_size)
        row = out[whole * group_size :]
        row[:] = padded[: row.size]


@loop(parallel=True)
def _dequantize_parallel(
    codes_at: int,
    meta_at: int,
    out_at: int,
    like: Any,
    numel: int,
    bits: int,
    group_size: int,
    groups: int,
) -> None:
    for chunk in numba.prange((groups + _CHUNK - 1) // _CHUNK):
        first = chunk * _CHUNK
        last = min(first + _CHUNK, groups)
        _dequantize_groups(codes_at, meta_at, out_at, like, numel, bits, group_size, first, last)


def _address(tensor: Tensor) -> int:
    address: int = tensor.data_ptr()
    if not address:
        raise ValueError(
            f"a tensor of {tensor.numel()} {tensor.dtype} must have memory of its own; received "
            "one whose storage was freed, or that torch made without any; pass its values"
        )
    return address


def quantize(
    x: Tensor, codes: Tensor, meta: Tensor, bits: int, group_size: int, noise: Sequence[int]
) -> bool:
    """Fill `codes` and `meta` from x, which has an element or more; whether each group had a scale.

    All three are contiguous.
    """
    x, groups = x.resolve_neg(), meta.numel()
    arguments = (
        _address(x),
        LIKE[x.dtype],
        x.numel(),
        _address(codes),
        _address(meta),
        bits,
        group_size,
        *noise,
    )
    if threads_for(groups // _CHUNK) == 1:
        return _quantize_groups(*arguments, 0, groups)
    return _quantize_parallel(*arguments, groups)


def dequantize(codes: Tensor, meta: Tensor, out: Tensor, bits: int, group_size: int) -> None:
    """Fill `out`, which has an element or more. All three are contiguous."""
    groups = meta.numel()
    arguments = (
        _address(codes),
        _address(meta),
        _address(out),
        LIKE[out.dtype],
        out.numel(),
        bits,
        group_size,
    )
    if threads_for(groups // _CHUNK) == 1:
        _dequantize_groups(*arguments, 0, groups)
    else:
        _dequantize_parallel(*arguments, groups)
