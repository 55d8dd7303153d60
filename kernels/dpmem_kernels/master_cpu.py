"""Splitting and joining fp32 master weights on the CPU: loops compiled by numba.

The arithmetic of master.py in 32-bit integers, written in LLVM: numba's own would be in 64 bits,
with half the vector lanes.
"""

from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from .cpu_loop import loop
from .cpu_threads import threads_for

_INT16, _INT32, _FLOAT = ir.IntType(16), ir.IntType(32), ir.FloatType()


@intrinsic
def _weight(_context: Any, value: Any) -> Any:
    """The bf16 pattern nearest to a float32."""

    def generate(_context: Any, b: Any, _signature: Any, arguments: Any) -> Any:
        bits = b.bitcast(arguments[0], _INT32)
        top = b.lshr(bits, _INT32(16))
        away = b.and_(b.lshr(bits, _INT32(15)), _INT32(1))
        magnitude = b.and_(top, _INT32(0x7FFF))
        sign = b.and_(top, _INT32(0x8000))
        at_inf = b.select(b.icmp_unsigned("!=", away, _INT32(0)), sign, top)
        at_inf_or_nan = b.select(b.icmp_unsigned("==", magnitude, _INT32(0x7F80)), at_inf, top)
        finite = b.icmp_unsigned("<", magnitude, _INT32(0x7F80))
        return b.trunc(b.select(finite, b.add(top, away), at_inf_or_nan), _INT16)

    return types.int16(types.float32), generate


@intrinsic
def _remainder(_context: Any, value: Any) -> Any:
    def generate(_context: Any, b: Any, _signature: Any, arguments: Any) -> Any:
        return b.trunc(b.bitcast(arguments[0], _INT32), _INT16)

    return types.int16(types.float32), generate


@intrinsic
def _joined(_context: Any, weight: Any, remainder: Any) -> Any:
    """The float32 of which these are the weight's pattern and the remainder."""

    def generate(_context: Any, b: Any, _signature: Any, arguments: Any) -> Any:
        top, low = (b.zext(argument, _INT32) for argument in arguments)
        away = b.lshr(low, _INT32(15))
        magnitude = b.and_(top, _INT32(0x7FFF))
        displaced = b.select(
            b.icmp_unsigned("!=", away, _INT32(0)), b.or_(top, _INT32(0x7F80)), top
        )
        unrounded = b.select(
            b.icmp_unsigned("<=", magnitude, _INT32(0x7F80)), b.sub(top, away), top
        )
        zero = b.icmp_unsigned("==", magnitude, _INT32(0))
        top = b.select(zero, displaced, unrounded)
        return b.bitcast(b.or_(b.shl(top, _INT32(16)), low), _FLOAT)

    return types.float32(types.int16, types.int16), generate


# Elements per unit of parallel work.
_CHUNK = 1 << 16


@loop()
def _split(master: Any, weight: Any, remainder: Any) -> None:
    for i in range(master.size):
        weight[i] = _weight(master[i])
        remainder[i] = _remainder(master[i])


@loop(parallel=True)
def _split_parallel(master: Any, weight: Any, remainder: Any) -> None:
    for chunk in numba.prange((master.size + _CHUNK - 1) // _CHUNK):
        first, last = chunk * _CHUNK, (chunk + 1) * _CHUNK
        _split(master[first:last], weight[first:last], remainder[first:last])


@loop()
def _join(weight: Any, remainder: Any, master: Any) -> None:
    for i in range(master.size):
        master[i] = _joined(weight[i], remainder[i])


@loop(parallel=True)
def _join_parallel(weight: Any, remainder: Any, master: Any) -> None:
    for chunk in numba.prange((master.size + _CHUNK - 1) // _CHUNK):
        first, last = chunk * _CHUNK, (chunk + 1) * _CHUNK
        _join(weight[first:last], remainder[first:last], master[first:last])


def split(master: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Flat fp32 [n] -> bf16 [n] and int16 [n]."""
    loop = _split_parallel if threads_for(master.numel() // _CHUNK) > 1 else _split
    loop(master.numpy(), weight.view(torch.int16).numpy(), remainder.numpy())


def join(weight: Tensor, remainder: Tensor, master: Tensor) -> None:
    """Flat bf16 [n] and int16 [n] -> fp32 [n]."""
    loop = _join_parallel if threads_for(master.numel() // _CHUNK) > 1 else _join
    loop(weight.view(torch.int16).numpy(), remainder.numpy(), master.numpy())
