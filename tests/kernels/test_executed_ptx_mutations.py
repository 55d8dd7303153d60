"""A kernel that is wrong in one place goes red: the checks are worth their name.

Each test changes the compiled PTX as a slip in the kernel would: a shift by the wrong amount, a
mask left out, a comparison off by one, a constant misread.
"""

import re
from dataclasses import replace

import pytest

from verify.activations import DequantizeCase, QuantizeCase
from verify.cases import KernelCase, MismatchError
from verify.launch import CompiledKernel, compile_kernels
from verify.masks import PackMaskCase
from verify.masters import SplitCase
from verify.narrowing import NarrowCase
from verify.ptx import MemoryFault
from verify.walks import WalkCase

QUANTIZE = QuantizeCase(dtype="bf16", bits=4, wide=False)
DEQUANTIZE = DequantizeCase(dtype="bf16", bits=4)
PACK_MASK = PackMaskCase()
SPLIT = SplitCase()
UNSCALE = WalkCase(op="grad_unscale", tensors="fp32")
NARROW = NarrowCase()
CASES = (QUANTIZE, DEQUANTIZE, PACK_MASK, SPLIT, UNSCALE, NARROW)

Kernels = dict[KernelCase, CompiledKernel]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return compile_kernels("sm_90", CASES)


@pytest.mark.parametrize(
    ("case", "pattern", "replacement", "count"),
    [
        pytest.param(QUANTIZE, r"-766435501\b", "-766435499", 0, id="a Philox multiplier"),
        pytest.param(QUANTIZE, r"\b65543\b", "131079", 0, id="outward rounding of the scale"),
        pytest.param(QUANTIZE, r"\b0f3F800000\b", "0f3F810000", 0, id="the reciprocal's step"),
        pytest.param(DEQUANTIZE, r"(bfe\.u32 .*), 4;", r"\1, 3;", 1, id="a code's width"),
        pytest.param(PACK_MASK, r"(shl\.b32 .*), [1-7];", r"\1, 0;", 1, id="a bit's place"),
        pytest.param(SPLIT, r"(shr\.u32 .*), 16;", r"\1, 15;", 1, id="the upper half"),
        pytest.param(UNSCALE, r"mul\.f32", "add.f32", 1, id="the product with the scale"),
        pytest.param(NARROW, r"setp\.ge\.u64", "setp.gt.u64", 0, id="the end of the range"),
    ],
)
def test_a_wrong_instruction_is_seen(
    kernels: Kernels, case: KernelCase, pattern: str, replacement: str, count: int
) -> None:
    text, replaced = re.subn(pattern, replacement, kernels[case].ptx, count=count)
    assert replaced, f"{case.name} has no {pattern}"
    with pytest.raises(MismatchError):
        case.check(replace(kernels[case], ptx=text))


@pytest.mark.parametrize(
    ("case", "access"),
    [
        # Its loads are clamped to the last element instead of masked.
        (QUANTIZE, "st"),
        *((case, access) for case in (PACK_MASK, SPLIT, UNSCALE) for access in ("ld", "st")),
    ],
)
def test_a_missing_mask_is_seen(kernels: Kernels, case: KernelCase, access: str) -> None:
    text, replaced = re.subn(rf"@%p\d+ {access}\.global", f"{access}.global", kernels[case].ptx)
    assert replaced, f"{case.name} masks no {access}"
    with pytest.raises(MemoryFault):
        case.check(replace(kernels[case], ptx=text))
