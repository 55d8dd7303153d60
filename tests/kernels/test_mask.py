"""Packed masks: lossless, with the same bytes from every backend.

And what both formats' operators, quantize's too, owe to those who watch operators go by: opcheck,
fake tensors, the compiler, dispatch modes and subclasses.
"""

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dpmem_kernels.backend import Backend
from dpmem_kernels.mask import pack_mask, pack_positive, unpack_mask
from dpmem_kernels.mask_triton import launch_pack_mask, launch_pack_positive, launch_unpack_mask
from dpmem_kernels.quantize import BITS, DTYPES, GROUP_SIZES, Noise, dequantize, quantize

BACKENDS: tuple[Backend, ...] = ("reference", "cpu", "triton")
NOISE = Noise(seed=1, stream=2, step=3, rank=4)
SIZES = (0, 1, 7, 127, 128, 129, 1023, 1024, 1025, 16 * 1024, 16 * 1024 + 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("numel", SIZES)
def test_round_trip_is_lossless_and_packed_bytes_agree(backend: Backend, numel: int) -> None:
    mask = torch.rand(numel) < 0.4
    bits = pack_mask(mask, backend=backend)
    assert bits.numel() == -(-numel // 1024) * 128
    assert torch.equal(bits, pack_mask(mask, backend="reference"))
    assert torch.equal(unpack_mask(bits, numel, backend=backend), mask)


@settings(max_examples=15, deadline=None)
@given(numel=st.integers(1, 3000), offset=st.integers(0, 17), seed=st.integers(0, 99))
def test_any_size_at_any_address(numel: int, offset: int, seed: int) -> None:
    storage = torch.rand(numel + offset, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = storage[offset:]
    expected = pack_mask(mask, backend="reference")
    for backend in ("cpu", "triton"):
        assert torch.equal(pack_mask(mask, backend=backend), expected)
        assert torch.equal(unpack_mask(expected, numel, backend=backend), mask)


def _signed(numel: int, dtype: torch.dtype) -> Tensor:
    """Of either sign: normal and denormal numbers, zeros, infinities and NaNs."""
    x = torch.randn(numel).to(dtype)
    special = torch.tensor([0.0, float("inf"), float("nan")]).to(dtype)
    tiny = torch.finfo(dtype).tiny / 4
    special = torch.cat((special, torch.full((1,), tiny, dtype=dtype)))
    special = torch.cat((special, -special))
    x[:: max(1, numel // 64)] = special.repeat(numel // 8 + 1)[: len(x[:: max(1, numel // 64)])]
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_relu_passes_gradients_where_pack_positive_says(
    backend: Backend, dtype: torch.dtype
) -> None:
    for numel in SIZES:
        x = _signed(numel, dtype).requires_grad_()
        torch.relu(x).backward(torch.ones_like(x))
        assert x.grad is not None
        for saved in (x, torch.relu(x)):
            bits = pack_positive(saved, backend=backend)
            assert torch.equal(bits, pack_mask(x.grad == 1, backend="reference"))
    assert pack_positive(-torch.ones(0, dtype=dtype), backend=backend).shape == (0,)


@settings(max_examples=15, deadline=None)
@given(numel=st.integers(1, 3000), offset=st.integers(0, 17), dtype=st.sampled_from(DTYPES))
def test_floats_of_any_size_at_any_address(numel: int, offset: int, dtype: torch.dtype) -> None:
    x = _signed(numel + offset, dtype)[offset:]
    expected = pack_positive(x, backend="reference")
    for backend in ("cpu", "triton"):
        assert torch.equal(pack_positive(x, backend=backend), expected)


def test_bits_follow_the_documented_layout() -> None:
    mask = torch.zeros(130, dtype=torch.bool)
    mask[[0, 1, 129]] = True
    assert pack_mask(mask, backend="reference").tolist() == [0b01, 0b11] + [0] * 126
    x = torch.tensor([2.0, -0.0, float("nan"), -float("inf")])
    assert pack_positive(x, backend="reference").tolist() == [1, 0, 1, 0] + [0] * 124


@pytest.mark.parametrize("rows", [1, 4, 32])
def test_block_shape_changes_nothing(rows: int) -> None:
    mask = torch.rand(9 * 1024 + 77) < 0.5
    expected = pack_mask(mask, backend="reference")
    bits, back = torch.empty_like(expected), torch.empty_like(mask)
    launch_pack_mask(mask, bits, rows)
    launch_unpack_mask(bits, back, rows)
    assert torch.equal(bits, expected)
    assert torch.equal(back, mask)
    x = _signed(9 * 1024 + 77, torch.float16)
    launch_pack_positive(x, bits, rows)
    assert torch.equal(bits, pack_positive(x, backend="reference"))


def test_torch_threads_change_nothing() -> None:
    x, before = _signed(300_000, torch.bfloat16), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        bits = pack_positive(x, backend="cpu")
        assert torch.equal(bits, pack_positive(x, backend="reference"))
        mask = unpack_mask(bits, x.numel(), backend="cpu")
        assert torch.equal(mask, ~(x <= 0))
        assert torch.equal(pack_mask(mask, backend="cpu"), bits)
    finally:
        torch.set_num_threads(before)


def test_mistakes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"float16; received torch\.int8"):
        pack_positive(torch.zeros(4, dtype=torch.int8))
    with pytest.raises(ValueError, match="x must be contiguous"):
        pack_positive(torch.zeros(4, 4).t())
    with pytest.raises(TypeError, match=r"must be bool; received torch\.uint8"):
        pack_mask(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="must be contiguous"):
        pack_mask(torch.zeros(4, 4, dtype=torch.bool).t())
    with pytest.raises(ValueError, match="1025 bools are packed in 256"):
        unpack_mask(torch.zeros(128, dtype=torch.uint8), 1025)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_operators_pass_opcheck(backend: Backend) -> None:
    mask = torch.rand(3, 500) < 0.5
    torch.library.opcheck(torch.ops.dpmem.pack_mask.default, (mask, backend))
    torch.library.opcheck(torch.ops.dpmem.pack_positive.default, (torch.randn(3, 50), backend))
    torch.library.opcheck(
        torch.ops.dpmem.unpack_mask.default, (pack_mask(mask), mask.numel(), backend)
    )


@pytest.mark.parametrize(("backend", "bits"), list(zip(BACKENDS, BITS, strict=True)))
def test_quantize_operators_pass_opcheck(backend: Backend, bits: int) -> None:
    x = torch.randn(3, 50, dtype=torch.bfloat16)
    quantized = quantize(x, bits, noise=NOISE)
    torch.library.opcheck(
        torch.ops.dpmem.quantize.default, (x, bits, 128, list(NOISE.words), backend)
    )
    torch.library.opcheck(
        torch.ops.dpmem.dequantize.default, (*quantized, 150, x.dtype, bits, 128, backend)
    )


def test_fake_masks_have_the_real_shapes() -> None:
    with FakeTensorMode():
        bits = pack_mask(torch.empty(1500, dtype=torch.bool, device="cuda"))
        mask = unpack_mask(bits, 1500)
    assert (bits.shape, bits.dtype, bits.device.type) == ((256,), torch.uint8, "cuda")
    assert (mask.shape, mask.dtype, mask.device.type) == ((1500,), torch.bool, "cuda")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_fake_quantized_tensors_have_the_real_shapes(bits: int, group_size: int) -> None:
    real = quantize(torch.zeros(7, 99), bits, noise=NOISE, group_size=group_size)
    with FakeTensorMode():
        x = torch.empty(7, 99, device="cuda")
        fake = quantize(x, bits, noise=NOISE, group_size=group_size)
        restored = dequantize(fake, 693, torch.bfloat16, bits, group_size=group_size)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, b.device.type) == (b.shape, b.dtype, "cuda")
    assert (restored.shape, restored.dtype) == ((693,), torch.bfloat16)


def _use_every_operator(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    quantized, bits = quantize(x, 4, noise=NOISE), pack_mask(mask)
    return dequantize(quantized, 300, torch.float32, 4), unpack_mask(bits, 300)


X, MASK = torch.linspace(-1, 1, 300), torch.arange(300) % 3 == 0
OPERATORS = [
    torch.ops.dpmem.quantize.default,
    torch.ops.dpmem.pack_mask.default,
    torch.ops.dpmem.dequantize.default,
    torch.ops.dpmem.unpack_mask.default,
]


def test_a_compiled_graph_holds_the_operators() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    for backend in (record, "aot_eager"):
        compiled = torch.compile(_use_every_operator, fullgraph=True, backend=backend)
        for found, expected in zip(compiled(X, MASK), _use_every_operator(X, MASK), strict=True):
            assert torch.equal(found, expected)
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    packets = [operator.overloadpacket for operator in OPERATORS]
    assert [target for target in called if target in packets] == packets


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        self.operators.append(operator)
        return operator(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_each_call_as_one_operator() -> None:
    with _Recorder() as recorder:
        _use_every_operator(X, MASK)
    assert recorder.operators == OPERATORS


def test_a_dispatch_mode_sees_its_thread_whatever_others_do() -> None:
    entered, left, recorder = threading.Event(), threading.Event(), _Recorder()

    def record() -> None:
        with recorder:
            entered.set()
            assert left.wait(60)
            _use_every_operator(X, MASK)

    thread = threading.Thread(target=record)
    with _Recorder():
        thread.start()
        assert entered.wait(60)
    left.set()
    thread.join()
    assert recorder.operators == OPERATORS


class _Wrapper(Tensor):
    """A subclass that holds a tensor and notes the operators it meets."""

    operators: ClassVar[list[Any]] = []

    @staticmethod
    def __new__(cls: type, inner: Tensor) -> "_Wrapper":
        wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        cls.operators.append(operator)
        return operator(*(a.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))


def test_a_tensor_subclass_meets_one_operator() -> None:
    _Wrapper.operators.clear()
    found = _use_every_operator(_Wrapper(X), _Wrapper(MASK))
    # What the first two return is plain again.
    assert _Wrapper.operators == OPERATORS[:2]
    for a, b in zip(found, _use_every_operator(X, MASK), strict=True):
        assert torch.equal(a, b)
