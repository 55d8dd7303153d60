"""Bucket packing and unpacking: right values, right places, nothing else touched."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dpmem_kernels import bucket_pack, bucket_unpack
from dpmem_kernels.backend import Backend
from dpmem_kernels.tensor_table import CHUNK

BACKENDS: tuple[Backend, ...] = ("reference", "cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SIZES = (0, 1, 7, 64, CHUNK - 1, CHUNK, CHUNK + 8)
SENTINEL = 77.0
PROPERTY = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[Tensor], Tensor, list[int]]:
    """Tensors, a bucket full of sentinels, and offsets with gaps between the tensors' places."""
    tensors, offsets, end = [], [], draw(st.sampled_from((0, 8, 1)))
    for _ in range(draw(st.integers(0, 4))):
        size, shift = draw(st.sampled_from(SIZES)), draw(st.sampled_from((0, 0, 1)))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        magnitude = draw(st.sampled_from((1.0, 1e-5, 1e-40, 1e5)))
        values = torch.randn(size + shift, generator=generator) * magnitude
        tensors.append(values.to(draw(st.sampled_from(DTYPES)))[shift:])
        if size and draw(st.integers(0, 3)) == 0:
            tensors[-1][draw(st.sampled_from((0, size - 1)))] = draw(
                st.sampled_from((math.nan, math.inf, -math.inf, -0.0))
            )
        offsets.append(end)
        end += size + draw(st.sampled_from((0, 0, 8, 3)))
    room = end + draw(st.sampled_from((0, 5)))
    return tensors, torch.full((room,), SENTINEL, dtype=draw(st.sampled_from(DTYPES))), offsets


def assert_same_values(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, except that any NaN equals any NaN."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    as_bits = INTEGERS[expected.dtype]
    assert torch.equal(actual.view(as_bits)[~nan], expected.view(as_bits)[~nan])


@pytest.mark.parametrize("backend", BACKENDS)
@PROPERTY
@given(layout=layouts(), scale=st.sampled_from((1.0, 0.5, 1 / 3)))
def test_pack_writes_its_places_and_nothing_else(
    backend: Backend, layout: tuple[list[Tensor], Tensor, list[int]], scale: float
) -> None:
    tensors, bucket, offsets = layout
    expected, finite = bucket.clone(), True
    for tensor, offset in zip(tensors, offsets, strict=True):
        place = expected[offset : offset + tensor.numel()]
        place.copy_(tensor.float() * torch.tensor(scale))
        finite &= bool(place.isfinite().all())
    found_inf = bucket_pack(tensors, bucket, offsets, scale=scale, backend=backend)
    assert_same_values(bucket, expected)
    assert found_inf.dtype == torch.float32
    assert found_inf.shape == ()
    assert found_inf == (not finite)


@pytest.mark.parametrize("backend", BACKENDS)
@PROPERTY
@given(layout=layouts(), factor=st.sampled_from((None, 1.0, 0.5, 1 / 3)))
def test_unpack_is_the_inverse_with_statistics(
    backend: Backend, layout: tuple[list[Tensor], Tensor, list[int]], factor: float | None
) -> None:
    tensors, bucket, offsets = layout
    for tensor, offset in zip(tensors, offsets, strict=True):
        bucket[offset : offset + tensor.numel()].copy_(tensor)
    before = bucket.clone()
    guarded = [torch.full((t.numel() + 2,), SENTINEL, dtype=t.dtype) for t in tensors]
    targets = [storage[1:-1] for storage in guarded]
    scale = None if factor is None else torch.tensor(factor)
    stats = bucket_unpack(bucket, targets, offsets, scale=scale, backend=backend)

    assert_same_values(bucket, before)
    squares, finite = 0.0, True
    for storage, target, offset in zip(guarded, targets, offsets, strict=True):
        source = before[offset : offset + target.numel()].float()
        expected = (source if scale is None else source * scale).to(target.dtype)
        assert_same_values(target, expected)
        assert storage[0] == storage[-1] == SENTINEL
        squares += float(expected.double().square().sum())
        finite &= bool(expected.isfinite().all())
    assert stats.found_inf == (not finite)
    if finite:
        elements = sum(target.numel() for target in targets)
        # The bound that grad_scale.py states, plus float64's own for the sum made here.
        slack = squares * ((CHUNK + 2) * 2**-24 + elements * 2**-53) + (elements + 1) * 2**-150
        assert abs(float(stats.sum_of_squares) - squares) <= slack
    else:
        assert not stats.sum_of_squares.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 1])
def test_a_tensor_may_be_its_own_place(backend: Backend, dtype: torch.dtype, first: int) -> None:
    bucket = torch.randn(2 * CHUNK + 100).to(dtype)
    offsets = [first, first + CHUNK + 16]
    tensors = [bucket[a:b] for a, b in pairwise([*offsets, 2 * CHUNK + 90])]
    last = 2 * CHUNK + 90
    expected = bucket.clone()
    expected[first:last] = (bucket[first:last].float() * 0.3).to(dtype)
    bucket_pack(tensors, bucket, offsets, scale=0.3, backend=backend)
    assert_same_values(bucket, expected)
    bucket_unpack(bucket, tensors, offsets, backend=backend)
    assert_same_values(bucket, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_to_the_wire_is_to_nearest_even_for_ties_and_neighbours(backend: Backend) -> None:
    """fp32 values on, just below and just above every tie of the 16-bit formats' low bits."""
    tops = torch.arange(0x10000, dtype=torch.int64) << 16
    lows = torch.tensor([0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (tops[::37, None] + lows).reshape(-1)
    source = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        bucket = torch.zeros(source.numel(), dtype=dtype)
        bucket_pack([source], bucket, [0], backend=backend)
        assert_same_values(bucket, source.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_too_large_for_the_wire_raises_the_flag(backend: Backend) -> None:
    bucket = torch.zeros(1, dtype=torch.float16)
    assert bucket_pack([torch.tensor([1e6])], bucket, [0], backend=backend) == 1
    assert bucket_pack([torch.tensor([1e6])], bucket, [0], scale=1e-3, backend=backend) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_module_example(backend: Backend) -> None:
    bucket = torch.zeros(4)
    found_inf = bucket_pack(
        [torch.tensor([1.0, 2.0]), torch.tensor([3.0])], bucket, [0, 3], scale=0.5, backend=backend
    )
    assert bucket.tolist() == [0.5, 1.0, 0.0, 1.5]
    assert found_inf == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_are_well_formed(backend: Backend) -> None:
    tensors, bucket = [torch.randn(5), torch.randn(9).half()], torch.zeros(20)
    pack = (tensors, bucket, [0, 6], 0.5, backend)
    unpack = (bucket, tensors, [0, 6], torch.tensor(0.5), backend)
    torch.library.opcheck(torch.ops.dpmem.bucket_pack.default, pack)
    torch.library.opcheck(torch.ops.dpmem.bucket_unpack.default, unpack)


def test_fake_tensors_on_a_gpu_that_is_not_here() -> None:
    with FakeTensorMode():
        bucket, tensor = torch.empty(8, device="cuda"), torch.empty(8, device="cuda")
        found_inf = bucket_pack([tensor], bucket, [0])
        stats = bucket_unpack(bucket, [tensor], [0])
    assert {t.device.type for t in (found_inf, *stats)} == {"cuda"}


@pytest.mark.parametrize(("offset", "size"), [(-1, 2), (7, 2), (9, 0)])
def test_offsets_outside_the_bucket_are_refused(offset: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"inside the bucket of 8 elements; tensors\[0\]"):
        bucket_pack([torch.zeros(size)], torch.zeros(8), [offset])
    with pytest.raises(ValueError, match=r"inside the bucket of 8 elements; tensors\[0\]"):
        bucket_unpack(torch.zeros(8), [torch.zeros(size)], [offset])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="one offset per tensor; received 2 offsets for 1"):
        bucket_pack([torch.zeros(1)], torch.zeros(8), [0, 1])
    with pytest.raises(ValueError, match="1-D and contiguous"):
        bucket_pack([torch.zeros(1)], torch.zeros(8, 1), [0])
    with pytest.raises(TypeError, match="scale must be float32"):
        bucket_unpack(torch.zeros(8), [torch.zeros(1)], [0], scale=torch.tensor(1))
