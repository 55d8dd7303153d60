"""Integers of a known range (pooling indices, class labels, token ids) in one or two bytes.

Math     code = index - low, an unsigned number of 8 bits where high - low <= 256, else of 16
Shapes   index [any] int64|int32 in [low, high) -> codes [same] uint8|int16, the latter holding the
         bits of the unsigned number
Traffic  the index's itemsize + 1 or 2 bytes an element each way
Error    none: lossless. The caller states the range, so that no device is asked for it, and every
         element is compared with it as it is read. One outside raises on the CPU at once; on a GPU
         an assertion on the device fails before anything later on the stream can read the codes,
         as for an index out of range in torch.nn.Embedding: the next synchronization raises, and
         no result made from a wrong code ever reaches the host.

Example  labels (3, -100, 9) in [-100, 10): codes (103, 0, 109), uint8.
"""

import torch
from torch import Tensor

from .backend import Backend, resolve_backend
from .quantize import is_plain

INDEX_DTYPES = (torch.int64, torch.int32)
MAX_SPAN = 1 << 16


def narrow_ref(index: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The specification of `narrow`: the codes, and whether all of index was in range (bool [])."""
    inside = ((index >= low) & (index < high)).all()
    code = index.long() - low
    if high - low <= 256:
        return code.to(torch.uint8), inside
    return ((code + 0x8000 & 0xFFFF) - 0x8000).to(torch.int16), inside


def widen_ref(codes: Tensor, low: int, dtype: torch.dtype) -> Tensor:
    """The specification of `widen`."""
    mask = 0xFF if codes.dtype == torch.uint8 else 0xFFFF
    return ((codes.long() & mask) + low).to(dtype)


def _code_dtype(low: int, high: int) -> torch.dtype:
    return torch.uint8 if high - low <= 256 else torch.int16


def _narrow(index: Tensor, low: int, high: int, backend: str) -> Tensor:
    if backend == "reference":
        codes, inside = narrow_ref(index, low, high)
    else:
        codes = index.new_empty(index.shape, dtype=_code_dtype(low, high))
        if not index.numel():
            return codes
        if backend == "cpu":
            from .narrow_cpu import narrow_loop

            inside = narrow_loop(index, codes, low, high - low)
        else:
            from .narrow_triton import launch_narrow

            inside = launch_narrow(index, codes, low, high - low)
    message = f"index must be in [{low}, {high}) throughout; state the range that it has"
    if index.device.type != "cpu":
        torch._assert_async(inside, message)
    elif not inside:
        raise ValueError(
            f"{message}; received values from {index.min().item()} to {index.max().item()}"
        )
    return codes


@torch.library.custom_op("dpmem::narrow", _narrow, mutates_args=()).register_fake
def _(index: Tensor, low: int, high: int, backend: str) -> Tensor:
    return index.new_empty(index.shape, dtype=_code_dtype(low, high))


def _widen(codes: Tensor, low: int, dtype: torch.dtype, backend: str) -> Tensor:
    if backend == "reference":
        return widen_ref(codes, low, dtype)
    index = codes.new_empty(codes.shape, dtype=dtype)
    if backend == "cpu" and codes.numel():
        from .narrow_cpu import widen_loop

        widen_loop(codes, index, low)
    elif codes.numel():
        from .narrow_triton import launch_widen

        launch_widen(codes, index, low)
    return index


@torch.library.custom_op("dpmem::widen", _widen, mutates_args=()).register_fake
def _(codes: Tensor, low: int, dtype: torch.dtype, backend: str) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _check_contiguous(name: str, x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous; received strides {x.stride()} for shape "
            f"{tuple(x.shape)}; permute it into memory order first, or pass {name}.contiguous()"
        )


def narrow(index: Tensor, high: int, *, low: int = 0, backend: Backend | None = None) -> Tensor:
    """A contiguous int64 or int32 tensor with values in [low, high) -> its codes, same shape.

    The codes are uint8 where high - low is at most 256, else int16. Raises ValueError for a range
    that is empty or wider than 2^16 or not index.dtype's, for a layout, for an index out of range
    (on a GPU that is a failed assertion on the device, see the module's docstring), TypeError for
    another dtype, and what `resolve_backend` raises.
    """
    if index.dtype not in INDEX_DTYPES:
        raise TypeError(f"index must be int64 or int32; received {index.dtype}")
    limits = torch.iinfo(index.dtype)
    if not (limits.min <= low < high <= limits.max + 1 and high - low <= MAX_SPAN):
        raise ValueError(
            f"[low, high) must hold 1 to {MAX_SPAN} values of {index.dtype}; received "
            f"[{low}, {high}); keep an index of a wider range as it is"
        )
    _check_contiguous("index", index)
    chosen = resolve_backend(index.device, backend)
    if is_plain(index):
        return _narrow(index, low, high, chosen)
    return torch.ops.dpmem.narrow(index, low, high, chosen)


def widen(
    codes: Tensor,
    dtype: torch.dtype = torch.int64,
    *,
    low: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """The index that `narrow` was given, same shape; `low` and `dtype` are those it had.

    Raises TypeError for codes that `narrow` does not return or another dtype, ValueError for a
    layout or where `dtype` cannot hold low, and what `resolve_backend` raises.
    """
    if codes.dtype not in (torch.uint8, torch.int16) or dtype not in INDEX_DTYPES:
        raise TypeError(
            f"codes are uint8 or int16 and an index is int64 or int32; received {codes.dtype} "
            f"codes and dtype {dtype}; pass what narrow returned"
        )
    if not torch.iinfo(dtype).min <= low <= torch.iinfo(dtype).max:
        raise ValueError(f"low must be a {dtype}; received {low}; pass the low that narrow had")
    _check_contiguous("codes", codes)
    chosen = resolve_backend(codes.device, backend)
    if is_plain(codes):
        return _widen(codes, low, dtype, chosen)
    return torch.ops.dpmem.widen(codes, low, dtype, chosen)
