"""The walk of tensor_table.py on the CPU: loops compiled by numba, at memory speed.

bfloat16 is handled as uint16 and float16 as int16 (numba_intrinsics.py). Squares are summed in
float64, where the square of an fp32 number is exact and no sum of them overflows: a chunk's sum is
finite exactly if all of its elements are.
"""

import os
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from .numba_intrinsics import decode, encode
from .tensor_table import DTYPE_CODES, Walk

# A thread pool does not survive fork(), and a parallel loop in the child would kill it.
_threads_usable = True


def _forget_threads() -> None:
    global _threads_usable
    _threads_usable = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    """An address as the void pointer that numba.carray takes."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


# Reassociation lets LLVM sum in vector lanes; the lanes are the same on every run.
@numba.njit(fastmath={"reassoc"})
def _move(source: Any, destination: Any, scale: Any) -> Any:
    total = 0.0
    for i in range(source.size):
        stored = encode(decode(source[i]) * scale, destination[i])
        destination[i] = stored
        value = np.float64(decode(stored))
        total += value * value
    return total


@numba.njit(fastmath={"reassoc"})
def _move_in_place(values: Any, scale: Any) -> Any:
    """_move with one array, which LLVM vectorizes; two that overlap it would not."""
    total = 0.0
    for i in range(values.size):
        stored = encode(decode(values[i]) * scale, values[i])
        values[i] = stored
        value = np.float64(decode(stored))
        total += value * value
    return total


@numba.njit(fastmath={"reassoc"})
def _read(source: Any) -> Any:
    total = 0.0
    for i in range(source.size):
        value = np.float64(decode(source[i]))
        total += value * value
    return total


@numba.njit
def _read_chunk(source: int, code: int, length: int) -> float:
    pointer = _pointer(source)
    if code == 0:
        return _read(numba.carray(pointer, length, np.float32))
    if code == 1:
        return _read(numba.carray(pointer, length, np.uint16))
    return _read(numba.carray(pointer, length, np.int16))


@numba.njit
def _rescale_chunk(source: int, code: int, length: int, scale: Any) -> float:
    pointer = _pointer(source)
    if code == 0:
        return _move_in_place(numba.carray(pointer, length, np.float32), scale)
    if code == 1:
        return _move_in_place(numba.carray(pointer, length, np.uint16), scale)
    return _move_in_place(numba.carray(pointer, length, np.int16), scale)


@numba.njit
def _move_from(source: Any, destination: int, code: int, scale: Any) -> float:
    pointer = _pointer(destination)
    if code == 0:
        return _move(source, numba.carray(pointer, source.size, np.float32), scale)
    if code == 1:
        return _move(source, numba.carray(pointer, source.size, np.uint16), scale)
    return _move(source, numba.carray(pointer, source.size, np.int16), scale)


@numba.njit
def _move_chunk(
    source: int, source_code: int, destination: int, code: int, length: int, scale: Any
) -> float:
    pointer = _pointer(source)
    if source_code == 0:
        return _move_from(numba.carray(pointer, length, np.float32), destination, code, scale)
    if source_code == 1:
        return _move_from(numba.carray(pointer, length, np.uint16), destination, code, scale)
    return _move_from(numba.carray(pointer, length, np.int16), destination, code, scale)


def _walk(
    chunks: Any,
    sources: Any,
    destinations: Any,
    source_code: int,
    destination_code: int,
    scale: Any,
    partials: Any,
) -> None:
    """A code of -1 is the tensor's own; an empty `destinations` means that nothing is written."""
    item_bytes = (4, 2, 2)
    for c in numba.prange(len(chunks)):
        tensor, own, start, length = chunks[c, 0], chunks[c, 1], chunks[c, 2], chunks[c, 3]
        read = own if source_code < 0 else source_code
        source = sources[tensor] + start * item_bytes[read]
        if len(destinations) == 0:
            partials[c] = _read_chunk(source, read, length)
        else:
            written = own if destination_code < 0 else destination_code
            destination = destinations[tensor] + start * item_bytes[written]
            if source == destination and read == written:
                partials[c] = _rescale_chunk(source, read, length, scale)
            else:
                partials[c] = _move_chunk(source, read, destination, written, length, scale)


_walk_serial = numba.njit(cache=True)(_walk)
_walk_parallel = numba.njit(cache=True, parallel=True)(_walk)


def run(walk: Walk, chunks: Tensor, skip_if_one: bool) -> tuple[Tensor, Tensor]:
    """See Walk.run. Uses as many threads as torch does."""
    scale = walk.scale.item() if isinstance(walk.scale, Tensor) else walk.scale
    zero = torch.zeros((), dtype=torch.float32)
    if skip_if_one and scale == 1.0:
        return zero, zero.clone()
    partials = np.empty(len(chunks))
    threads = torch.get_num_threads() if _threads_usable else 1
    if threads > 1:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    (_walk_parallel if threads > 1 else _walk_serial)(
        chunks.numpy(),
        np.array(walk.sources, dtype=np.int64),
        np.array(walk.destinations or [], dtype=np.int64),
        -1 if walk.source_dtype is None else DTYPE_CODES[walk.source_dtype],
        -1 if walk.destination_dtype is None else DTYPE_CODES[walk.destination_dtype],
        np.float32(1.0 if scale is None else scale),
        partials,
    )
    total = partials.sum()
    found_inf = torch.tensor(float(not np.isfinite(total)), dtype=torch.float32)
    return torch.tensor(total, dtype=torch.float64).float(), found_inf
