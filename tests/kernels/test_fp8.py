"""quantize_fp8 and dequantize_fp8: the nearest 8-bit float, the same bytes on every backend."""

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dpmem_kernels.backend import Backend
from dpmem_kernels.fp8 import FORMATS, QuantizedFp8, dequantize_fp8, quantize_fp8
from dpmem_kernels.fp8_triton import launch_dequantize_fp8, launch_quantize_fp8
from dpmem_kernels.quantize import DTYPES, GROUP_SIZES

BACKENDS: tuple[Backend, ...] = ("reference", "cpu", "triton")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_format = pytest.mark.parametrize("format", FORMATS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _bytes(quantized: QuantizedFp8) -> tuple[Tensor, Tensor]:
    return quantized.codes.view(torch.uint8), quantized.scales.view(torch.uint8)


def _same(a: Tensor, b: Tensor) -> bool:
    """The same values and signs, and NaN in the same places."""
    number = ~a.isnan()
    return (
        a.dtype == b.dtype
        and torch.equal(number, ~b.isnan())
        and torch.equal(a[number], b[number])
        and torch.equal(a[number].signbit(), b[number].signbit())
    )


def _agree_everywhere(x: Tensor, format: torch.dtype, group_size: int) -> None:
    expected = quantize_fp8(x, format, group_size=group_size, backend="reference")
    for backend in ("cpu", "triton"):
        found = quantize_fp8(x, format, group_size=group_size, backend=backend)
        for a, b in zip(_bytes(found), _bytes(expected), strict=True):
            assert torch.equal(a, b), backend
        for dtype in DTYPES:
            restored = dequantize_fp8(expected, dtype, group_size=group_size, backend=backend)
            want = dequantize_fp8(expected, dtype, group_size=group_size, backend="reference")
            assert _same(restored, want), (backend, dtype)


@settings(max_examples=12, deadline=None)
@given(
    numel=st.integers(1, 700),
    offset=st.integers(0, 9),
    format=st.tuples(
        st.sampled_from(DTYPES), st.sampled_from(list(FORMATS)), st.sampled_from(GROUP_SIZES)
    ),
    exponent=st.integers(-140, 120),
    decades=st.integers(0, 12),
    seed=st.integers(0, 2**20),
)
def test_every_backend_gives_the_same_bytes(
    numel: int, offset: int, format: Any, exponent: int, decades: int, seed: int
) -> None:
    dtype, code_dtype, group_size = format
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel + offset, generator=generator, dtype=torch.float64)
    x *= torch.logspace(0, -decades, numel + offset, dtype=torch.float64) * 2.0**exponent
    _agree_everywhere(x.to(dtype)[offset:], code_dtype, group_size)


@each_format
@each_dtype
def test_backends_agree_over_several_programs(format: torch.dtype, dtype: torch.dtype) -> None:
    x = torch.randn(2 * 2048 + 333) * torch.logspace(-9, 3, 2 * 2048 + 333)
    _agree_everywhere(x.to(dtype), format, 128)


def _values(format: torch.dtype) -> list[Fraction]:
    """Every non-negative number of the format, by its definition."""
    mantissa_bits, bias, top = FORMATS[format]
    codes = (top + bias << mantissa_bits) + (3 << mantissa_bits - 2)
    values = []
    for code in range(codes + 1):
        exponent, mantissa = divmod(code, 1 << mantissa_bits)
        leading = (1 << mantissa_bits) if exponent else 0
        shift = max(exponent, 1) - bias - mantissa_bits
        values.append((leading + mantissa) * Fraction(2) ** shift)
    return values


@each_backend
@each_format
def test_each_number_becomes_the_nearest(backend: Backend, format: torch.dtype) -> None:
    """Every number of the format, every midpoint between two and fp32's neighbours of it."""
    values = _values(format)
    assert values[-1] == Fraction(torch.finfo(format).max)
    middles = [float((a + b) / 2) for a, b in itertools.pairwise(values)]
    middle = torch.tensor(middles)
    near = [middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(1e9))]
    x = torch.cat((torch.tensor([float(v) for v in values]), *near))
    x = torch.cat((x, -x))
    # The largest number in front of each 63 keeps every scale at 1.
    x = torch.nn.functional.pad(x, (0, -len(x) % 63)).view(-1, 63)
    x = torch.nn.functional.pad(x, (1, 0), value=float(values[-1]))
    codes, scales = _bytes(quantize_fp8(x, format, group_size=64, backend=backend))
    assert set(scales.tolist()) == {127}
    for element, code in zip(x.flatten().tolist(), codes.flatten().tolist(), strict=True):
        assert (code >> 7 == 1) == (str(element)[0] == "-")
        exact, place = abs(Fraction(element)), code & 0x7F
        error = abs(values[place] - exact)
        for other in (place - 1, place + 1):
            if 0 <= other < len(values):
                distance = abs(values[other] - exact)
                assert error < distance or (error == distance and place % 2 == 0)
    # dequantize gives each code its value.
    every = torch.arange(len(values), dtype=torch.uint8)
    ones = torch.full((-(-len(values) // 64),), 127, dtype=torch.uint8)
    stored = QuantizedFp8(every.view(format), ones.view(torch.float8_e8m0fnu))
    restored = dequantize_fp8(stored, torch.float32, group_size=64, backend=backend)
    assert [Fraction(value) for value in restored.tolist()] == values


@each_format
def test_the_scale_is_the_smallest_that_fits(format: torch.dtype) -> None:
    largest = torch.finfo(format).max
    x = torch.zeros(6, 64)
    x[0, 3] = -largest
    x[1, 3] = torch.tensor(largest).nextafter(torch.tensor(1e9))
    x[2, 3] = largest / 2
    x[3, 3] = torch.tensor(largest / 2).nextafter(torch.tensor(1e9))
    x[4, 3] = 1e-38
    quantized = quantize_fp8(x, format, group_size=64)
    assert quantized.scales.float().tolist() == [1.0, 2.0, 0.5, 1.0, 2.0**-126, 2.0**-126]
    found = quantized.codes.float().abs().amax(1)[:4]
    assert found.tolist() == [largest, largest / 2, largest, largest / 2]


@each_format
@each_dtype
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_error_is_the_format_s(format: torch.dtype, dtype: torch.dtype, group_size: int) -> None:
    x = (torch.randn(40, 100) * torch.logspace(-8, 2, 100)).to(dtype)
    quantized = quantize_fp8(x, format, group_size=group_size)
    assert quantized.codes.shape == x.shape
    restored = dequantize_fp8(quantized, torch.float32, group_size=group_size).double()
    scale = quantized.scales.double().repeat_interleave(group_size)[:4000].view(40, 100)
    relative, absolute = (2**-4, 2**-10) if format == E4M3 else (2**-3, 2**-17)
    bound = torch.maximum(relative * x.double().abs(), absolute * scale)
    assert bool(((restored - x.double()).abs() <= bound).all())


def test_the_worked_example() -> None:
    x = torch.tensor([1000.0, 3.3, -0.002])
    quantized = quantize_fp8(x, E4M3)
    assert quantized.scales.float().tolist() == [4.0]
    restored = dequantize_fp8(quantized, torch.float32)
    assert restored.tolist() == [1024.0, 3.25, 0.0]
    assert restored[2].signbit()


@each_backend
@each_format
@each_dtype
def test_a_group_that_is_not_finite_comes_back_as_nan(
    backend: Backend, format: torch.dtype, dtype: torch.dtype
) -> None:
    x = torch.randn(6, 64).to(dtype)
    for group, bad in ((1, float("nan")), (3, float("inf")), (4, -float("inf"))):
        x[group, 12] = bad
    quantized = quantize_fp8(x, format, group_size=64, backend=backend)
    codes, scales = _bytes(quantized)
    assert scales[[1, 3, 4]].tolist() == [255] * 3
    assert not codes[[1, 3, 4]].any()
    restored = dequantize_fp8(quantized, dtype, group_size=64, backend=backend)
    assert restored[[1, 3, 4]].isnan().all()
    assert restored[[0, 2, 5]].isfinite().all()


@each_format
def test_special_groups_are_the_same_everywhere(format: torch.dtype) -> None:
    rows = torch.zeros(7, 64)
    rows[0, ::2] = -0.0
    rows[1] = 1e-45
    rows[2, 5] = -1e-40
    rows[3] = torch.finfo(torch.float32).max
    rows[4] = torch.linspace(-1e-37, 1e-37, 64)
    rows[5].view(torch.int32)[7] = -1
    rows[6] = 65504.0
    for dtype in DTYPES:
        _agree_everywhere(rows.to(dtype), format, 64)


@pytest.mark.parametrize("flush", [False, True])
def test_a_process_that_flushes_denormals_gets_the_same_bytes(flush: bool) -> None:
    x = torch.randn(256) * torch.logspace(-6, 0, 256)
    expected = quantize_fp8(x, E4M3, backend="reference")
    try:
        torch.set_flush_denormal(flush)
        found = quantize_fp8(x, E4M3, backend="cpu")
        restored = dequantize_fp8(found, torch.float32, backend="cpu")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(_bytes(found)[0], _bytes(expected)[0])
    assert torch.equal(restored, dequantize_fp8(expected, torch.float32, backend="reference"))


@each_format
@pytest.mark.parametrize(("block", "group_size"), [(512, 256), (1024, 64), (8192, 128)])
def test_block_shape_changes_nothing(format: torch.dtype, block: int, group_size: int) -> None:
    x = torch.randn(2500).bfloat16()
    expected = quantize_fp8(x, format, group_size=group_size, backend="reference")
    codes, scales = (torch.empty_like(part) for part in _bytes(expected))
    launch_quantize_fp8(x, codes, scales, FORMATS[format], group_size, block)
    assert torch.equal(codes, _bytes(expected)[0])
    assert torch.equal(scales, _bytes(expected)[1])
    out = torch.empty_like(x)
    launch_dequantize_fp8(codes, scales, out, FORMATS[format], group_size, block)
    want = dequantize_fp8(expected, x.dtype, group_size=group_size, backend="reference")
    assert torch.equal(out, want)


@each_backend
@each_format
def test_a_tensor_without_elements(backend: Backend, format: torch.dtype) -> None:
    quantized = quantize_fp8(torch.zeros(0, 3), format, backend=backend)
    assert (quantized.codes.shape, quantized.scales.shape) == ((0, 3), (0,))
    assert dequantize_fp8(quantized, torch.bfloat16, backend=backend).shape == (0, 3)


def test_torch_threads_change_nothing() -> None:
    x, before = torch.randn(100_000), torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        quantized = quantize_fp8(x, E5M2, backend="cpu")
        found.append((*_bytes(quantized), dequantize_fp8(quantized, x.dtype, backend="cpu")))
    torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_mistakes_are_refused() -> None:
    x = torch.zeros(4, 64)
    with pytest.raises(TypeError, match=r"codes are .*; received torch\.int8"):
        quantize_fp8(x, torch.int8)
    with pytest.raises(TypeError, match=r"float16; received torch\.float64"):
        quantize_fp8(x.double(), E4M3)
    with pytest.raises(ValueError, match=r"group_size must be one of .* received 32"):
        quantize_fp8(x, E4M3, group_size=32)
    with pytest.raises(ValueError, match="x must be contiguous"):
        quantize_fp8(x.t(), E4M3)
    quantized = quantize_fp8(x, E4M3)
    with pytest.raises(ValueError, match="pass what quantize_fp8 returned"):
        dequantize_fp8(quantized, torch.float32, group_size=64)
    with pytest.raises(ValueError, match="pass what quantize_fp8 returned"):
        dequantize_fp8(QuantizedFp8(quantized.codes, x[0, :2]), torch.float32)


@each_backend
def test_operators_pass_opcheck(backend: Backend) -> None:
    x = torch.randn(3, 50, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.dpmem.quantize_fp8.default, (x, E4M3, 128, backend))
    quantized = quantize_fp8(x, E4M3)
    torch.library.opcheck(
        torch.ops.dpmem.dequantize_fp8.default,
        (*_bytes(quantized), E4M3, x.dtype, 128, backend),
    )


def test_fake_tensors_have_the_real_shapes() -> None:
    with FakeTensorMode():
        fake = quantize_fp8(torch.empty(7, 99, device="cuda"), E5M2)
        restored = dequantize_fp8(fake, torch.float16)
    assert (fake.codes.shape, fake.codes.dtype) == ((7, 99), E5M2)
    assert (fake.scales.shape, fake.scales.dtype) == ((6,), torch.float8_e8m0fnu)
    assert (restored.shape, restored.dtype, restored.device.type) == (
        (7, 99),
        torch.float16,
        "cuda",
    )
