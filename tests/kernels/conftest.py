"""Ground rules for every kernel test.

Kernels run in Triton's interpreter, which reads TRITON_INTERPRET when a kernel is decorated: the
variable is set here, before any test module imports dpmem_kernels.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

# One byte, repeated, is what an integer output holds until a kernel writes it.
POISON_BYTE = 0xA5


def fma_float32(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x·y + z in float32 with one rounding.

    The product of two 24-bit significands is exact in float64; the sum is not, so its last bit is
    forced odd wherever something was lost, and the final rounding to float32 cannot then mistake
    an inexact sum for a tie (Boldo & Melquiond, "Emulation of a FMA and correctly rounded sums").
    """
    product, addend = np.float64(x) * np.float64(y), np.float64(z)
    total = np.asarray(product + addend)
    rest = total - product
    lost = (product - (total - rest)) + (addend - rest)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (lost != 0) & (bits & 1 == 0)
    away_from_zero = (lost > 0) == (total > 0)
    odd = bits + np.where(away_from_zero, 1, -1) * inexact
    return odd.view(np.float64).astype(np.float32)


def _create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    data = fma_float32 if z.dtype.scalar == tl.float32 else lambda a, b, c: a * b + c
    return interpreter.TensorHandle(data(x.data, y.data, z.data), z.dtype.scalar)


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return original(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    return cast


def _extend(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def extend(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.bfloat16 or dst_type.scalar != tl.float32:
            return original(self, src, dst_type)
        bits = np.asarray(src.data).astype(np.uint32) << np.uint32(16)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    return extend


def pytest_configure() -> None:
    """Make the interpreter round as GPUs do.

    Triton's interpreter computes tl.fma with two roundings, truncates float32 to bfloat16 and
    loses bfloat16 denormals on their way to float32; a GPU rounds once, to nearest even, and
    loses nothing. Kernels are held to the GPU's arithmetic, bit for bit.
    """
    builder = interpreter.InterpreterBuilder
    builder.create_fma = _create_fma
    builder.create_fp_trunc = _cast(builder.create_fp_trunc)
    builder.create_fp_ext = _extend(builder.create_fp_ext)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            return tensor.fill_(float("nan"))
        info = torch.iinfo(tensor.dtype)
        pattern = bytes([POISON_BYTE]) * tensor.itemsize
        return tensor.fill_(int.from_bytes(pattern, "little", signed=info.min < 0))

    return wrapper


@pytest.fixture(autouse=True)
def poison_uninitialized_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that a kernel forgets to write is NaN (0xA5… in integers, True in masks)."""
    for owner, name in itertools.chain(
        ((torch, name) for name in ("empty", "empty_like", "empty_strided")),
        ((torch.Tensor, name) for name in ("new_empty", "new_empty_strided")),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(20240607)


@pytest.fixture(autouse=True)
def quiet_arithmetic() -> Iterator[None]:
    """inf − inf is no event on a GPU; NumPy, under the interpreter, would warn."""
    with np.errstate(all="ignore"):
        yield
