"""What the CPU loops need and numba cannot spell: fused multiply-add, bit casts, half precision.

NumPy has no bfloat16 and numba no float16, so arrays arrive as views: float32 as it is, bfloat16
as uint16 and float16 as int16. The dtype of a view then selects how its elements are converted.
"""

from collections.abc import Callable
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

VIEWS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def typed_array(x: Tensor) -> Any:
    """A contiguous fp32, bf16 or fp16 tensor as a flat array that shares its memory."""
    return x.detach().view(-1).view(VIEWS.get(x.dtype, x.dtype)).numpy()


# An element by which a compiled loop knows the type of an array that it is given the address of.
LIKE = {
    dtype: torch.empty(1, dtype=VIEWS.get(dtype, dtype)).numpy()[0]
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


@intrinsic
def _pointer(_context: Any, address: Any, like: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.intp, like), generate


@numba.njit(inline="always")
def array_at(address: Any, size: Any, like: Any) -> Any:
    """The array of `size` elements like this one at an address.

    A loop that takes addresses is called in half the time: an array per tensor is made of several
    objects, and each takes the longer where a matrix product has just emptied the caches.
    """
    return numba.carray(_pointer(address, like), size)


_INT16, _INT32, _FLOAT = ir.IntType(16), ir.IntType(32), ir.FloatType()


@intrinsic
def fma(_context: Any, x: Any, y: Any, z: Any) -> Any:
    """x·y + z in float32 with one rounding."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


def _conversion(source: Any, target: Any, emit: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic from a `source` scalar to a `target` scalar, as `emit` writes it in LLVM.

    In numba's own arithmetic two uint32 make a 64-bit sum, which halves the vector lanes.
    """

    @intrinsic
    def convert(_context: Any, value: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return emit(builder, arguments[0])

        return target(source), generate

    return convert


def _emit_bfloat_to_float(builder: Any, value: Any) -> Any:
    high = builder.shl(builder.zext(value, _INT32), _INT32(16))
    return builder.bitcast(high, _FLOAT)


def _upper_half_rounded(builder: Any, value: Any) -> Any:
    bits = builder.bitcast(value, _INT32)
    tie = builder.and_(builder.lshr(bits, _INT32(16)), _INT32(1))
    return builder.add(builder.add(bits, _INT32(0x7FFF)), tie)


def _upper_half(builder: Any, bits: Any) -> Any:
    return builder.trunc(builder.lshr(bits, _INT32(16)), _INT16)


def _emit_float_to_bfloat(builder: Any, value: Any) -> Any:
    # A carry must not turn a NaN into something else.
    is_nan = builder.fcmp_unordered("uno", value, value)
    rounded = _upper_half_rounded(builder, value)
    return _upper_half(builder, builder.select(is_nan, _INT32(0x7FC00000), rounded))


def _emit_computed_to_bfloat(builder: Any, value: Any) -> Any:
    return _upper_half(builder, _upper_half_rounded(builder, value))


def _emit_half_to_float(builder: Any, value: Any) -> Any:
    return builder.fpext(builder.bitcast(value, ir.HalfType()), _FLOAT)


def _emit_float_to_half(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.fptrunc(value, ir.HalfType()), _INT16)


bits_to_float = _conversion(types.uint32, types.float32, lambda b, x: b.bitcast(x, _FLOAT))
float_to_bits = _conversion(types.float32, types.uint32, lambda b, x: b.bitcast(x, _INT32))
_bfloat_to_float = _conversion(types.uint16, types.float32, _emit_bfloat_to_float)
_float_to_bfloat = _conversion(types.float32, types.uint16, _emit_float_to_bfloat)
_computed_to_bfloat = _conversion(types.float32, types.uint16, _emit_computed_to_bfloat)
_half_to_float = _conversion(types.int16, types.float32, _emit_half_to_float)
_float_to_half = _conversion(types.float32, types.int16, _emit_float_to_half)


def decode(stored: Any) -> Any:
    """A stored element as float32; the byte of a bool, 0 or 1, as it is."""


# numba wants the annotations of a choice and of what it returns to agree.
@overload(decode, inline="always")
def _decode_overload(stored: Any) -> Any:
    if stored in (types.float32, types.uint8):

        def choice(stored: Any) -> Any:
            return stored
    elif stored == types.uint16:

        def choice(stored: Any) -> Any:
            return _bfloat_to_float(stored)
    else:

        def choice(stored: Any) -> Any:
            return _half_to_float(stored)

    return choice


def encode(value: Any, like: Any) -> Any:
    """A float32 as it is stored beside `like`: rounded to nearest even, NaN stays NaN."""


@overload(encode, inline="always")
def _encode_overload(value: Any, like: Any) -> Any:
    if like == types.float32:

        def choice(value: Any, like: Any) -> Any:
            return value
    elif like == types.uint16:

        def choice(value: Any, like: Any) -> Any:
            return _float_to_bfloat(value)
    else:

        def choice(value: Any, like: Any) -> Any:
            return _float_to_half(value)

    return choice


def encode_computed(value: Any, source: Any, like: Any) -> Any:
    """encode, for a value computed from nothing but elements stored like `source`, elements stored
    like `like`, and numbers whose NaN is the canonical one."""


@overload(encode_computed, inline="always")
def _encode_computed_overload(value: Any, source: Any, like: Any) -> Any:
    if source == like == types.uint16:
        # The NaN of a result is an operand's or the canonical one, so its lower half is 0 and
        # nothing carries: the comparison, a quarter of the loop's instructions, is not needed.
        def choice(value: Any, source: Any, like: Any) -> Any:
            return _computed_to_bfloat(value)
    else:

        def choice(value: Any, source: Any, like: Any) -> Any:
            return encode(value, like)

    return choice
