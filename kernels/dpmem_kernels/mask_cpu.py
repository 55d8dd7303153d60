"""The CPU backend of mask.py: loops compiled by numba, at memory speed."""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .cpu_loop import loop
from .cpu_threads import threads_for
from .mask import BLOCK_BOOLS, BLOCK_BYTES
from .numba_intrinsics import decode, typed_array

# Blocks per unit of parallel work.
_CHUNK = 64


@numba.njit(inline="always")
def _bit(element: Any) -> Any:
    """1 or 0: a bool's byte as it is, else whether a ReLU passes the gradient on."""
    return np.uint8(not decode(element) <= np.float32(0.0))


@loop()
def _pack_range(x: Any, bits: Any, first: int, last: int) -> None:
    """Blocks first .. last of x, whose elements are bytes 0 and 1 or stored floats."""
    for block in range(first, last):
        packed = bits[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        packed[:] = 0
        for k in range(8):
            start = block * BLOCK_BOOLS + k * BLOCK_BYTES
            shift = np.uint8(k)
            for byte in range(min(BLOCK_BYTES, x.size - start)):
                packed[byte] |= np.uint8(_bit(x[start + byte]) << shift)


@loop(parallel=True)
def _pack_parallel(x: Any, bits: Any) -> None:
    blocks = bits.size // BLOCK_BYTES
    for chunk in numba.prange((blocks + _CHUNK - 1) // _CHUNK):
        first = chunk * _CHUNK
        _pack_range(x, bits, first, min(first + _CHUNK, blocks))


@loop()
def _unpack_range(bits: Any, mask: Any, first: int, last: int) -> None:
    for block in range(first, last):
        packed = bits[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        for k in range(8):
            start = block * BLOCK_BOOLS + k * BLOCK_BYTES
            shift = np.uint8(k)
            for byte in range(min(BLOCK_BYTES, mask.size - start)):
                mask[start + byte] = np.uint8(packed[byte] >> shift) & np.uint8(1)


@loop(parallel=True)
def _unpack_parallel(bits: Any, mask: Any) -> None:
    blocks = bits.size // BLOCK_BYTES
    for chunk in numba.prange((blocks + _CHUNK - 1) // _CHUNK):
        first = chunk * _CHUNK
        _unpack_range(bits, mask, first, min(first + _CHUNK, blocks))


def _pack(x: Any, bits: Tensor) -> None:
    blocks = bits.numel() // BLOCK_BYTES
    if threads_for(blocks // _CHUNK) == 1:
        _pack_range(x, bits.numpy(), 0, blocks)
    else:
        _pack_parallel(x, bits.numpy())


def pack_mask_loop(mask: Tensor, bits: Tensor) -> None:
    """Fill `bits` from a mask of one element or more."""
    _pack(mask.view(-1).view(torch.uint8).numpy(), bits)


def pack_positive_loop(x: Tensor, bits: Tensor) -> None:
    """Fill `bits` from an x of one element or more."""
    _pack(typed_array(x), bits)


def unpack_mask_loop(bits: Tensor, mask: Tensor) -> None:
    """Fill a mask of one element or more."""
    blocks, out = bits.numel() // BLOCK_BYTES, mask.view(torch.uint8).numpy()
    if threads_for(blocks // _CHUNK) == 1:
        _unpack_range(bits.numpy(), out, 0, blocks)
    else:
        _unpack_parallel(bits.numpy(), out)
