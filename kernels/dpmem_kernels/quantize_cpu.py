"""The CPU backend of compression (quantize.py, mask.py): loops compiled by numba, at memory speed.

Those two state the formats and import this file at the first call that needs it, so that
importing dpmem_kernels costs no compiler.

A group is first decoded into one float32 row, and every later pass runs over rows that stay in
the cache, in straight loops that LLVM turns into vector code.
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

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


@numba.njit(cache=True)
def _quantize_groups(
    x: Any, codes: Any, meta: Any, bits: int, group_size: int, noise: Any, first: int, last: int
) -> None:
    """Groups first .. last. `codes` in words of the format: 16 bits wide for 2 bits, else 32."""
    words, quarter = group_size // 8, group_size // 4
    words_out = 2 * words if bits == 8 else words
    step = np.uint32(bits)
    per_level = np.float32(1.0 / ((1 << bits) - 1))
    low_mask, high_shift = np.uint32(0xFFFF), np.uint32(16)
    base, floor_shift = np.uint32(0x43000000), np.uint32(16)
    if bits == 8:
        low_mask, high_shift = np.uint32(0x7FFF), np.uint32(17)
        base, floor_shift = np.uint32(0x43800000), np.uint32(15)
    values = np.empty(group_size, np.float32)
    patterns = values.view(np.int32)
    random = np.empty((4, words), np.uint32)
    fields = np.empty((4, words), np.uint32)
    for g in range(first, last):
        start = g * group_size
        present = min(group_size, x.size - start)
        for i in range(present):
            values[i] = decode(x[start + i])
        for i in range(present, group_size):
            values[i] = values[present - 1]

        # Floats in the order of integers, NaNs at both ends: unlike a floating-point minimum this
        # becomes a vector instruction and cannot drop a NaN.
        low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for i in range(group_size):
            sign = np.int32(patterns[i] >> np.int32(31))
            key = np.int32(patterns[i] ^ np.int32(sign & np.int32(0x7FFFFFFF)))
            low, high = min(low, key), max(high, key)
        low_bits = _from_key(low)
        high_bits = _from_key(high)
        finite = _is_finite(low_bits) and _is_finite(high_bits)
        if low_bits == np.uint32(0x80000000):
            low_bits = np.uint32(0)
        if low_bits > np.uint32(0x80000000):
            low_bits = np.uint32(low_bits + np.uint32(0xFFFF))
        zero_bits = np.uint32(low_bits & np.uint32(0xFFFF0000))
        zero = bits_to_float(zero_bits)
        raw_scale = np.float32(np.float32(bits_to_float(high_bits) - zero) * per_level)
        raised = np.uint32((float_to_bits(raw_scale) & np.uint32(0x7FFFFFFF)) + np.uint32(ROUND_UP))
        if not finite or raised >= np.uint32(SCALE_LIMIT):
            meta[g] = NAN_META
            codes[g * words_out : (g + 1) * words_out] = 0
            continue
        scale_bits = max(np.uint32(raised & np.uint32(0xFFFF0000)), np.uint32(SMALLEST_SCALE))
        inverse = np.float32(np.float32(1.0) / bits_to_float(scale_bits))
        meta[g] = np.int32(scale_bits | (zero_bits >> np.uint32(16)))

        for j in range(words):
            counter = np.uint32(g * words + j)
            random[0, j], random[1, j], random[2, j], random[3, j] = philox(
                counter, noise[2], noise[3], noise[4], noise[0], noise[1]
            )
        for k in range(4):
            for j in range(words):
                a = np.uint32((random[k, j] & low_mask) | base)
                b = np.uint32((random[k, j] >> high_shift) | base)
                x_a = np.float32(values[k * quarter + 2 * j] - zero)
                x_b = np.float32(values[k * quarter + 2 * j + 1] - zero)
                a = float_to_bits(fma(x_a, inverse, bits_to_float(a))) >> floor_shift
                b = float_to_bits(fma(x_b, inverse, bits_to_float(b))) >> floor_shift
                # The exponent's bits above the code go: 0x43 or 0x87 in the next byte.
                fields[k, j] = np.uint32((a & np.uint32(0xFF)) | ((b & np.uint32(0xFF)) << 16))

        out = g * words_out
        if bits == 8:
            for j in range(words):
                codes[out + j] = np.uint32(fields[0, j] | (fields[1, j] << np.uint32(8)))
                codes[out + words + j] = np.uint32(fields[2, j] | (fields[3, j] << np.uint32(8)))
        else:
            for j in range(words):
                word = np.uint32(
                    fields[0, j]
                    | (fields[1, j] << step)
                    | (fields[2, j] << np.uint32(2 * step))
                    | (fields[3, j] << np.uint32(3 * step))
                )
                if bits == 2:
                    word = np.uint32(word | (word >> np.uint32(8)))
                codes[out + j] = word


@numba.njit(cache=True, parallel=True)
def _quantize_parallel(
    x: Any, codes: Any, meta: Any, bits: int, group_size: int, noise: Any
) -> None:
    for chunk in numba.prange((meta.size + _CHUNK - 1) // _CHUNK):
        first = chunk * _CHUNK
        last = min(first + _CHUNK, meta.size)
        _quantize_groups(x, codes, meta, bits, group_size, noise, first, last)


@numba.njit(cache=True)
def _dequantize_groups(
    codes: Any, meta: Any, out: Any, bits: int, group_size: int, first: int, last: int
) -> None:
    """Groups first .. last."""
    words, quarter = group_size // 8, group_size // 4
    words_in = 2 * words if bits == 8 else words
    mask = np.uint32((1 << bits) - 1)
    half = np.uint32(8 if bits == 2 else 16)
    values = np.empty(group_size, np.float32)
    for g in range(first, last):
        start = g * group_size
        present = min(group_size, out.size - start)
        scale = bits_to_float(np.uint32(meta[g]) & np.uint32(0xFFFF0000))
        zero = bits_to_float(np.uint32(np.uint32(meta[g]) << np.uint32(16)))
        for k in range(4):
            source = g * words_in
            shift = np.uint32(bits * k)
            if bits == 8:
                source += words * (k // 2)
                shift = np.uint32(8 * (k % 2))
            for j in range(words):
                word = np.uint32(np.uint32(codes[source + j]) >> shift)
                a = np.float32(np.int32(word & mask))
                b = np.float32(np.int32((word >> half) & mask))
                values[k * quarter + 2 * j] = fma(a, scale, zero)
                values[k * quarter + 2 * j + 1] = fma(b, scale, zero)
        for i in range(present):
            out[start + i] = encode(values[i], out[start + i])


@numba.njit(cache=True, parallel=True)
def _dequantize_parallel(codes: Any, meta: Any, out: Any, bits: int, group_size: int) -> None:
    for chunk in numba.prange((meta.size + _CHUNK - 1) // _CHUNK):
        first = chunk * _CHUNK
        last = min(first + _CHUNK, meta.size)
        _dequantize_groups(codes, meta, out, bits, group_size, first, last)


def _threads(groups: int) -> int:
    """How many threads to use: torch's number, and one where there is no work for more.

    One thread takes a variant compiled without numba's threading layer, which a forked child
    (a DataLoader worker) must not enter.
    """
    threads = torch.get_num_threads()
    if threads == 1 or groups <= _CHUNK:
        return 1
    threads = min(threads, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    return threads


def quantize(
    x: Tensor, codes: Tensor, meta: Tensor, bits: int, group_size: int, noise: Sequence[int]
) -> None:
    """Fill `codes` and `meta` from x, which has an element or more."""
    words = codes.numpy().view(np.uint16 if bits == 2 else np.uint32)
    arguments = (typed_array(x), words, meta.numpy(), bits, group_size, np.array(noise, np.uint32))
    if _threads(meta.numel()) == 1:
        _quantize_groups(*arguments, 0, meta.numel())
    else:
        _quantize_parallel(*arguments)


def dequantize(codes: Tensor, meta: Tensor, out: Tensor, bits: int, group_size: int) -> None:
    """Fill `out`, which has an element or more."""
    words = codes.numpy().view(np.uint16 if bits == 2 else np.uint32)
    arguments = (words, meta.numpy(), typed_array(out), bits, group_size)
    if _threads(meta.numel()) == 1:
        _dequantize_groups(*arguments, 0, meta.numel())
    else:
        _dequantize_parallel(*arguments)


@numba.njit(cache=True)
def _pack_blocks(mask: Any, bits: Any) -> None:
    for start in range(0, bits.size, 128):
        for byte in range(128):
            packed = np.uint8(0)
            for k in range(8):
                element = start * 8 + k * 128 + byte
                if element < mask.size:
                    packed = np.uint8(packed | np.uint8(mask[element] << np.uint8(k)))
            bits[start + byte] = packed


@numba.njit(cache=True)
def _unpack_blocks(bits: Any, mask: Any) -> None:
    for start in range(0, bits.size, 128):
        for k in range(8):
            element = start * 8 + k * 128
            for byte in range(min(128, mask.size - element)):
                mask[element + byte] = (bits[start + byte] >> np.uint8(k)) & np.uint8(1)


def pack_mask(mask: Tensor, bits: Tensor) -> None:
    """Fill `bits` from the mask."""
    _pack_blocks(mask.view(-1).view(torch.uint8).numpy(), bits.numpy())


def unpack_mask(bits: Tensor, mask: Tensor) -> None:
    """Fill the mask from `bits`."""
    _unpack_blocks(bits.numpy(), mask.view(torch.uint8).numpy())
