"""A list of tensors as one launch sees it: the pass that all gradient ops are.

Every op on gradients is the same walk. Element i of tensor t is read, multiplied by one scalar in
float32, rounded to the destination's dtype (to nearest even, once) and written; the values as
written are squared and summed, and a flag is raised if one of them is not finite. Ops differ in
where an element comes from, where it goes, and which of the results they keep.

Tensors are cut into chunks of at most CHUNK elements. A chunk never spans two tensors, so the
chunks, and with them the order of every sum, depend on the tensors' sizes alone: not on threads,
not on where the tensors lie. The chunk table is built once per layout and stays on the device;
what travels with a call is two addresses per tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .backend import Backend

CHUNK = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


@dataclass(frozen=True)
class Walk:
    """One pass over tensors of these sizes and dtypes, all on `device`.

    `sources` and `destinations` are the addresses of the tensors' first elements in bytes;
    without destinations the pass only reads. `source_dtype` and `destination_dtype` state the
    dtype on that side; None is each tensor's own. `scale` is a number, a one-element fp32 tensor
    on the device, or None for no multiplication.
    """

    device: torch.device
    numels: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    sources: list[int]
    destinations: list[int] | None = None
    source_dtype: torch.dtype | None = None
    destination_dtype: torch.dtype | None = None
    scale: Tensor | float | None = None

    def run(self, backend: Backend, *, skip_if_one: bool = False) -> tuple[Tensor, Tensor]:
        """Walk; returns (sum of squares, found_inf), fp32 scalar tensors on the device.

        With `skip_if_one` a scale of exactly 1 leaves every byte alone, decided on the device,
        and the statistics mean nothing.
        """
        if backend == "triton":
            from .tensor_table_triton import run
        else:
            from .tensor_table_cpu import run
        return run(self, chunk_table(self.numels, self.dtypes, self.device), skip_if_one)


@lru_cache(maxsize=64)
def chunk_table(
    numels: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> Tensor:
    """int64 [chunks, 4] on `device`: tensor index, dtype code, first element, length.

    Example: with CHUNK = 4096, one bf16 tensor of 5000 elements gives the rows
    (0, 1, 0, 4096) and (0, 1, 4096, 904).
    """
    sizes = np.asarray(numels, dtype=np.int64)
    codes = np.asarray([DTYPE_CODES[dtype] for dtype in dtypes], dtype=np.int64)
    chunks_of = -(-sizes // CHUNK)
    index = np.repeat(np.arange(len(numels)), chunks_of)
    first_chunk = np.cumsum(chunks_of) - chunks_of
    start = (np.arange(len(index)) - first_chunk[index]) * CHUNK
    length = np.minimum(CHUNK, sizes[index] - start)
    rows = np.stack((index, codes[index], start, length), axis=1)
    return torch.from_numpy(rows).to(device)


def check_tensors(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Raises TypeError for a dtype, ValueError for a shape, layout or device not served."""
    for position, tensor in enumerate(tensors):
        if tensor.dtype not in DTYPE_CODES:
            raise TypeError(
                f"tensors must be float32, bfloat16 or float16; tensors[{position}] is "
                f"{tensor.dtype}; handle it apart"
            )
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"tensors must be 1-D and contiguous; tensors[{position}] has shape "
                f"{tuple(tensor.shape)} and strides {tensor.stride()}; pass a flat view of it"
            )
        if tensor.device != device:
            raise ValueError(
                f"all tensors must be on {device}; tensors[{position}] is on {tensor.device}; "
                "call once per device"
            )


def check_scale(name: str, scale: Tensor, device: torch.device) -> None:
    """Raises TypeError or ValueError unless `scale` is one fp32 number on `device`."""
    if scale.dtype != torch.float32:
        raise TypeError(f"{name} must be float32; received {scale.dtype}; use {name}.float()")
    if scale.numel() != 1 or scale.device != device:
        raise ValueError(
            f"{name} must hold one element on {device}; received shape {tuple(scale.shape)} on "
            f"{scale.device}; keep it where the gradients are"
        )


def stats_ref(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """The specification of (sum of squares, found_inf): float64 throughout, rounded at the end."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for tensor in tensors:
        total += tensor.double().square().sum()
        finite &= tensor.isfinite().all()
    return total.float(), 1 - finite.float()
