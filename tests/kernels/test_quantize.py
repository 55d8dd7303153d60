"""quantize and dequantize: one format on every backend, unbiased, with a stated error.

Integers are compared bit for bit, and tolerances are derived where they are used. What the noise
does is tested in test_noise.py.
"""

import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpmem_kernels.backend import Backend
from dpmem_kernels.philox import philox_ref
from dpmem_kernels.quantize import (
    BITS,
    DTYPES,
    GROUP_SIZES,
    NAN_META,
    Noise,
    Quantized,
    dequantize,
    fma_ref,
    quantize,
    quantize_and_tell,
)
from dpmem_kernels.quantize_triton import launch_dequantize, launch_quantize

BACKENDS: tuple[Backend, ...] = ("reference", "cpu", "triton")
NOISE = Noise(seed=0x9234567812345678, stream=3, step=0xF0000001, rank=1)
# Every bit width and every dtype once.
FORMATS = list(zip(BITS, DTYPES, strict=True))

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_bits = pytest.mark.parametrize("bits", BITS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_group_size = pytest.mark.parametrize("group_size", GROUP_SIZES)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal values, and NaN in the same places."""
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and bool((a == b)[~a.isnan()].all())
    )


def _same_integers(a: Quantized, b: Quantized) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.meta, b.meta)


def _scale_and_zero(meta: Tensor, numel: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Of each element, in float64."""
    group = torch.arange(numel) // group_size
    scale = (meta & -0x10000).view(torch.float32).double()
    zero = (meta << 16).view(torch.float32).double()
    return scale[group], zero[group]


def _agree_everywhere(x: Tensor, bits: int, group_size: int) -> None:
    expected = quantize(x, bits, noise=NOISE, group_size=group_size, backend="reference")
    back = {
        dtype: dequantize(
            expected, x.numel(), dtype, bits, group_size=group_size, backend="reference"
        )
        for dtype in DTYPES
    }
    for backend in ("cpu", "triton"):
        found = quantize(x, bits, noise=NOISE, group_size=group_size, backend=backend)
        assert _same_integers(found, expected), backend
        for dtype, values in back.items():
            restored = dequantize(
                expected, x.numel(), dtype, bits, group_size=group_size, backend=backend
            )
            assert _same(restored, values), (backend, dtype)


@settings(max_examples=12, deadline=None)
@given(
    numel=st.integers(1, 400),
    offset=st.integers(0, 9),
    format=st.tuples(st.sampled_from(DTYPES), st.sampled_from(BITS), st.sampled_from(GROUP_SIZES)),
    exponent=st.integers(-40, 15),
    shift=st.sampled_from([0.0, 1.0, -300.0]),
    seed=st.integers(0, 2**20),
)
def test_every_backend_gives_the_same_integers_and_values(
    numel: int, offset: int, format: Any, exponent: int, shift: float, seed: int
) -> None:
    dtype, bits, group_size = format
    generator = torch.Generator().manual_seed(seed)
    storage = torch.randn(numel + offset, generator=generator) * 2.0**exponent + shift
    _agree_everywhere(storage.to(dtype)[offset:], bits, group_size)


@pytest.mark.parametrize(("bits", "dtype"), FORMATS, ids=str)
def test_backends_agree_over_several_programs(bits: int, dtype: torch.dtype) -> None:
    _agree_everywhere(torch.randn(2 * 4096 + 333).to(dtype), bits, 128)


@each_bits
@pytest.mark.parametrize(("block", "group_size"), [(512, 256), (1024, 64), (8192, 128)])
def test_block_shape_changes_nothing(bits: int, block: int, group_size: int) -> None:
    x = torch.randn(2500).bfloat16()
    expected = quantize(x, bits, noise=NOISE, group_size=group_size, backend="reference")
    found = Quantized(*map(torch.empty_like, expected))
    launch_quantize(x, found, bits, group_size, NOISE.words, block)
    assert _same_integers(found, expected)
    out = torch.empty_like(x)
    launch_dequantize(expected, out, bits, group_size, block)
    values = dequantize(expected, 2500, x.dtype, bits, group_size=group_size, backend="reference")
    assert _same(out, values)


@each_bits
@each_group_size
def test_codes_and_noise_lie_where_the_format_says(bits: int, group_size: int) -> None:
    """Element by element from the module's docstring, in exact arithmetic."""
    numel, words = 2 * group_size, group_size // 8
    x = torch.randn(numel)
    codes, meta = quantize(x, bits, noise=NOISE, group_size=group_size, backend="reference")
    packed = int.from_bytes(bytes(codes.tolist()), "little")
    scales, zeros = _scale_and_zero(meta, numel, group_size)
    restored = dequantize(Quantized(codes, meta), numel, torch.float32, bits, group_size=group_size)
    checked = 0
    for element in range(numel):
        group, place = divmod(element, group_size)
        k, place = divmod(place, group_size // 4)
        j, h = divmod(place, 2)
        if bits == 8:
            position = 32 * (group * 2 * words + words * (k // 2) + j) + 8 * (2 * h + k % 2)
        elif bits == 4:
            position = 32 * (group * words + j) + 16 * h + 4 * k
        else:
            position = 16 * (group * words + j) + 8 * h + 2 * k
        code = packed >> position & ((1 << bits) - 1)

        key_low, key_high, *rest = NOISE.words
        block = philox_ref((torch.tensor([group * words + j]), *rest), (key_low, key_high))
        random = int(block[k])
        noise = Fraction(random >> 16 if h else random & 0xFFFF, 1 << 16)
        if bits == 8:
            noise = Fraction(random >> 17 if h else random & 0x7FFF, 1 << 15)
        scale, zero = Fraction(scales[element].item()), Fraction(zeros[element].item())
        position_in_steps = (Fraction(x[element].item()) - zero) / scale + noise
        nearest = round(position_in_steps)
        # The sum is rounded once to a multiple of 2^-16 (2^-15): only there may the floor differ.
        if abs(position_in_steps - nearest) > Fraction(1, 1 << 14):
            assert code == position_in_steps // 1
            checked += 1
        assert restored[element].item() == float(np.float32(float(code * scale + zero)))
    assert checked > 0.99 * numel


def test_the_worked_example() -> None:
    x = torch.arange(64).float()
    draws = []
    for step in range(64):
        noise = Noise(seed=1, stream=0, step=step, rank=0)
        quantized = quantize(x, 4, noise=noise, group_size=64)
        assert quantized.meta.tolist() == [0x40870000]
        draws.append(dequantize(quantized, 64, torch.float32, 4, group_size=64)[10].item())
    assert set(draws) == {8.4375, 12.65625}


@each_dtype
@each_bits
@each_group_size
def test_error_is_within_one_scale(dtype: torch.dtype, bits: int, group_size: int) -> None:
    x = (torch.randn(1000) * torch.logspace(-6, 2, 1000)).to(dtype)
    quantized = quantize(x, bits, noise=NOISE, group_size=group_size)
    scale, _ = _scale_and_zero(quantized.meta, 1000, group_size)
    restored = dequantize(quantized, 1000, dtype, bits, group_size=group_size)
    finfo = torch.finfo(dtype)
    output_rounding = restored.double().abs() * finfo.eps / 2 + finfo.smallest_normal * finfo.eps
    error = (restored.double() - x.double()).abs()
    assert bool((error <= scale * (1 + 2**-15) + output_rounding).all())
    # And the scale itself is no wider than the format promises.
    padded = torch.cat((x.double(), x[-1:].double().expand(-1000 % group_size)))
    groups = padded.view(-1, group_size)
    low, high = groups.amin(1), groups.amax(1)
    widest = (high - low + low.abs() * 2**-7) / ((1 << bits) - 1) * (1 + 2**-7 + 2**-20)
    assert bool((scale[::group_size] <= widest + 2**-100).all())


@each_backend
@pytest.mark.parametrize(("bits", "dtype"), FORMATS, ids=str)
def test_a_group_that_is_not_finite_comes_back_as_nan(
    backend: Backend, bits: int, dtype: torch.dtype
) -> None:
    x = torch.randn(6, 64).to(dtype)
    for group, bad in ((1, float("nan")), (3, float("inf")), (4, -float("inf"))):
        x[group, 12] = bad
    quantized = quantize(x, bits, noise=NOISE, group_size=64, backend=backend)
    assert quantized.meta[[1, 3, 4]].tolist() == [NAN_META] * 3
    assert not quantized.codes.view(6, -1)[[1, 3, 4]].any()
    restored = dequantize(quantized, 384, dtype, bits, group_size=64, backend=backend).view(6, 64)
    assert restored[[1, 3, 4]].isnan().all()
    assert restored[[0, 2, 5]].isfinite().all()


@pytest.mark.parametrize("pattern", [-1, 0x7FFFFFFF, 0x7F800001, -0x7FFFFF, -0x400000])
def test_every_nan_is_a_nan_whatever_its_bits(pattern: int) -> None:
    x = torch.zeros(64)
    x.view(torch.int32)[5] = pattern
    assert x[5].isnan()
    for backend in BACKENDS:
        quantized = quantize(x, 4, noise=NOISE, group_size=64, backend=backend)
        assert quantized.meta.tolist() == [NAN_META], backend


def test_special_groups_are_the_same_everywhere() -> None:
    largest = torch.finfo(torch.float32).max
    rows = torch.zeros(9, 64)
    rows[0] = -0.0
    rows[1, ::2] = -0.0
    rows[2] = 1e-42
    rows[3] = -1e-42
    rows[3, 7] = 1e-40
    rows[4] = largest
    rows[5] = -largest
    rows[6, 3], rows[6, 4] = largest, -largest
    rows[7] = float("inf")
    rows[8] = 2.0**-101 * torch.arange(64)
    for bits, dtype in FORMATS:
        _agree_everywhere(rows.to(dtype).view(-1), bits, 64)

    restored = dequantize(
        quantize(rows.view(-1), 2, noise=NOISE, group_size=64), 576, torch.float32, 2, group_size=64
    ).view(9, 64)
    assert restored[:4].abs().max() <= 2**-100
    assert not restored[0].signbit().any()
    # bf16 cannot hold a zero point below -largest, nor float32 the range from there to largest.
    assert restored[5:8].isnan().all()
    assert (restored[8] - rows[8]).abs().max() <= 2.0**-94


@each_backend
@each_bits
def test_a_constant_bfloat16_group_is_exact(backend: Backend, bits: int) -> None:
    x = torch.tensor([0.0, 1.5, -3.25, 1e-38, 3e38]).bfloat16().repeat_interleave(64)
    quantized = quantize(x, bits, noise=NOISE, group_size=64, backend=backend)
    restored = dequantize(quantized, 320, x.dtype, bits, group_size=64, backend=backend)
    assert torch.equal(restored, x)


@each_backend
@each_bits
@each_dtype
def test_a_tensor_without_elements(backend: Backend, bits: int, dtype: torch.dtype) -> None:
    quantized = quantize(torch.zeros(0, 3, dtype=dtype), bits, noise=NOISE, backend=backend)
    assert (quantized.codes.shape, quantized.meta.shape) == ((0,), (0,))
    restored = dequantize(quantized, 0, dtype, bits, backend=backend)
    assert (restored.shape, restored.dtype) == ((0,), dtype)


def test_torch_threads_change_nothing() -> None:
    x = torch.randn(100_000)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        quantized = quantize(x, 4, noise=NOISE, backend="cpu")
        found.append((quantized, dequantize(quantized, x.numel(), x.dtype, 4, backend="cpu")))
    torch.set_num_threads(before)
    assert _same_integers(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_fma_rounds_once() -> None:
    """Against exact rationals, on operands chosen to make the sum almost a tie."""
    generator = np.random.default_rng(3)
    x, y = (np.float32(generator.uniform(1, 2, 2000)) for _ in range(2))
    near_tie = np.float32(
        generator.integers(1 << 23, 1 << 24, 2000) * 2.0 ** generator.integers(-45, 3, 2000)
    )
    z = near_tie * np.where(generator.random(2000) < 0.5, -1, 1).astype(np.float32)
    # Half a unit of float32 above z, and 2^-57 or 2^-70 more or less, which float64 loses: to
    # round twice is to take these for ties. 1 is even, 1 + 2^-23 odd.
    half = 2.0**-24
    x[:4], y[:4], z[:4] = (
        (half * (1 + 2**-11), half * (1 + 2**-23), -half * (1 + 2**-11), -half * (1 + 2**-23)),
        (1 - 2**-11 + 2**-22, 1 - 2**-23, 1 - 2**-11 + 2**-22, 1 - 2**-23),
        (1, 1 + 2**-23, -1, -1 - 2**-23),
    )
    found = fma_ref(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(z)).numpy()
    for a, b, c, result in zip(x, y, z, found, strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        error = abs(Fraction(float(result)) - exact)
        for direction in (-np.inf, np.inf):
            other = np.nextafter(result, np.float32(direction))
            distance = abs(Fraction(float(other)) - exact)
            even = int(result.view(np.int32)) % 2 == 0
            assert error < distance or (error == distance and even)


def test_a_tensor_that_requires_grad_is_compressed_like_any_other() -> None:
    x = torch.randn(200)
    expected = quantize(x, 4, noise=NOISE)
    for backend in BACKENDS:
        found = quantize(torch.nn.Parameter(x), 4, noise=NOISE, backend=backend)
        assert _same_integers(found, expected)
        assert not found.codes.requires_grad


def test_a_lazily_negated_tensor_is_compressed_as_what_it_stands_for() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    negated = torch._neg_view(x)
    assert negated.is_neg()
    assert _same_integers(
        quantize(negated, 4, noise=NOISE, backend="cpu"),
        quantize(-x, 4, noise=NOISE, backend="cpu"),
    )


@pytest.mark.parametrize("bad", [[], [0], [3], [0, 7]], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_it_is_told_whether_each_group_had_a_scale(backend: Backend, bad: list[int]) -> None:
    x = torch.randn(4 * 64 * 512, generator=torch.Generator().manual_seed(0))
    x[[group * 64 for group in bad]] = float("nan")
    for part in (x, x[: 5 * 64 * 2 - 1]):
        stored, told = quantize_and_tell(part, 4, noise=NOISE, group_size=64, backend=backend)
        assert told is bool((stored.meta != NAN_META).all())
    metadata_alone = quantize_and_tell(x, 4, noise=NOISE, group_size=64, backend="triton")[1]
    assert metadata_alone is None


NO_MEMORY = """
import torch
from dpmem_kernels import Noise, Quantized, dequantize, quantize

noise = Noise(seed=1, stream=2, step=3, rank=4)
x = torch.zeros(256)
codes, meta = quantize(x, 4, noise=noise)
freed = torch.zeros(256)
freed.untyped_storage().resize_(0)
zeros = torch._efficientzerotensor
for call in (
    lambda: quantize(freed, 4, noise=noise),
    lambda: quantize(zeros((256,)), 4, noise=noise),
    lambda: dequantize(Quantized(zeros(codes.shape, dtype=torch.uint8), meta), 256, x.dtype, 4),
    lambda: dequantize(Quantized(codes, meta.to("meta")), 256, x.dtype, 4),
):
    try:
        call()
    except ValueError as error:
        print(str(error).partition(";")[0])
"""


def test_tensors_without_memory_are_refused() -> None:
    """Loops know addresses alone, and none of these is one. What fails here ends the process."""
    done = subprocess.run([sys.executable, "-c", NO_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *["a tensor of 256 torch.float32 must have memory of its own"] * 2,
        "a tensor of 128 torch.uint8 must have memory of its own",
        "codes and metadata must be on one device",
    ]


def test_mistakes_are_refused() -> None:
    x = torch.zeros(4, 64)
    with pytest.raises(ValueError, match=r"bits must be one of \(8, 4, 2\); received 3"):
        quantize(x, 3, noise=NOISE)
    with pytest.raises(ValueError, match=r"group_size must be one of .* received 32"):
        quantize(x, 4, noise=NOISE, group_size=32)
    with pytest.raises(TypeError, match=r"received torch\.int64"):
        quantize(x.long(), 4, noise=NOISE)
    with pytest.raises(ValueError, match="x must be contiguous; received strides"):
        quantize(x.t(), 4, noise=NOISE)
    with pytest.raises(ValueError, match=r"at most 2\^35 elements"):
        quantize(torch.empty(2**35 + 1, device="meta"), 4, noise=NOISE)
    with pytest.raises(ValueError, match=r"Noise\.step must be in \[0, 2\^32\); received -1"):
        Noise(seed=0, stream=0, step=-1, rank=0)
    with pytest.raises(ValueError, match=r"Noise\.seed must be in \[0, 2\^64\)"):
        Noise(seed=1 << 64, stream=0, step=0, rank=0)
    quantized = quantize(x, 4, noise=NOISE)
    for numel, bits, dtype in ((255, 8, torch.float32), (384, 4, torch.float32)):
        with pytest.raises(ValueError, match="pass the numel, bits and group_size"):
            dequantize(quantized, numel, dtype, bits)
    with pytest.raises(TypeError, match=r"received torch\.float64"):
        dequantize(quantized, 256, torch.float64, 4)
