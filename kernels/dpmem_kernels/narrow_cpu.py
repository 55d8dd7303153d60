"""The CPU backend of narrow.py: loops compiled by numba, at memory speed."""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .cpu_loop import loop
from .cpu_threads import threads_for

# Elements per unit of parallel work.
_CHUNK = 1 << 16


@loop()
def _narrow_range(index: Any, codes: Any, low: int, span: int, first: int, last: int) -> Any:
    """Elements first .. last; how many lie outside [low, low + span)."""
    outside = np.int64(0)
    for i in range(first, last):
        # Below low the difference wraps around to a large unsigned number.
        code = np.uint64(np.int64(index[i]) - low)
        outside += np.int64(code >= np.uint64(span))
        codes[i] = code
    return outside


@loop(parallel=True)
def _narrow_parallel(index: Any, codes: Any, low: int, span: int) -> int:
    outside = 0
    for chunk in numba.prange((index.size + _CHUNK - 1) // _CHUNK):
        first = chunk * _CHUNK
        outside += _narrow_range(index, codes, low, span, first, min(first + _CHUNK, index.size))
    return outside


@loop()
def _widen_range(codes: Any, index: Any, low: int, first: int, last: int) -> None:
    for i in range(first, last):
        index[i] = np.int64(codes[i]) + low


@loop(parallel=True)
def _widen_parallel(codes: Any, index: Any, low: int) -> None:
    for chunk in numba.prange((index.size + _CHUNK - 1) // _CHUNK):
        first = chunk * _CHUNK
        _widen_range(codes, index, low, first, min(first + _CHUNK, index.size))


def _unsigned(codes: Tensor) -> Any:
    flat = codes.view(-1)
    return (flat if flat.dtype == torch.uint8 else flat.view(torch.uint16)).numpy()


def narrow_loop(index: Tensor, codes: Tensor, low: int, span: int) -> Tensor:
    """Fill `codes`; whether all of index, one element or more, lies in [low, low + span)."""
    arguments = (index.view(-1).numpy(), _unsigned(codes), low, span)
    if threads_for(index.numel() // _CHUNK) == 1:
        outside = _narrow_range(*arguments, 0, index.numel())
    else:
        outside = _narrow_parallel(*arguments)
    return torch.tensor(outside == 0)


def widen_loop(codes: Tensor, index: Tensor, low: int) -> None:
    """Fill `index`, which has one element or more."""
    arguments = (_unsigned(codes), index.view(-1).numpy(), low)
    if threads_for(index.numel() // _CHUNK) == 1:
        _widen_range(*arguments, 0, index.numel())
    else:
        _widen_parallel(*arguments)
