"""The walk of tensor_table.py on the CPU: loops compiled by numba, at memory speed.

bfloat16 is handled as uint16 and float16 as int16 (numba_intrinsics.py). Squares are summed in
float64, where the square of an fp32 number is exact and no sum of them overflows: a chunk's sum is
finite exactly if all of its elements are.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from .cpu_loop import loop
from .cpu_threads import threads_for
from .numba_intrinsics import decode, encode, encode_computed, fma, typed_array
from .tensor_table import DTYPES, Walk


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    """An address as the void pointer that numba.carray takes."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def _magnitude(_context: Any, stored: Any) -> Any:
    """A stored element's bits without the sign, which order as magnitudes do: inf, then NaN.

    In the element's own width, so that the loop stays as wide as memory is.
    """
    result = types.uint32 if stored == types.float32 else types.uint16

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = ir.IntType(result.bitwidth)
        stored_bits = builder.bitcast(arguments[0], bits)
        return builder.and_(stored_bits, bits(2 ** (result.bitwidth - 1) - 1))

    return result(stored), generate


@intrinsic
def _larger(_context: Any, x: Any, y: Any) -> Any:
    """The maximum of two unsigned integers of one type."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.select(builder.icmp_unsigned(">", *arguments), *arguments)

    return x(x, y), generate


# Reassociation lets LLVM sum in vector lanes; the lanes are the same on every run. Contraction
# changes no result: in float64 the square of a float32 is exact.
_SUMMING = {"reassoc", "contract"}


# Inlined where `sums` and `accumulate` are constants.
@numba.njit(fastmath=_SUMMING, forceinline=True)
def _move(source: Any, destination: Any, scale: Any, accumulate: bool, sums: bool) -> Any:
    """Move a chunk; the sum of squares, or without `sums` 0, and inf if a value is not finite."""
    total = 0.0
    largest = _magnitude(encode(np.float32(0.0), destination[0]))
    for i in range(source.size):
        value = decode(source[i])
        if accumulate:
            value = fma(value, scale, decode(destination[i]))
        else:
            value = value * scale
        stored = encode_computed(value, source[i], destination[i])
        destination[i] = stored
        if sums:
            written = np.float64(decode(stored))
            total += written * written
        else:
            largest = _larger(largest, _magnitude(stored))
    if largest >= _magnitude(encode(np.float32(np.inf), destination[0])):
        total = np.inf
    return total


@numba.njit(fastmath=_SUMMING, forceinline=True)
def _move_in_place(array: Any, scale: Any, sums: bool) -> Any:
    """_move of an array to itself; of two that coincide LLVM cannot tell, and makes no vectors."""
    total = 0.0
    largest = _magnitude(encode(np.float32(0.0), array[0]))
    for i in range(array.size):
        before = array[i]
        stored = encode_computed(decode(before) * scale, before, before)
        array[i] = stored
        if sums:
            written = np.float64(decode(stored))
            total += written * written
        else:
            largest = _larger(largest, _magnitude(stored))
    if largest >= _magnitude(encode(np.float32(np.inf), array[0])):
        total = np.inf
    return total


@numba.njit(fastmath=_SUMMING, forceinline=True)
def _read(source: Any) -> Any:
    total = 0.0
    for i in range(source.size):
        value = np.float64(decode(source[i]))
        total += value * value
    return total


@numba.njit(fastmath=_SUMMING, forceinline=True)
def _read_in_streams(source: Any) -> Any:
    """_read in four streams: with one, too few loads are under way to keep memory busy.

    For fp32 alone: 16-bit elements keep the arithmetic busy.
    """
    length = source.size // 4
    total_0, total_1, total_2, total_3 = 0.0, 0.0, 0.0, 0.0
    for i in range(length):
        value_0 = np.float64(decode(source[i]))
        value_1 = np.float64(decode(source[length + i]))
        value_2 = np.float64(decode(source[2 * length + i]))
        value_3 = np.float64(decode(source[3 * length + i]))
        total_0 += value_0 * value_0
        total_1 += value_1 * value_1
        total_2 += value_2 * value_2
        total_3 += value_3 * value_3
    total = total_0 + total_1 + total_2 + total_3
    for i in range(4 * length, source.size):
        value = np.float64(decode(source[i]))
        total += value * value
    return total


# A call handles the chunks of one dtype, whose code it is given, and numba compiles what it is
# called with: `source_like` and `destination_like` are empty arrays whose dtypes select the loop.
@loop()
def _read_range(
    chunks: Any, code: int, sources: Any, source_like: Any, partials: Any, first: int, last: int
) -> None:
    for c in range(first, last):
        tensor, own, start, length = chunks[c, 0], chunks[c, 1], chunks[c, 2], chunks[c, 3]
        if own == code:
            address = sources[tensor] + start * source_like.itemsize
            source = numba.carray(_pointer(address), length, source_like.dtype)
            partials[c] = _read_in_streams(source) if code == 0 else _read(source)


@loop()
def _move_range(
    chunks: Any,
    code: int,
    sources: Any,
    destinations: Any,
    source_like: Any,
    destination_like: Any,
    scale: Any,
    accumulate: bool,
    sums: bool,
    in_place: bool,
    partials: Any,
    first: int,
    last: int,
) -> None:
    """With `in_place` the dtypes are one, and addresses may coincide."""
    for c in range(first, last):
        tensor, own, start, length = chunks[c, 0], chunks[c, 1], chunks[c, 2], chunks[c, 3]
        if own != code:
            continue
        source_address = sources[tensor] + start * source_like.itemsize
        address = destinations[tensor] + start * destination_like.itemsize
        source = numba.carray(_pointer(source_address), length, source_like.dtype)
        destination = numba.carray(_pointer(address), length, destination_like.dtype)
        if accumulate:
            partials[c] = _move(source, destination, scale, True, False)
        elif in_place and source_address == address:
            if sums:
                partials[c] = _move_in_place(destination, scale, True)
            else:
                partials[c] = _move_in_place(destination, scale, False)
        elif sums:
            partials[c] = _move(source, destination, scale, False, True)
        else:
            partials[c] = _move(source, destination, scale, False, False)


@loop(parallel=True)
def _read_parallel(chunks: Any, code: int, sources: Any, source_like: Any, partials: Any) -> None:
    for c in numba.prange(len(chunks)):
        _read_range(chunks, code, sources, source_like, partials, c, c + 1)


@loop(parallel=True)
def _move_parallel(
    chunks: Any,
    code: int,
    sources: Any,
    destinations: Any,
    source_like: Any,
    destination_like: Any,
    scale: Any,
    accumulate: bool,
    sums: bool,
    in_place: bool,
    partials: Any,
) -> None:
    for c in numba.prange(len(chunks)):
        _move_range(
            chunks,
            code,
            sources,
            destinations,
            source_like,
            destination_like,
            scale,
            accumulate,
            sums,
            in_place,
            partials,
            c,
            c + 1,
        )


_LIKE = {dtype: typed_array(torch.empty(0, dtype=dtype)) for dtype in DTYPES}


def run(walk: Walk) -> tuple[Tensor, Tensor]:
    """See Walk.run. Uses as many threads as torch does."""
    scale = walk.scale.item() if isinstance(walk.scale, Tensor) else walk.scale
    if walk.skip_if_one and scale == 1.0:
        return torch.zeros(()), torch.zeros(())
    # Any NaN is the canonical one: see encode_computed.
    factor = np.float32(1.0 if scale is None else np.nan if math.isnan(scale) else scale)
    chunks = walk.chunks.numpy()
    partials = np.empty(len(chunks))
    parallel = threads_for(len(chunks)) > 1
    for code in np.flatnonzero(np.bincount(chunks[:, 1])):
        own = DTYPES[code]
        source_dtype = own if walk.source_dtype is None else walk.source_dtype
        source_like = _LIKE[source_dtype]
        if walk.destinations is None:
            read = (chunks, code, walk.sources, source_like, partials)
            if parallel:
                _read_parallel(*read)
            else:
                _read_range(*read, 0, len(chunks))
            continue
        destination_dtype = own if walk.destination_dtype is None else walk.destination_dtype
        move = (
            chunks,
            code,
            walk.sources,
            walk.destinations,
            source_like,
            _LIKE[destination_dtype],
            factor,
            walk.accumulate,
            walk.sums,
            source_dtype == destination_dtype,
            partials,
        )
        if parallel:
            _move_parallel(*move)
        else:
            _move_range(*move, 0, len(chunks))
    total = float(partials.sum())
    return _scalar(total), _scalar(0.0 if math.isfinite(total) else 1.0)


def _scalar(value: float) -> Tensor:
    """torch.tensor(value, dtype=torch.float32), which takes twice the time."""
    return torch.from_numpy(np.array(value)).float()
