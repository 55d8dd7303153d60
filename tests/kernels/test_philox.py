"""Philox-4x32-10 against Random123's published vectors (its tests/kat_vectors file)."""

from typing import Any

import numba
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmem_kernels.numba_lanes import LANES, draw, store_words
from dpmem_kernels.philox import philox_ref
from dpmem_kernels.philox_triton import philox

VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
vectors = pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
Words = tuple[int, ...]


@triton.jit
def _philox_kernel(words_ptr, out_ptr):
    row = tl.arange(0, 1)
    c0 = tl.load(words_ptr + row).to(tl.uint32)
    c1 = tl.load(words_ptr + row + 1).to(tl.uint32)
    c2 = tl.load(words_ptr + row + 2).to(tl.uint32)
    c3 = tl.load(words_ptr + row + 3).to(tl.uint32)
    k0 = tl.load(words_ptr + row + 4).to(tl.uint32)
    k1 = tl.load(words_ptr + row + 5).to(tl.uint32)
    r0, r1, r2, r3 = philox(c0, c1, c2, c3, k0, k1, False)
    tl.store(out_ptr + row, r0.to(tl.int64))
    tl.store(out_ptr + row + 1, r1.to(tl.int64))
    tl.store(out_ptr + row + 2, r2.to(tl.int64))
    tl.store(out_ptr + row + 3, r3.to(tl.int64))


def _reference(counter: Words, key: Words) -> list[int]:
    first = torch.tensor([counter[0]])
    return [int(word) for word in philox_ref((first, *counter[1:]), key)]


@vectors
def test_reference_gives_the_published_vectors(counter: Words, key: Words, expected: Words) -> None:
    assert _reference(counter, key) == list(expected)


@vectors
def test_triton_gives_the_published_vectors(counter: Words, key: Words, expected: Words) -> None:
    out = torch.empty(4, dtype=torch.int64)
    _philox_kernel[(1,)](torch.tensor(counter + key), out)
    assert out.tolist() == list(expected)


@numba.njit
def _drawn(counter: Any, noise: Any, halves: Any) -> None:
    blocks = draw(counter, noise)
    for k in range(4):
        store_words(halves, k * LANES, blocks[k])


@vectors
def test_numba_gives_the_published_vectors(counter: Words, key: Words, expected: Words) -> None:
    halves = np.empty(4 * LANES, np.uint16)
    _drawn(np.uint32(counter[0]), tuple(np.array(key + counter[1:], np.uint32)), halves)
    # Word k of eight blocks, of which the first is the published one.
    words = halves.view("<u4").reshape(4, LANES // 2)
    assert words[:, 0].tolist() == list(expected)
    following = _reference((counter[0] + 7 & 0xFFFFFFFF, *counter[1:]), key)
    assert words[:, 7].tolist() == following


def test_counters_are_a_tensor_of_any_shape() -> None:
    counters: Tensor = torch.arange(6).view(2, 3)
    blocks = philox_ref((counters, 1, 2, 3), (4, 5))
    for index in ((0, 0), (0, 2), (1, 1)):
        expected = _reference((int(counters[index]), 1, 2, 3), (4, 5))
        assert [int(block[index]) for block in blocks] == expected
