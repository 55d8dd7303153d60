"""Gradient statistics and scaling: three backends, one meaning."""

import math
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dpmem_kernels import grad_scale_, grad_stats, grad_unscale_
from dpmem_kernels.backend import Backend
from dpmem_kernels.tensor_table import CHUNK, CPU_CHUNK

BACKENDS: tuple[Backend, ...] = ("reference", "cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SIZES = (0, 1, 7, 8, 511, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 24)
# Fixtures here only seed and poison: running them once for all examples changes nothing.
PROPERTY = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def gradients(draw: st.DrawFn) -> list[Tensor]:
    """Mixed lists: every size class, first elements that are not aligned, special values."""
    tensors = []
    for _ in range(draw(st.integers(1, 5))):
        size, dtype = draw(st.sampled_from(SIZES)), draw(st.sampled_from(DTYPES))
        shift = draw(st.sampled_from((0, 0, 1)))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        storage = torch.randn(size + shift, generator=generator) * draw(
            st.sampled_from((1.0, 1e-6, 1e-41, 3e4, 1e37))
        )
        tensor = storage.to(dtype)[shift:]
        if size and draw(st.integers(0, 3)) == 0:
            place = draw(st.sampled_from((0, size // 2, size - 1)))
            tensor[place] = draw(st.sampled_from((math.nan, math.inf, -math.inf, -0.0)))
        tensors.append(tensor)
    return tensors


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Clones at the same place relative to 16-byte alignment."""
    result = []
    for tensor in tensors:
        shift = tensor.storage_offset()
        result.append(torch.zeros(tensor.numel() + shift, dtype=tensor.dtype)[shift:])
        result[-1].copy_(tensor)
    return result


def assert_same_values(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, except that any NaN equals any NaN."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    as_bits = INTEGERS[expected.dtype]
    assert torch.equal(actual.view(as_bits)[~nan], expected.view(as_bits)[~nan])


def assert_stats(stats: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    """Against exact sums of what was written, within the bound that grad_scale.py states."""
    sum_of_squares, found_inf = stats
    assert sum_of_squares.dtype == found_inf.dtype == torch.float32
    assert sum_of_squares.shape == found_inf.shape == ()
    values = [value for tensor in written for value in tensor.double().tolist()]
    if not all(map(math.isfinite, values)):
        assert found_inf == 1
        assert not sum_of_squares.isfinite()
        return
    assert found_inf == 0
    exact = math.fsum(value * value for value in values)
    largest = torch.finfo(torch.float32).max
    slack = exact * (CHUNK + 2) * 2**-24 + (len(values) + 1) * 2**-150
    if exact + slack > largest:
        assert sum_of_squares >= exact - slack
    else:
        assert abs(float(sum_of_squares) - exact) <= slack


@pytest.mark.parametrize("backend", BACKENDS)
@PROPERTY
@given(tensors=gradients())
def test_stats_read_and_only_read(backend: Backend, tensors: list[Tensor]) -> None:
    before = copies(tensors)
    assert_stats(grad_stats(tensors, backend=backend), before)
    for tensor, expected in zip(tensors, before, strict=True):
        assert_same_values(tensor, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@PROPERTY
@given(tensors=gradients(), factor=st.sampled_from((0.3, 1.0, 2.0**-16, 65536.0, 0.0, math.inf)))
def test_unscale_multiplies_once_and_measures_the_result(
    backend: Backend, tensors: list[Tensor], factor: float
) -> None:
    scale = torch.tensor(factor)
    expected = [(tensor.float() * scale).to(tensor.dtype) for tensor in tensors]
    stats = grad_unscale_(tensors, scale, backend=backend)
    for tensor, value in zip(tensors, expected, strict=True):
        assert_same_values(tensor, value)
    assert_stats(stats, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@PROPERTY
@given(tensors=gradients(), factor=st.sampled_from((0.7, 2.0, 0.9999999)))
def test_scale_equals_the_reference(backend: Backend, tensors: list[Tensor], factor: float) -> None:
    expected = [(tensor.float() * factor).to(tensor.dtype) for tensor in tensors]
    grad_scale_(tensors, torch.tensor([factor]), backend=backend)
    for tensor, value in zip(tensors, expected, strict=True):
        assert_same_values(tensor, value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_of_one_leaves_every_bit_pattern(backend: Backend, dtype: torch.dtype) -> None:
    """All 16-bit patterns (in fp32: all high halves, with a NaN payload in the low one)."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    if dtype == torch.float32:
        bits = (patterns << 16) | 0x1234
    else:
        bits = patterns.to(torch.int16)
    tensor = bits.clone().view(dtype)
    grad_scale_([tensor], torch.tensor(1.0), backend=backend)
    assert torch.equal(tensor.view(bits.dtype), bits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.3, 3.0])
def test_every_16_bit_pattern_is_scaled_exactly(
    backend: Backend, dtype: torch.dtype, factor: float
) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    tensor = values.clone()
    grad_unscale_([tensor], torch.tensor(factor), backend=backend)
    assert_same_values(tensor, (values.float() * factor).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", [0, 1, CHUNK - 1, CHUNK, CPU_CHUNK - 1, CPU_CHUNK, -1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_anywhere_raises_the_flag(
    backend: Backend, dtype: torch.dtype, position: int, bad: float
) -> None:
    tensor = torch.ones(CPU_CHUNK + 9, dtype=dtype)
    tensor[position] = bad
    assert grad_stats([torch.ones(3), tensor], backend=backend).found_inf == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_that_overflows_is_not_a_bad_value(backend: Backend) -> None:
    stats = grad_stats([torch.full((10,), 1e30)], backend=backend)
    assert stats.sum_of_squares == math.inf
    assert stats.found_inf == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_that_overflows_is_a_bad_value(backend: Backend) -> None:
    tensor = torch.tensor([60000.0], dtype=torch.float16)
    assert grad_unscale_([tensor], torch.tensor(2.0), backend=backend).found_inf == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_module_example(backend: Backend) -> None:
    tensor = torch.tensor([6.0, 8.0])
    stats = grad_unscale_([tensor], torch.tensor(0.5), backend=backend)
    assert tensor.tolist() == [3.0, 4.0]
    assert (stats.sum_of_squares, stats.found_inf) == (25.0, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_without_elements(backend: Backend) -> None:
    nothing = grad_stats([torch.empty(0), torch.empty(0, dtype=torch.float16)], backend=backend)
    assert (nothing.sum_of_squares, nothing.found_inf) == (0.0, 0.0)
    assert grad_unscale_([], torch.tensor(2.0), backend=backend).sum_of_squares == 0
    grad_scale_([], torch.tensor(2.0), backend=backend)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 31, 127, CPU_CHUNK - 3, CPU_CHUNK + 3])
def test_every_element_is_counted_once(size: int) -> None:
    """Distinct powers of two would show an element that the four streams skip or read twice."""
    values = 2.0 ** (torch.arange(size) % 10).float()
    exact = values.double().square().sum()
    assert grad_stats([values], backend="cpu").sum_of_squares == exact.float()


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tiny_tensors(backend: Backend) -> None:
    """Fewer in the interpreter, which takes milliseconds for each."""
    tensors = [
        torch.full((1 + i % 3,), 2.0, dtype=DTYPES[i % 3])
        for i in range(2000 if backend != "triton" else 200)
    ]
    elements = sum(tensor.numel() for tensor in tensors)
    assert grad_stats(tensors, backend=backend).sum_of_squares == 4 * elements


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    """In a fresh process, where two threads are at hand whatever this one was given."""
    program = """
import torch
from dpmem_kernels import grad_stats, grad_unscale_
tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3, 70001, 999999)]
seen = set()
for threads in (1, 2, 1, 2):
    torch.set_num_threads(threads)
    copies = [tensor.clone() for tensor in tensors]
    stats = grad_stats(copies, backend="cpu"), grad_unscale_(copies, torch.tensor(0.3))
    seen.add(tuple(float(s.sum_of_squares).hex() for s in stats))
    assert all(torch.equal(c, t * 0.3) for c, t in zip(copies, tensors))
assert len(seen) == 1, seen
"""
    environment = os.environ | {"NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork() does not exist here")
def test_a_forked_child_goes_on_without_threads() -> None:
    program = """
import os, torch
from dpmem_kernels import grad_stats, tensor_table_cpu
torch.set_num_threads(2)
tensors = [torch.ones(100000)]
grad_stats(tensors, backend="cpu")
child = os.fork()
if child == 0:
    tensor_table_cpu._walk_parallel = None
    os._exit(0 if grad_stats(tensors, backend="cpu").sum_of_squares == 100000 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    environment = os.environ | {"NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_are_well_formed(backend: Backend) -> None:
    tensors = [torch.randn(5), torch.randn(9).bfloat16()]
    scale = torch.tensor(0.5)
    torch.library.opcheck(torch.ops.dpmem.grad_stats.default, (tensors, backend))
    torch.library.opcheck(torch.ops.dpmem.grad_unscale_.default, (tensors, scale, backend))
    torch.library.opcheck(torch.ops.dpmem.grad_scale_.default, (tensors, scale, backend))


def test_what_is_written_counts_as_modified() -> None:
    """Autograd must notice when a tensor that it saved is overwritten."""
    tensor, scale = torch.ones(2), torch.tensor(2.0)
    grad_stats([tensor])
    assert tensor._version == 0
    grad_unscale_([tensor], scale)
    grad_scale_([tensor], scale)
    assert (tensor._version, scale._version) == (2, 0)


def test_fake_tensors_on_a_gpu_that_is_not_here() -> None:
    with FakeTensorMode():
        tensors = [torch.empty(5, device="cuda"), torch.empty(3, device="cuda")]
        stats = grad_unscale_(tensors, torch.empty((), device="cuda"))
    assert [(s.device.type, s.dtype, s.shape) for s in stats] == [("cuda", torch.float32, ())] * 2


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.zeros(2, dtype=torch.float64), TypeError, r"tensors\[1\] is torch.float64"),
        (torch.zeros(2, 2), ValueError, "1-D and contiguous"),
        (torch.zeros(4)[::2], ValueError, "1-D and contiguous"),
        (torch.zeros(2, device="meta"), ValueError, "on meta"),
    ],
)
def test_tensors_not_served_are_refused(
    tensor: Tensor, error: type[Exception], message: str
) -> None:
    from dpmem_kernels.tensor_table import check_tensors

    with pytest.raises(error, match=message):
        check_tensors([torch.zeros(1), tensor], torch.device("cpu"))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        grad_stats([])
    with pytest.raises(TypeError, match="inv_scale must be float32"):
        grad_unscale_([torch.zeros(1)], torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="scale must hold one element"):
        grad_scale_([torch.zeros(1)], torch.ones(2))
