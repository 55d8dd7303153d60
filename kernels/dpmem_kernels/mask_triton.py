"""Masks on GPUs: the Triton kernels for the format in mask.py."""

# Arguments of Triton kernels have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mask import BLOCK_BOOLS, BLOCK_BYTES

_BOOLS = tl.constexpr(BLOCK_BOOLS)
_BYTES = tl.constexpr(BLOCK_BYTES)
# Blocks in a program: 128-bit loads and stores with 4 warps.
ROWS = 16
# Of floats: with 16 the loads in flight fill the registers, and fp32 spills on sm_80.
POSITIVE_ROWS = 8


@triton.jit(do_not_specialize=["n"])
def pack_mask_kernel(mask_ptr, bits_ptr, n, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """ROWS blocks a program. WIDE: the mask is 16-byte aligned and may be read in words."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    mask_ptr = mask_ptr.to(tl.pointer_type(tl.uint8)) + first * _BOOLS
    bits_ptr += first * _BYTES
    if WIDE and (first + ROWS) * _BOOLS <= n:
        word = tl.arange(0, _BYTES // 4)[None, :]
        source = mask_ptr.to(tl.pointer_type(tl.uint32)) + (row * (_BOOLS // 4) + word)
        packed_words = tl.load(source)
        for k in tl.static_range(1, 8):
            packed_words += tl.load(source + k * (_BYTES // 4)) << k
        target = bits_ptr.to(tl.pointer_type(tl.uint32))
        tl.store(target + (row * (_BYTES // 4) + word), packed_words)
    else:
        byte = tl.arange(0, _BYTES)[None, :]
        element = row * _BOOLS + byte
        left = n - first * _BOOLS
        packed = tl.zeros((ROWS, _BYTES), tl.uint8)
        for k in tl.static_range(8):
            inside = element + k * _BYTES < left
            packed += tl.load(mask_ptr + element + k * _BYTES, mask=inside, other=0) << k
        tl.store(bits_ptr + (row * _BYTES + byte), packed, mask=row * _BOOLS < left)


@triton.jit
def _positive(x):
    """1 where x > 0 or NaN, else 0, as bytes."""
    return (~(x.to(tl.float32) <= 0.0)).to(tl.uint8)


@triton.jit(do_not_specialize=["n"])
def pack_positive_kernel(x_ptr, bits_ptr, n, ROWS: tl.constexpr):
    """ROWS blocks a program."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    byte = tl.arange(0, _BYTES)[None, :]
    x_ptr += first * _BOOLS
    bits_ptr += first * _BYTES
    element = row * _BOOLS + byte
    packed = tl.zeros((ROWS, _BYTES), tl.uint8)
    if (first + ROWS) * _BOOLS <= n:
        for k in tl.static_range(8):
            packed |= _positive(tl.load(x_ptr + element + k * _BYTES)) << k
        tl.store(bits_ptr + (row * _BYTES + byte), packed)
    else:
        left = n - first * _BOOLS
        for k in tl.static_range(8):
            inside = element + k * _BYTES < left
            packed |= _positive(tl.load(x_ptr + element + k * _BYTES, mask=inside, other=0.0)) << k
        tl.store(bits_ptr + (row * _BYTES + byte), packed, mask=row * _BOOLS < left)


@triton.jit(do_not_specialize=["n"])
def unpack_mask_kernel(bits_ptr, mask_ptr, n, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """The inverse; the mask is 16-byte aligned. WIDE: so is bits."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    mask_ptr = mask_ptr.to(tl.pointer_type(tl.uint8)) + first * _BOOLS
    bits_ptr += first * _BYTES
    if WIDE and (first + ROWS) * _BOOLS <= n:
        word = tl.arange(0, _BYTES // 4)[None, :]
        source = bits_ptr.to(tl.pointer_type(tl.uint32))
        packed_words = tl.load(source + (row * (_BYTES // 4) + word))
        target = mask_ptr.to(tl.pointer_type(tl.uint32)) + (row * (_BOOLS // 4) + word)
        for k in tl.static_range(8):
            tl.store(target + k * (_BYTES // 4), (packed_words >> k) & 0x01010101)
    else:
        byte = tl.arange(0, _BYTES)[None, :]
        element = row * _BOOLS + byte
        left = n - first * _BOOLS
        packed = tl.load(bits_ptr + (row * _BYTES + byte), mask=row * _BOOLS < left, other=0)
        for k in tl.static_range(8):
            inside = element + k * _BYTES < left
            tl.store(mask_ptr + element + k * _BYTES, (packed >> k) & 1, mask=inside)


def launch_pack_mask(mask: Tensor, bits: Tensor, rows: int = ROWS) -> None:
    """Fill `bits` from a mask of one element or more; `rows` blocks a program."""
    grid = (triton.cdiv(bits.numel(), BLOCK_BYTES * rows),)
    with torch.cuda.device_of(mask):
        pack_mask_kernel[grid](
            mask.view(torch.uint8),
            bits,
            mask.numel(),
            rows,
            mask.data_ptr() % 16 == 0,
            enable_fp_fusion=False,
        )


def launch_pack_positive(x: Tensor, bits: Tensor, rows: int = POSITIVE_ROWS) -> None:
    """Fill `bits` from an x of one element or more; `rows` blocks a program."""
    grid = (triton.cdiv(bits.numel(), BLOCK_BYTES * rows),)
    with torch.cuda.device_of(x):
        pack_positive_kernel[grid](x, bits, x.numel(), rows, enable_fp_fusion=False)


def launch_unpack_mask(bits: Tensor, mask: Tensor, rows: int = ROWS) -> None:
    """Fill a mask of one element or more; `rows` blocks a program."""
    grid = (triton.cdiv(bits.numel(), BLOCK_BYTES * rows),)
    with torch.cuda.device_of(mask):
        unpack_mask_kernel[grid](
            bits,
            mask.view(torch.uint8),
            mask.numel(),
            rows,
            bits.data_ptr() % 16 == 0,
            enable_fp_fusion=False,
        )
