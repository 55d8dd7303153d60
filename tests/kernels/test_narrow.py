"""narrow and widen: lossless within the stated range, loud outside it, alike on every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dpmem_kernels.backend import Backend
from dpmem_kernels.narrow import INDEX_DTYPES, narrow, widen
from dpmem_kernels.narrow_triton import launch_narrow, launch_widen

BACKENDS: tuple[Backend, ...] = ("reference", "cpu", "triton")
RANGES = ((0, 1), (0, 256), (-100, 10), (0, 257), (-3, 50257), (0, 65536), (7, 65543))

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_range = pytest.mark.parametrize(("low", "high"), RANGES)
each_dtype = pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)


def _indices(low: int, high: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Both ends of the range, and random values between them."""
    index = torch.randint(low, high, (numel,), dtype=dtype)
    index[:1], index[-1:] = low, high - 1
    return index


@each_backend
@each_range
@each_dtype
def test_round_trip_is_lossless(backend: Backend, low: int, high: int, dtype: torch.dtype) -> None:
    for numel in (0, 1, 5, 2048, 2 * 2048 + 333):
        index = _indices(low, high, numel, dtype)
        codes = narrow(index, high, low=low, backend=backend)
        assert codes.dtype == (torch.uint8 if high - low <= 256 else torch.int16)
        assert torch.equal(codes, narrow(index, high, low=low, backend="reference"))
        assert torch.equal(widen(codes, dtype, low=low, backend=backend), index)


def test_the_worked_example_and_sixteen_bits() -> None:
    labels = torch.tensor([[3], [-100], [9]])
    codes = narrow(labels, 10, low=-100, backend="reference")
    assert (codes.shape, codes.flatten().tolist()) == ((3, 1), [103, 0, 109])
    codes = narrow(torch.tensor([0, 32767, 32768, 65535]), 65536, backend="reference")
    assert codes.tolist() == [0, 32767, -32768, -1]


@settings(max_examples=15, deadline=None)
@given(numel=st.integers(1, 3000), offset=st.integers(0, 17), seed=st.integers(0, 99))
def test_any_size_at_any_address(numel: int, offset: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for high in (256, 40000):
        index = torch.randint(high, (numel + offset,), generator=generator)[offset:]
        expected = narrow(index, high, backend="reference")
        shifted = torch.cat((expected.new_zeros(offset), expected))[offset:]
        for backend in ("cpu", "triton"):
            assert torch.equal(narrow(index, high, backend=backend), expected)
            assert torch.equal(widen(shifted, backend=backend), index)


@each_backend
@each_dtype
@pytest.mark.parametrize(("low", "high"), [(0, 200), (-100, 156), (0, 1000), (5, 65541)])
def test_a_value_out_of_range_is_never_stored_in_silence(
    backend: Backend, dtype: torch.dtype, low: int, high: int
) -> None:
    limits = torch.iinfo(dtype)
    for wrong in (low - 1, high, high + (1 << 16), low - (1 << 16), limits.min, limits.max):
        for place, numel in ((0, 1), (2047, 5000), (4999, 5000)):
            index = _indices(low, high, numel, dtype)
            index[place] = wrong
            with pytest.raises(ValueError, match=rf"must be in \[{low}, {high}\) throughout"):
                narrow(index, high, low=low, backend=backend)


def test_the_device_is_told_what_the_host_is_not() -> None:
    """On a GPU the launch's answer goes to an assertion on the device, and is read by nobody."""
    codes, index = torch.empty(3000, dtype=torch.uint8), torch.zeros(3000, dtype=torch.int64)
    assert launch_narrow(index, codes, 0, 256)
    index[2999] = 256
    inside = launch_narrow(index, codes, 0, 256)
    assert (inside.shape, inside.dtype, inside.item()) == ((), torch.bool, False)
    with pytest.raises(RuntimeError, match="stated range"):
        torch._assert_async(inside, "stated range")


@pytest.mark.parametrize("block", [256, 1024, 8192])
def test_block_shape_changes_nothing(block: int) -> None:
    index = _indices(0, 50257, 9999, torch.int64)
    expected = narrow(index, 50257, backend="reference")
    codes, back = torch.empty_like(expected), torch.empty_like(index)
    assert launch_narrow(index, codes, 0, 50257, block)
    launch_widen(codes, back, 0, block)
    assert torch.equal(codes, expected)
    assert torch.equal(back, index)


def test_torch_threads_change_nothing() -> None:
    index = _indices(0, 50257, 300_000, torch.int64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        codes = narrow(index, 50257, backend="cpu")
        assert torch.equal(widen(codes, backend="cpu"), index)
        index[200_000] = 50257
        with pytest.raises(ValueError, match="received values from 0 to 50257"):
            narrow(index, 50257, backend="cpu")
    finally:
        torch.set_num_threads(before)


def test_mistakes_are_refused() -> None:
    index = torch.zeros(4, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"received torch\.int16"):
        narrow(index.short(), 10)
    for low, high in ((0, 65537), (3, 3), (5, 2)):
        with pytest.raises(ValueError, match="must hold 1 to 65536 values"):
            narrow(index, high, low=low)
    with pytest.raises(ValueError, match=r"values of torch\.int32"):
        narrow(index.int(), 2**31 + 1, low=2**31)
    with pytest.raises(ValueError, match="index must be contiguous"):
        narrow(index[:, 1:], 10)
    with pytest.raises(TypeError, match="pass what narrow returned"):
        widen(index)
    with pytest.raises(TypeError, match="pass what narrow returned"):
        widen(index.byte(), torch.float32)
    with pytest.raises(ValueError, match="pass the low that narrow had"):
        widen(index.byte(), torch.int32, low=2**31)
    with pytest.raises(ValueError, match="codes must be contiguous"):
        widen(index.byte().t())


@each_backend
def test_operators_pass_opcheck(backend: Backend) -> None:
    index = _indices(0, 300, 500, torch.int64).view(5, 100)
    torch.library.opcheck(torch.ops.dpmem.narrow.default, (index, 0, 300, backend))
    codes = narrow(index, 300)
    torch.library.opcheck(torch.ops.dpmem.widen.default, (codes, 0, torch.int64, backend))


def test_fake_tensors_have_the_real_shapes() -> None:
    with FakeTensorMode():
        codes = narrow(torch.empty(3, 5, dtype=torch.int64, device="cuda"), 1000)
        index = widen(codes, torch.int32)
    assert (codes.shape, codes.dtype, codes.device.type) == ((3, 5), torch.int16, "cuda")
    assert (index.shape, index.dtype, index.device.type) == ((3, 5), torch.int32, "cuda")
