"""Splitting and joining fp32 master weights in Triton: the integer arithmetic of master.py."""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _split_word(bits):
    top = (bits >> 16) & 0xFFFF
    low = bits & 0xFFFF
    magnitude = top & 0x7FFF
    away = low >> 15
    at_inf = tl.where(away != 0, top & 0x8000, top)
    at_inf_or_nan = tl.where(magnitude == 0x7F80, at_inf, top)
    weight = tl.where(magnitude < 0x7F80, top + away, at_inf_or_nan)
    return weight.to(tl.int16), low.to(tl.int16)


@triton.jit
def _join_word(weight, remainder):
    top = weight.to(tl.int32) & 0xFFFF
    low = remainder.to(tl.int32) & 0xFFFF
    magnitude = top & 0x7FFF
    away = low >> 15
    at_zero = tl.where(away != 0, top | 0x7F80, top)
    unrounded = tl.where(magnitude <= 0x7F80, top - away, top)
    return (tl.where(magnitude == 0, at_zero, unrounded) << 16) | low


# Two paths, so that elements at the end of n, whatever it is divisible by, cost the others nothing.
@triton.jit(do_not_specialize=["n"])
def split_kernel(master_ptr, weight_ptr, remainder_ptr, n, BLOCK: tl.constexpr):
    """Program p splits elements [p * BLOCK, (p + 1) * BLOCK); all as integers of their size."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        weight, remainder = _split_word(tl.load(master_ptr + start + offsets))
        tl.store(weight_ptr + start + offsets, weight)
        tl.store(remainder_ptr + start + offsets, remainder)
    else:
        mask = offsets < n - start
        weight, remainder = _split_word(tl.load(master_ptr + start + offsets, mask=mask, other=0))
        tl.store(weight_ptr + start + offsets, weight, mask=mask)
        tl.store(remainder_ptr + start + offsets, remainder, mask=mask)


@triton.jit(do_not_specialize=["n"])
def join_kernel(weight_ptr, remainder_ptr, master_ptr, n, BLOCK: tl.constexpr):
    """Program p joins elements [p * BLOCK, (p + 1) * BLOCK); all as integers of their size."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        weight = tl.load(weight_ptr + start + offsets)
        remainder = tl.load(remainder_ptr + start + offsets)
        tl.store(master_ptr + start + offsets, _join_word(weight, remainder))
    else:
        mask = offsets < n - start
        weight = tl.load(weight_ptr + start + offsets, mask=mask, other=0)
        remainder = tl.load(remainder_ptr + start + offsets, mask=mask, other=0)
        tl.store(master_ptr + start + offsets, _join_word(weight, remainder), mask=mask)


def split(master: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Flat fp32 [n] -> bf16 [n] and int16 [n]."""
    n = master.numel()
    if n == 0:
        return
    words, tops = master.view(torch.int32), weight.view(torch.int16)
    with torch.cuda.device_of(master):
        split_kernel[(triton.cdiv(n, BLOCK),)](
            words, tops, remainder, n, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
        )


def join(weight: Tensor, remainder: Tensor, master: Tensor) -> None:
    """Flat bf16 [n] and int16 [n] -> fp32 [n]."""
    n = master.numel()
    if n == 0:
        return
    tops, words = weight.view(torch.int16), master.view(torch.int32)
    with torch.cuda.device_of(master):
        join_kernel[(triton.cdiv(n, BLOCK),)](
            tops, remainder, words, n, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
        )
