"""Bucket packing and unpacking: right values, right places, nothing else touched."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dpmem_kernels import PackPlan, bucket_pack, bucket_unpack
from dpmem_kernels.backend import Backend
from dpmem_kernels.tensor_table import CHUNK, CPU_CHUNK

BACKENDS: tuple[Backend, ...] = ("reference", "cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SIZES = (0, 1, 7, 64, CHUNK - 1, CHUNK, CHUNK + 8)
SENTINEL = 77.0
CPU = torch.device("cpu")
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


def plan_of(tensors: list[Tensor], offsets: list[int]) -> PackPlan:
    return PackPlan([t.numel() for t in tensors], [t.dtype for t in tensors], offsets, CPU)


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
    plan = plan_of(tensors, offsets)
    found_inf = bucket_pack(plan, tensors, bucket, scale=scale, backend=backend)
    assert_same_values(bucket, expected)
    assert found_inf.dtype == torch.float32
    assert found_inf.shape == ()
    assert found_inf == (not finite)


def fused(x: float, y: float, z: float) -> float:
    """x * y + z as float32 with one rounding, from exact rationals."""
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    nearest = torch.tensor(float(exact), dtype=torch.float64).float()
    candidates = [nearest, nearest.nextafter(torch.tensor(math.inf)), nearest.nextafter(-nearest)]
    return min(map(float, candidates), key=lambda c: (abs(Fraction(c) - exact), _odd(c)))


def _odd(value: float) -> int:
    return int(torch.tensor(value).view(torch.int32)) & 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulate_rounds_the_fused_sum_once(backend: Backend, dtype: torch.dtype) -> None:
    """Where the product's last bits decide the sum: with two roundings some elements differ."""
    x, held, scale = torch.randn(300), torch.randn(300).to(dtype), 1 / 3
    product = x * torch.tensor(scale)
    held[:100] = -product[:100]
    factor = float(torch.tensor(scale))
    pairs = zip(x.tolist(), held.tolist(), strict=True)
    exact = [fused(value, factor, addend) for value, addend in pairs]
    expected = torch.tensor(exact).to(dtype)
    if dtype == torch.float32:
        assert not torch.equal(expected, product + held)
    plan = PackPlan([300], [torch.float32], [0], CPU)
    bucket_pack(plan, [x], held, scale=scale, accumulate=True, backend=backend)
    assert_same_values(held, expected)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@PROPERTY
@given(layout=layouts(), scale=st.sampled_from((1.0, 0.5, 1 / 3)), seed=st.integers(0, 99))
def test_accumulate_adds_to_its_places_and_nothing_else(
    backend: Backend, layout: tuple[list[Tensor], Tensor, list[int]], scale: float, seed: int
) -> None:
    tensors, bucket, offsets = layout
    generator = torch.Generator().manual_seed(seed)
    bucket.copy_(torch.randn(bucket.shape, generator=generator))
    expected, plan = bucket.clone(), plan_of(tensors, offsets)
    want = bucket_pack(plan, tensors, expected, scale=scale, accumulate=True, backend="reference")
    got = bucket_pack(plan, tensors, bucket, scale=scale, accumulate=True, backend=backend)
    assert_same_values(bucket, expected)
    assert got == want


# Canonical, with every bit of its payload, and negative: a carry out of these is a number.
NANS = (0x7FC00000, 0x7FFFFFFF, -0x400000, -1)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES[1:] for b in DTYPES[1:]], ids=str)
def test_every_16_bit_gradient_by_every_kind_of_scale(
    dtypes: tuple[torch.dtype, torch.dtype], accumulate: bool
) -> None:
    source, destination = dtypes
    every = torch.arange(1 << 16)
    gradient = every.to(torch.uint16).view(source)
    held = every.flip(0).to(torch.uint16).view(destination)
    plan = PackPlan([1 << 16], [source], [0], CPU)
    nans = torch.tensor(NANS, dtype=torch.int32).view(torch.float32).tolist()
    for scale in (0.5, 1 / 3, 0.0, 1e-30, 1e30, math.inf, -math.inf, *nans):
        expected, bucket = held.clone(), held.clone()
        for backend, out in (("reference", expected), ("cpu", bucket)):
            flag = bucket_pack(
                plan, [gradient], out, scale=scale, accumulate=accumulate, backend=backend
            )
            assert flag == 1
        assert_same_values(bucket, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulating_raises_the_flag_for_what_it_writes(backend: Backend) -> None:
    plan = PackPlan([1], [torch.float16], [0], CPU)
    large, bucket = torch.tensor([60000.0]).half(), torch.tensor([1.0, math.nan]).half()
    assert bucket_pack(plan, [large], bucket, accumulate=True, backend=backend) == 0
    assert bucket_pack(plan, [large], bucket, accumulate=True, backend=backend) == 1
    assert bucket[0] == math.inf


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
    plan = plan_of(targets, offsets)
    stats = bucket_unpack(plan, bucket, targets, scale=scale, backend=backend)

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
    plan = plan_of(tensors, offsets)
    bucket_pack(plan, tensors, bucket, scale=0.3, backend=backend)
    assert_same_values(bucket, expected)
    bucket_unpack(plan, bucket, tensors, backend=backend)
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
        bucket_pack(plan_of([source], [0]), [source], bucket, backend=backend)
        assert_same_values(bucket, source.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_too_large_for_the_wire_raises_the_flag(backend: Backend) -> None:
    bucket, tensors = torch.zeros(1, dtype=torch.float16), [torch.tensor([1e6])]
    plan = plan_of(tensors, [0])
    assert bucket_pack(plan, tensors, bucket, backend=backend) == 1
    assert bucket_pack(plan, tensors, bucket, scale=1e-3, backend=backend) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "first_infinite"),
    [(torch.float16, 65520.0), (torch.bfloat16, (2 - 2**-8) * 2.0**127)],
)
def test_the_flag_rises_with_the_first_value_that_rounds_to_inf(
    backend: Backend, dtype: torch.dtype, first_infinite: float
) -> None:
    value = torch.tensor([-first_infinite])
    plan, bucket = plan_of([value], [0]), torch.zeros(1, dtype=dtype)
    assert bucket_pack(plan, [value], bucket, backend=backend) == 1
    assert bucket == -math.inf
    below = value.nextafter(torch.zeros(1))
    assert bucket_pack(plan, [below], bucket, backend=backend) == 0
    assert bucket == torch.finfo(dtype).min


BAD = (math.nan, math.inf, -math.inf)
# Quarters of a chunk (the CPU reads a chunk as four streams), and elements from there.
PLACES = ((0, 0), (0, 1), (0, 7), (1, -1), (1, 0), (4, -1), (4, 0), (4, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("backend", "place", "bad"),
    [
        (backend, place, bad)
        for backend in BACKENDS
        for number, place in enumerate(PLACES)
        for bad in BAD
        # The interpreter takes a second each: every place, one value at each.
        if backend != "triton" or bad is BAD[number % 3]
    ],
)
def test_one_bad_value_anywhere_raises_the_flag(
    backend: Backend, dtype: torch.dtype, place: tuple[int, int], bad: float
) -> None:
    chunk = CHUNK if backend == "triton" else CPU_CHUNK
    position = place[0] * chunk // 4 + place[1]
    tensor = torch.full((chunk + 9,), torch.finfo(torch.float16).max).to(dtype)
    plan, bucket = plan_of([tensor], [0]), torch.empty_like(tensor)
    tensor[position] = bad
    assert bucket_pack(plan, [tensor], bucket, backend=backend) == 1
    tensor[position] = torch.finfo(torch.float16).max
    assert bucket_pack(plan, [tensor], bucket, backend=backend) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_values_with_products_near_the_largest_raise_no_flag(
    backend: Backend, dtype: torch.dtype
) -> None:
    """Their squares overflow fp32, and an inexact product minus itself must not look like NaN."""
    tensor = (torch.linspace(1, 2, 999) * 1e38).to(dtype)
    plan, bucket = plan_of([tensor], [0]), torch.empty_like(tensor)
    assert bucket_pack(plan, [tensor], bucket, scale=1 / 3, backend=backend) == 0
    third = torch.tensor(1 / 3)
    stats = bucket_unpack(plan, bucket, [tensor], scale=third, backend=backend)
    assert stats.found_inf == 0
    assert stats.sum_of_squares == math.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_module_example(backend: Backend) -> None:
    plan = PackPlan([2, 1], [torch.float32] * 2, offsets=[0, 3], device=CPU)
    tensors, bucket = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])], torch.zeros(4)
    assert bucket_pack(plan, tensors, bucket, scale=0.5, backend=backend) == 0
    assert bucket.tolist() == [0.5, 1.0, 0.0, 1.5]
    assert bucket_pack(plan, tensors, bucket, scale=0.5, accumulate=True, backend=backend) == 0
    assert bucket.tolist() == [1.0, 2.0, 0.0, 3.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_serves_new_tensors_and_other_buckets(backend: Backend) -> None:
    """Only addresses travel with a call: nothing of the first may be left in the second."""
    plan = PackPlan([3, CHUNK + 1], [torch.float32, torch.bfloat16], [1, 8], CPU)
    for dtype, room in ((torch.float32, CHUNK + 9), (torch.float16, CHUNK + 20)):
        tensors, bucket = [torch.randn(3), torch.randn(CHUNK + 1).bfloat16()], torch.zeros(room)
        bucket = bucket.to(dtype)
        bucket_pack(plan, tensors, bucket, backend=backend)
        assert torch.equal(bucket[1:4], tensors[0].to(dtype))
        assert torch.equal(bucket[8 : CHUNK + 9], tensors[1].to(dtype))
        assert bucket.count_nonzero() == CHUNK + 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_plan(backend: Backend) -> None:
    plan, bucket = PackPlan([], [], [], CPU), torch.ones(2)
    assert bucket_pack(plan, [], bucket, backend=backend) == 0
    stats = bucket_unpack(plan, bucket, [], backend=backend)
    assert (stats.sum_of_squares, stats.found_inf) == (0, 0)
    assert bucket.tolist() == [1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_are_well_formed(backend: Backend) -> None:
    tensors, bucket = [torch.randn(5), torch.randn(9).half()], torch.zeros(20)
    pack = (tensors, bucket, [0, 6], 0.5, True, backend)
    unpack = (bucket, tensors, [0, 6], torch.tensor(0.5), backend)
    torch.library.opcheck(torch.ops.dpmem.bucket_pack.default, pack)
    torch.library.opcheck(torch.ops.dpmem.bucket_unpack.default, unpack)


def test_what_is_written_counts_as_modified() -> None:
    """Autograd must notice when a tensor that it saved is overwritten."""
    plan, tensor, bucket = PackPlan([2], [torch.float32], [0], CPU), torch.ones(2), torch.ones(2)
    bucket_pack(plan, [tensor], bucket)
    assert (tensor._version, bucket._version) == (0, 1)
    bucket_unpack(plan, bucket, [tensor])
    assert (tensor._version, bucket._version) == (1, 1)


def test_fake_tensors_on_a_gpu_that_is_not_here() -> None:
    with FakeTensorMode():
        bucket, tensor = torch.empty(8, device="cuda"), torch.empty(8, device="cuda")
        plan = PackPlan([8], [torch.float32], [0], bucket.device)
        found_inf = bucket_pack(plan, [tensor], bucket)
        stats = bucket_unpack(plan, bucket, [tensor])
    assert {t.device.type for t in (found_inf, *stats)} == {"cuda"}


@pytest.mark.parametrize(("offset", "size"), [(7, 2), (9, 0), (0, 9)])
def test_a_bucket_too_small_is_refused(offset: int, size: int) -> None:
    plan = PackPlan([size], [torch.float32], [offset], CPU)
    with pytest.raises(ValueError, match=r"inside the bucket; .* at 9 .* has 8 elements"):
        bucket_pack(plan, [torch.zeros(size)], torch.zeros(8))
    with pytest.raises(ValueError, match=r"inside the bucket; .* at 9 .* has 8 elements"):
        bucket_unpack(plan, torch.zeros(8), [torch.zeros(size)])


@pytest.mark.parametrize(
    ("numels", "offsets", "message"),
    [
        ([1], [0, 1], "1 sizes, 1 dtypes and 2 offsets"),
        ([2], [-1], r"tensors\[0\] takes 2 elements from offset -1"),
        ([-1], [0], r"tensors\[0\] takes -1 elements"),
        ([2, 2], [3, 2], r"tensors\[1\] ends at 4 and tensors\[0\] starts at 3"),
    ],
)
def test_impossible_plans_are_refused(numels: list[int], offsets: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackPlan(numels, [torch.float32] * len(numels), offsets, CPU)


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [torch.zeros(1), torch.zeros(1)],
        [torch.zeros(3)],
        [torch.zeros(2).half()],
        [torch.zeros(2, 1)],
        [torch.zeros(4)[::2]],
        [torch.zeros(2, device="meta")],
    ],
)
def test_tensors_that_are_not_the_plans_are_refused(tensors: list[Tensor]) -> None:
    plan, bucket = PackPlan([2], [torch.float32], [0], CPU), torch.full((8,), SENTINEL)
    with pytest.raises(ValueError, match="plan"):
        bucket_pack(plan, tensors, bucket)
    with pytest.raises(ValueError, match="plan"):
        bucket_unpack(plan, bucket, tensors)
    assert (bucket == SENTINEL).all()


def test_bad_arguments_are_refused() -> None:
    plan = PackPlan([1], [torch.float32], [0], CPU)
    with pytest.raises(TypeError, match=r"tensors\[0\] is torch.float64"):
        PackPlan([1], [torch.float64], [0], CPU)
    with pytest.raises(ValueError, match="1-D and contiguous"):
        bucket_pack(plan, [torch.zeros(1)], torch.zeros(8, 1))
    with pytest.raises(TypeError, match="scale must be float32"):
        bucket_unpack(plan, torch.zeros(8), [torch.zeros(1)], scale=torch.tensor(1))
