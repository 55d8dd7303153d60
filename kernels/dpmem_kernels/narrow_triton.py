"""narrow and widen on GPUs: the Triton kernels for the format in narrow.py."""

# Arguments of Triton kernels have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements in a program: a 128-bit access of one-byte codes a thread with 4 warps.
BLOCK = 2048


@triton.jit(do_not_specialize=["n", "low", "span"])
def narrow_kernel(index_ptr, codes_ptr, outside_ptr, n, low, span, BLOCK: tl.constexpr):
    """BLOCK elements a program; outside becomes 1 if one of them is not in [low, low + span)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index_ptr += first
    codes_ptr += first
    # Two shapes, and so two layouts: both sides then move whole lines, wide, and only the codes
    # change hands between threads.
    place = tl.arange(0, BLOCK)
    square = tl.arange(0, BLOCK // 128)[:, None] * 128 + tl.arange(0, 128)[None, :]
    if first + BLOCK <= n:
        codes = tl.load(index_ptr + square).to(tl.int64) - low
        tl.store(codes_ptr + place, tl.reshape(codes.to(codes_ptr.dtype.element_ty), (BLOCK,)))
        outside = codes.to(tl.uint64, bitcast=True) >= span.to(tl.uint64)
        tl.store(outside_ptr + square * 0, 1, mask=outside)
    else:
        left = (n - first).to(tl.int32)
        code = tl.load(index_ptr + place, mask=place < left, other=0).to(tl.int64) - low
        tl.store(codes_ptr + place, code.to(codes_ptr.dtype.element_ty), mask=place < left)
        wrong = (code.to(tl.uint64, bitcast=True) >= span.to(tl.uint64)) & (place < left)
        tl.store(outside_ptr + place * 0, 1, mask=wrong)


@triton.jit(do_not_specialize=["n", "low"])
def widen_kernel(codes_ptr, index_ptr, n, low, BLOCK: tl.constexpr):
    """BLOCK elements a program."""
    MASK: tl.constexpr = (1 << codes_ptr.dtype.element_ty.primitive_bitwidth) - 1
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index_ptr += first
    codes_ptr += first
    place = tl.arange(0, BLOCK)
    square = tl.arange(0, BLOCK // 128)[:, None] * 128 + tl.arange(0, 128)[None, :]
    if first + BLOCK <= n:
        codes = tl.reshape(tl.load(codes_ptr + place), (BLOCK // 128, 128))
        indices = (codes.to(tl.int64) & MASK) + low
        tl.store(index_ptr + square, indices.to(index_ptr.dtype.element_ty))
    else:
        left = (n - first).to(tl.int32)
        code = tl.load(codes_ptr + place, mask=place < left, other=0)
        index = (code.to(tl.int64) & MASK) + low
        tl.store(index_ptr + place, index.to(index_ptr.dtype.element_ty), mask=place < left)


def launch_narrow(index: Tensor, codes: Tensor, low: int, span: int, block: int = BLOCK) -> Tensor:
    """Fill `codes`; whether all of index, one element or more, lies in [low, low + span)."""
    outside = torch.zeros((), dtype=torch.int32, device=index.device)
    with torch.cuda.device_of(index):
        narrow_kernel[(triton.cdiv(index.numel(), block),)](
            index,
            codes,
            outside,
            index.numel(),
            low,
            span,
            block,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return outside == 0


def launch_widen(codes: Tensor, index: Tensor, low: int, block: int = BLOCK) -> None:
    """Fill `index`, which has one element or more."""
    with torch.cuda.device_of(index):
        widen_kernel[(triton.cdiv(index.numel(), block),)](
            codes, index, index.numel(), low, block, num_warps=4, enable_fp_fusion=False
        )
