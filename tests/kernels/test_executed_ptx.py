"""What Triton compiles for NVIDIA GPUs, executed on the CPU, does what the references say.

A case's check compares integers and elements bit for bit over odd sizes, awkward values, poisoned
outputs and unaligned inputs, and sums within a derived bound; the executor raises on any access
out of bounds or misaligned. Nothing here runs on a GPU.
"""

import pytest

from verify.activations import DequantizeCase, QuantizeCase
from verify.budget import BYTES_TOLERANCE
from verify.cases import KernelCase
from verify.fp8s import DequantizeFp8Case, QuantizeFp8Case
from verify.launch import CompiledKernel, compile_kernels
from verify.masks import PackMaskCase, PackPositiveCase, UnpackMaskCase
from verify.masters import JoinCase, SplitCase
from verify.narrowing import NarrowCase, WidenCase
from verify.registry import cases_for
from verify.walks import SumCase, WalkCase

# Every kernel, with every dtype, bit width and way of passing n among them.
FEW: tuple[KernelCase, ...] = (
    QuantizeCase(dtype="bf16", bits=4),
    QuantizeCase(dtype="bf16", bits=4, wide=False),
    QuantizeCase(dtype="fp32", bits=8, group_size=64, index="i64"),
    QuantizeCase(dtype="fp16", bits=2, assembly=0),
    DequantizeCase(dtype="bf16", bits=4),
    DequantizeCase(dtype="fp32", bits=2, group_size=256, index="i64"),
    QuantizeFp8Case(dtype="bf16", code="e4m3"),
    DequantizeFp8Case(dtype="fp32", code="e5m2"),
    PackMaskCase(),
    PackPositiveCase(dtype="bf16"),
    UnpackMaskCase(wide=False),
    NarrowCase(),
    WidenCase(code_dtype="int16"),
    SplitCase(),
    JoinCase(index="i64"),
    WalkCase(op="grad_stats", tensors="fp32"),
    WalkCase(op="grad_unscale", tensors="fp32"),
    WalkCase(op="grad_scale", tensors="fp32"),
    WalkCase(op="pack", tensors="fp32", bucket="fp16"),
    WalkCase(op="accumulate", tensors="16bit", bucket="bf16"),
    WalkCase(op="unpack", tensors="fp32", bucket="bf16"),
    SumCase(),
)

Kernels = dict[KernelCase, CompiledKernel]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return compile_kernels("sm_90", FEW)


def _check(case: KernelCase, kernel: CompiledKernel) -> None:
    case.check(kernel)
    counted, work = case.moved(kernel), case.work()
    if counted is not None and work is not None:
        floor = work.floor_bytes_per_element
        assert counted.bytes_per_element == pytest.approx(floor, rel=BYTES_TOLERANCE)


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_the_ptx_equals_the_reference_and_moves_the_floor(
    kernels: Kernels, case: KernelCase
) -> None:
    _check(case, kernels[case])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_every_case_on_every_target(target: str) -> None:
    for case, kernel in compile_kernels(target, cases_for(target)).items():
        _check(case, kernel)


def test_the_few_are_cases_of_the_list_or_near_it() -> None:
    """Each kernel that the full list has is among those that run each time."""
    assert {case.kernel for case in FEW} == {case.kernel for case in cases_for("sm_90")}
