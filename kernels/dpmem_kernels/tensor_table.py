"""A list of tensors as one launch sees it: the pass that all gradient ops are.

Every op on gradients is the same walk. Element i of tensor t is read, multiplied by one scalar in
float32 (with `accumulate`, added to what its destination holds, in one fused multiply-add), rounded
to the destination's dtype (to nearest even, once) and written; a flag is raised if a value as
written is not finite, and where the op wants it the squares of the values are summed. Ops differ in
where an element comes from, where it goes, and which of the results they keep.

Tensors are cut into chunks: of at most CHUNK elements, what a program moves, on a GPU, and of
CPU_CHUNK on the CPU. A chunk never spans two tensors, so the chunks, and with them the order in
which their sums are added, depend on the tensors' sizes alone, not on threads. (Within a chunk,
Triton's order also depends on whether 16 divides the tensor's address.) The chunk table is built
once per layout and stays on the device; what travels with a call is two addresses per tensor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from operator import attrgetter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import Parameter

from .backend import Backend
from .quantize import is_plain

CHUNK = 4096
# Long enough that the four streams in which a chunk is read (tensor_table_cpu.py) outlast the start
# of the prefetcher, which stops at every page; several to each of a few threads all the same.
CPU_CHUNK = 32768
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}

_KIND = attrgetter("dtype", "device", "ndim")

Addresses = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Walk:
    """One pass over the tensors that `chunks` (of chunk_table) describes, on its device.

    `sources` and `destinations` are the addresses of the tensors' first elements in bytes, int64
    [tensors]; without destinations the pass only reads. `source_dtype` and `destination_dtype`
    state the dtype on that side; None is each tensor's own. `scale` is a number, a one-element fp32
    tensor on the device, or None for no multiplication; `accumulate` needs a number.

    Without `sums` the squares are not summed. With `skip_if_one` a scale of exactly 1 leaves every
    byte alone, decided on the device, and found_inf means nothing.
    """

    chunks: Tensor
    sources: Addresses
    destinations: Addresses | None = None
    source_dtype: torch.dtype | None = None
    destination_dtype: torch.dtype | None = None
    scale: Tensor | float | None = None
    accumulate: bool = False
    sums: bool = True
    skip_if_one: bool = False

    def run(self, backend: Backend) -> tuple[Tensor, Tensor]:
        """Walk; returns (sum of squares, found_inf), fp32 scalar tensors on the device.

        Without `sums` the first means nothing.
        """
        return _runner(backend)(self)


# An import statement takes as long as the rest of a small call.
@cache
def _runner(backend: Backend) -> Callable[[Walk], tuple[Tensor, Tensor]]:
    if backend == "triton":
        from .tensor_table_triton import run
    else:
        from .tensor_table_cpu import run
    return run


def chunk_table(
    numels: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    backend: Backend = "triton",
) -> Tensor:
    """int64 [chunks, 4] on `device`: tensor index, dtype code, first element, length.

    Example: with chunks of CHUNK = 4096, one bf16 tensor of 5000 elements gives the rows
    (0, 1, 0, 4096) and (0, 1, 4096, 904).
    """
    chunk = CPU_CHUNK if backend == "cpu" else CHUNK
    sizes = np.asarray(numels, dtype=np.int64)
    codes = np.asarray([DTYPE_CODES[dtype] for dtype in dtypes], dtype=np.int64)
    chunks_of = -(-sizes // chunk)
    index = np.repeat(np.arange(len(sizes)), chunks_of)
    first_chunk = np.cumsum(chunks_of) - chunks_of
    start = (np.arange(len(index)) - first_chunk[index]) * chunk
    length = np.minimum(chunk, sizes[index] - start)
    rows = np.stack((index, codes[index], start, length), axis=1)
    return torch.from_numpy(rows).to(device)


# For ops without a plan to hold the table. A table takes 32 bytes per chunk, and a training process
# has few layouts: its list of gradients and its buckets.
kept_chunk_table = lru_cache(maxsize=1024)(chunk_table)


def addresses_of(tensors: Sequence[Tensor]) -> Addresses:
    """The addresses of the first elements, int64 [tensors]."""
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """quantize.is_plain of them all."""
    return all(map(is_plain, tensors[:1])) and set(map(type, tensors)) <= {Tensor, Parameter}


def check_dtype(position: int, dtype: torch.dtype) -> None:
    """Raises TypeError for a dtype not served."""
    if dtype not in DTYPE_CODES:
        raise TypeError(
            f"tensors must be float32, bfloat16 or float16; tensors[{position}] is {dtype}; "
            "handle it apart"
        )


def check_tensors(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Raises TypeError for a dtype, ValueError for a shape, layout or device not served."""
    served = {(dtype, device, 1) for dtype in DTYPES}
    # Lists are long and checked each step: loops in C first, and the one that explains after.
    if set(map(_KIND, tensors)) <= served and all(map(Tensor.is_contiguous, tensors)):
        return
    for position, tensor in enumerate(tensors):
        check_dtype(position, tensor.dtype)
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
