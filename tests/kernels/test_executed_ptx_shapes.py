"""Results do not depend on how a kernel is launched, and edge values do what the ops promise."""

from dataclasses import replace
from typing import cast

import pytest
import torch

from verify.activations import DequantizeCase, QuantizeCase
from verify.cases import KernelCase
from verify.fp8s import QuantizeFp8Case
from verify.launch import CompiledKernel, bits_of, compile_kernels
from verify.masks import PackMaskCase, PackPositiveCase
from verify.masters import JoinCase, SplitCase
from verify.narrowing import NarrowCase
from verify.walks import WalkCase

QUANTIZE = QuantizeCase(dtype="bf16", bits=4)
DEQUANTIZE = DequantizeCase(dtype="bf16", bits=4)
STATS = WalkCase(op="grad_stats", tensors="fp32")
SCALE = WalkCase(op="grad_scale", tensors="fp32")
PACK = WalkCase(op="pack", tensors="fp32", bucket="fp16")
# Other elements to a program, other threads, or both.
RESHAPED: tuple[KernelCase, ...] = (
    replace(QUANTIZE, block=1024, num_warps=2),
    replace(QUANTIZE, block=8192, num_warps=8),
    replace(DEQUANTIZE, block=1024),
    replace(PackMaskCase(), rows=4, num_warps=1),
    replace(NarrowCase(), block=1024, num_warps=8),
    replace(SplitCase(), block=1024, num_warps=2),
    replace(STATS, num_warps=8),
)
OTHERS: tuple[KernelCase, ...] = (
    replace(QuantizeFp8Case(dtype="fp32", code="e4m3"), block=1024, num_warps=2),
    replace(PackPositiveCase(dtype="fp16"), rows=4, num_warps=8),
    replace(DEQUANTIZE, num_warps=8),
    replace(JoinCase(), block=8192, num_warps=8),
    replace(PACK, num_warps=2),
)

Kernels = dict[KernelCase, CompiledKernel]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return compile_kernels("sm_90", (*RESHAPED, STATS, SCALE, PACK, QUANTIZE))


@pytest.mark.parametrize("case", RESHAPED, ids=lambda case: f"{case.name} {case.num_warps}")
def test_other_blocks_and_warps_give_the_reference_too(kernels: Kernels, case: KernelCase) -> None:
    case.check(kernels[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: f"{case.name} {case.num_warps}")
def test_so_do_the_other_kernels(case: KernelCase) -> None:
    case.check(compile_kernels("sm_90", [case])[case])


def test_noise_is_a_function_of_the_element_alone(kernels: Kernels) -> None:
    """The same element gets the same code from three ways of cutting the tensor up."""
    x = torch.randn(20_000).bfloat16()
    cases = [cast(QuantizeCase, case) for case in (QUANTIZE, *RESHAPED[:2])]
    results = [case.launch(kernels[case], x)[0] for case in cases]
    assert len({case.block for case in cases}) == 3
    for codes, meta in results[1:]:
        assert torch.equal(codes, results[0].codes)
        assert torch.equal(meta, results[0].meta)


def test_finite_values_whose_squares_overflow(kernels: Kernels) -> None:
    tensors = [torch.full((100,), 3e30), torch.ones(100)]
    got = STATS.walk(kernels[STATS], tensors, None, [], 1.0)
    assert got.found_inf == 0
    assert got.partials is not None
    assert got.partials.tolist() == [float("inf"), 100.0]


def test_scaling_by_one_stores_nothing(kernels: Kernels) -> None:
    tensors = [torch.tensor([1.0, float("nan")]), torch.randn(5000).half()]
    before = [bits_of(tensor).copy() for tensor in tensors]
    got = SCALE.walk(kernels[SCALE], tensors, None, [], 1.0)
    assert got.counts.stored_bytes == 0
    assert all((bits_of(t) == b).all() for t, b in zip(tensors, before, strict=True))


def test_a_large_value_does_not_fit_an_fp16_bucket(kernels: Kernels) -> None:
    tensors, bucket = [torch.tensor([1.0, 65519.0]), torch.tensor([65520.0])], torch.zeros(3).half()
    got = PACK.walk(kernels[PACK], tensors[:1], bucket, [0], 1.0)
    assert got.found_inf == 0
    got = PACK.walk(kernels[PACK], tensors, bucket, [0, 2], 1.0)
    assert got.found_inf == 1
    assert bucket.tolist() == [1.0, 65504.0, float("inf")]
