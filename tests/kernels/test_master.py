"""fp32 masters as bf16 weights and int16 remainders: nothing is lost, and weights are nearest."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dpmem_kernels import join_master, split_master
from dpmem_kernels.backend import Backend

BACKENDS: tuple[Backend, ...] = ("reference", "cpu", "triton")


def from_bits(*patterns: int) -> Tensor:
    return torch.from_numpy(np.array(patterns, dtype=np.uint32).view(np.float32))


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def edges() -> Tensor:
    """Every upper half (all signs, exponents, infinities, NaNs) with the lower halves that matter.

    0 and its neighbours, the tie and its neighbours, the largest; and a random one.
    """
    tops = np.arange(0x10000, dtype=np.uint32) << 16
    lows = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    random = np.random.default_rng(7).integers(0, 0x10000, len(tops), dtype=np.uint32)
    patterns = np.concatenate(((tops[:, None] | lows).ravel(), tops | random))
    return torch.from_numpy(patterns.view(np.float32))


def assert_nearest(master: Tensor, weight: Tensor) -> None:
    """Against torch's rounding to even, from which a weight differs in ties: away from zero."""
    bits = bits_of(master)
    even = master.bfloat16()
    tie = (bits & 0xFFFF) == 0x8000
    away = (even.view(torch.int16) + ((bits >> 16) & 1 == 0)).view(torch.bfloat16)
    expected = torch.where(tie, away, even)
    number = ~master.isnan()
    assert torch.equal(weight.view(torch.int16)[number], expected.view(torch.int16)[number])
    # Of the NaNs, a few signaling ones cannot have a NaN as their weight: see master.py.
    displaced = (bits & 0x7FFF8000) == 0x7F808000
    beside_inf = ~number & ((bits & 0x7FFF8000) == 0x7F800000)
    assert bool((weight[displaced] == 0).all())
    assert bool(weight[beside_inf].isinf().all())
    assert bool(weight[~number & ~displaced & ~beside_inf].isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_edges_of_every_upper_half(backend: Backend) -> None:
    master = edges()
    weight, remainder = split_master(master, backend=backend)
    assert (weight.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert_nearest(master, weight)
    assert torch.equal(bits_of(join_master(weight, remainder, backend=backend)), bits_of(master))


@pytest.mark.slow
def test_all_patterns() -> None:
    """All 2^32, in which no two share a weight and a remainder, for each is restored."""
    step = 1 << 24
    for start in range(0, 1 << 32, step):
        patterns = np.arange(start, start + step, dtype=np.uint64).astype(np.uint32)
        master = torch.from_numpy(patterns.view(np.float32))
        weight, remainder = split_master(master, backend="cpu")
        assert_nearest(master, weight)
        assert torch.equal(bits_of(join_master(weight, remainder, backend="cpu")), bits_of(master))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("pattern", "weight", "remainder"),
    [
        (0x3E99999A, 0x3E9A, -26214),  # the module's example, 0.3
        (0x3F808000, 0x3F81, -32768),  # a tie, away from zero
        (0xBF808000, 0xBF81, -32768),
        (0x80000000, 0x8000, 0),  # -0
        (0x00008000, 0x0001, -32768),  # a denormal
        (0x7F7FFFFF, 0x7F80, -1),  # the largest number rounds to inf
        (0x7F800000, 0x7F80, 0),  # inf
        (0xFF800000, 0xFF80, 0),
        (0x7FC00000, 0x7FC0, 0),  # the NaN of x86
        (0x7FFFFFFF, 0x7FFF, -1),  # the NaN of NVIDIA GPUs
        (0xFFFFFFFF, 0xFFFF, -1),
        (0x7F80FFFF, 0x0000, -1),  # a displaced NaN
        (0xFF808000, 0x8000, -32768),
    ],
)
def test_the_stated_patterns(backend: Backend, pattern: int, weight: int, remainder: int) -> None:
    master = from_bits(pattern)
    half, rest = split_master(master, backend=backend)
    assert half.view(torch.int16).item() & 0xFFFF == weight
    assert rest.item() == remainder
    assert torch.equal(bits_of(join_master(half, rest, backend=backend)), bits_of(master))


def test_backends_agree_on_halves_that_never_were_one_number() -> None:
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for value in (0, 1, -1, 32767, -32768, 1234):
        remainder = torch.full_like(weight, value, dtype=torch.int16)
        want = join_master(weight, remainder, backend="reference")
        for backend in ("cpu", "triton"):
            assert torch.equal(
                bits_of(join_master(weight, remainder, backend=backend)), bits_of(want)
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (4095,), (4097,), (3, 5, 7), (2, 0, 3)])
def test_any_shape_at_any_address(backend: Backend, shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    master = torch.randn(numel + 1)[1:].view(shape)
    weight, remainder = split_master(master, backend=backend)
    assert weight.shape == remainder.shape == master.shape
    joined = join_master(weight, remainder, backend=backend)
    assert torch.equal(joined, master)
    assert joined.data_ptr() != master.data_ptr() or numel == 0


def test_parameters_split_without_a_graph() -> None:
    master = torch.nn.Parameter(torch.randn(5))
    weight, remainder = split_master(master)
    assert not weight.requires_grad
    assert torch.equal(join_master(weight.requires_grad_(), remainder), master)


def test_results_do_not_depend_on_threads() -> None:
    master, threads = edges(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        weight, remainder = split_master(master, backend="cpu")
        joined = join_master(weight, remainder, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    want = split_master(master, backend="reference")
    assert torch.equal(weight.view(torch.int16), want.weight.view(torch.int16))
    assert torch.equal(remainder, want.remainder)
    assert torch.equal(bits_of(joined), bits_of(master))


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_are_well_formed(backend: Backend) -> None:
    weight, remainder = split_master(torch.randn(3, 5))
    torch.library.opcheck(torch.ops.dpmem.split_master.default, (torch.randn(3, 5), backend))
    torch.library.opcheck(torch.ops.dpmem.join_master.default, (weight, remainder, backend))


def test_fake_tensors_on_a_gpu_that_is_not_here() -> None:
    with FakeTensorMode():
        weight, remainder = split_master(torch.empty(4, 2, device="cuda"))
        master = join_master(weight, remainder)
    assert {t.device.type for t in (weight, remainder, master)} == {"cuda"}
    assert [t.shape for t in (weight, remainder, master)] == [(4, 2)] * 3
    assert [t.dtype for t in (weight, remainder)] == [torch.bfloat16, torch.int16]


def test_bad_arguments_are_refused() -> None:
    weight, remainder = torch.zeros(4, 2).bfloat16(), torch.zeros(4, 2, dtype=torch.int16)
    with pytest.raises(TypeError, match=r"master must be torch.float32; received torch.bfloat16"):
        split_master(weight)
    with pytest.raises(ValueError, match="master must be contiguous"):
        split_master(torch.zeros(4, 2).t())
    with pytest.raises(TypeError, match=r"weight must be torch.bfloat16"):
        join_master(weight.half(), remainder)
    with pytest.raises(TypeError, match=r"remainder must be torch.int16"):
        join_master(weight, remainder.int())
    with pytest.raises(ValueError, match="one shape and device"):
        join_master(weight, remainder.view(-1))
