"""The CPU backend of fp8.py: loops compiled by numba, at memory speed."""

from typing import Any

import numba
import numpy as np
from torch import Tensor

from .cpu_loop import loop
from .cpu_threads import threads_for
from .fp8 import INFINITY_BITS, NAN_SCALE, PAST_LARGEST, Fp8Format
from .numba_intrinsics import bits_to_float, decode, encode, float_to_bits, typed_array

# Groups per unit of parallel work.
_CHUNK = 256


@loop()
def _quantize_range(
    x: Any, codes: Any, scales: Any, group_size: int, layout: Any, first: int, last: int
) -> None:
    """Groups first .. last; fp8_triton's _encode states the arithmetic."""
    mantissa_bits, bias, top = np.uint32(layout[0]), np.uint32(layout[1]), layout[2]
    shift = np.uint32(np.uint32(23) - mantissa_bits)
    lowest = np.uint32(np.uint32(np.uint32(128) - bias) << np.uint32(23))
    offset = np.uint32(np.uint32(np.uint32(128) - bias) << mantissa_bits)
    raised = np.uint32(shift << np.uint32(23))
    for g in range(first, last):
        start, stop = g * group_size, min((g + 1) * group_size, x.size)
        largest = np.uint32(0)
        for i in range(start, stop):
            magnitude = np.uint32(float_to_bits(decode(x[i])) & np.uint32(0x7FFFFFFF))
            largest = max(largest, magnitude)
        if largest >= np.uint32(INFINITY_BITS):
            scales[g] = NAN_SCALE
            codes[start:stop] = 0
            continue
        exponent = max(((np.int64(largest) + PAST_LARGEST) >> 23) - top, 1)
        scales[g] = exponent
        inverse = bits_to_float(np.uint32((254 - exponent) << 23))
        for i in range(start, stop):
            bits = float_to_bits(decode(x[i]) * inverse)
            magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
            binade = max(np.uint32(bits & np.uint32(0x7F800000)), lowest)
            magic = np.uint32(binade + raised)
            total = bits_to_float(magnitude) + bits_to_float(magic)
            multiple = np.uint32(float_to_bits(total) - magic)
            code = np.uint32(np.uint32(multiple + (binade >> shift)) - offset)
            codes[i] = np.uint32(code | ((bits >> np.uint32(24)) & np.uint32(0x80)))


@loop(parallel=True)
def _quantize_parallel(x: Any, codes: Any, scales: Any, group_size: int, layout: Any) -> None:
    for chunk in numba.prange((scales.size + _CHUNK - 1) // _CHUNK):
        first = chunk * _CHUNK
        last = min(first + _CHUNK, scales.size)
        _quantize_range(x, codes, scales, group_size, layout, first, last)


@loop()
def _dequantize_range(
    codes: Any, scales: Any, out: Any, group_size: int, layout: Any, first: int, last: int
) -> None:
    """Groups first .. last; fp8_triton's _decode states the arithmetic."""
    mantissa_bits, bias = np.uint32(layout[0]), np.uint32(layout[1])
    shift = np.uint32(np.uint32(23) - mantissa_bits)
    lowest = np.uint32(np.uint32(np.uint32(127) - bias) << np.uint32(23))
    smallest_normal = bits_to_float(np.uint32(np.uint32(np.uint32(128) - bias) << np.uint32(23)))
    denormals = np.uint32(np.uint32(1) << mantissa_bits)
    for g in range(first, last):
        start, stop = g * group_size, min((g + 1) * group_size, out.size)
        scale = bits_to_float(np.uint32(np.uint32(scales[g]) << np.uint32(23)))
        if scales[g] == NAN_SCALE:
            scale = np.float32(np.nan)
        for i in range(start, stop):
            code = np.uint32(codes[i])
            magnitude = np.uint32(code & np.uint32(0x7F))
            value = bits_to_float(np.uint32(np.uint32(magnitude << shift) + lowest))
            if magnitude < denormals:
                value = np.float32(value + value) - smallest_normal
            sign = np.uint32(np.uint32(code & np.uint32(0x80)) << np.uint32(24))
            value = bits_to_float(np.uint32(float_to_bits(value) | sign))
            out[i] = encode(value * scale, out[i])


@loop(parallel=True)
def _dequantize_parallel(codes: Any, scales: Any, out: Any, group_size: int, layout: Any) -> None:
    for chunk in numba.prange((scales.size + _CHUNK - 1) // _CHUNK):
        first = chunk * _CHUNK
        last = min(first + _CHUNK, scales.size)
        _dequantize_range(codes, scales, out, group_size, layout, first, last)


def quantize_loop(
    x: Tensor, codes: Tensor, scales: Tensor, layout: Fp8Format, group_size: int
) -> None:
    """Fill `codes` and `scales` from x, which has an element or more."""
    groups = scales.numel()
    arguments = (typed_array(x), codes.view(-1).numpy(), scales.numpy(), group_size, layout[:])
    if threads_for(groups // _CHUNK) == 1:
        _quantize_range(*arguments, 0, groups)
    else:
        _quantize_parallel(*arguments)


def dequantize_loop(
    codes: Tensor, scales: Tensor, out: Tensor, layout: Fp8Format, group_size: int
) -> None:
    """Fill `out`, which has an element or more."""
    groups = scales.numel()
    arguments = (codes.view(-1).numpy(), scales.numpy(), typed_array(out), group_size, layout[:])
    if threads_for(groups // _CHUNK) == 1:
        _dequantize_range(*arguments, 0, groups)
    else:
        _dequantize_parallel(*arguments)
