"""The walk of tensor_table.py as one Triton launch, and a second tiny one that adds the sums."""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .assembly_triton import as_float32, assembly_of
from .tensor_table import CHUNK, Walk

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# 64 elements a thread share what a program costs however many it moves: finding its chunk, adding
# up. With 4 warps a thread would take half the registers, so as many chunks would be under way.
NUM_WARPS = 2
_THREADS = tl.constexpr(32 * NUM_WARPS)


@triton.jit
def _typed(address, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.constexpr_function
def _columns(source, destination):
    """Elements in a row of a tile: as many as a program's lanes take in 16 bytes each.

    Everything a thread takes is then a column, which it reduces alone. Rows of different lengths
    also keep Triton from settling on one number of elements per lane for all dtypes of a kernel.
    """
    bits = min(source.primitive_bitwidth, destination.primitive_bitwidth)
    return _THREADS.value * 128 // bits


@triton.constexpr_function
def _first_infinite(dtype):
    """The smallest fp32 magnitude that rounds to inf: halfway from the largest number to 2^k."""
    if dtype == tl.bfloat16:
        return (2 - 2**-8) * 2.0**127
    return 65520.0 if dtype == tl.float16 else float("inf")


@triton.jit
def _maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _move_tile(
    source, destination, length, scale,
    SOURCE: tl.constexpr, DESTINATION: tl.constexpr, WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr, SUMS: tl.constexpr, ASM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move `length` elements; (sum of squares of what was written or 0, non-finite flag).

    WIDE: addresses are divisible by 16 and the length by 8.
    """
    COLUMNS: tl.constexpr = _columns(SOURCE, SOURCE if destination is None else DESTINATION)
    columns = tl.arange(0, COLUMNS)[None, :]
    offsets = tl.arange(0, BLOCK // COLUMNS)[:, None] * COLUMNS + columns
    if WIDE:
        length = (length >> 3) * 8  # tells the compiler, in a value that only this path has
    mask = offsets < length
    x = as_float32(tl.load(_typed(source, SOURCE, WIDE) + offsets, mask=mask, other=0.0), ASM)
    if destination is not None:
        places = _typed(destination, DESTINATION, WIDE) + offsets
        if ACCUMULATE:
            held = as_float32(tl.load(places, mask=mask, other=0.0), ASM)
            x = tl.fma(x, tl.full(x.shape, scale, tl.float32), held)
        elif scale is not None:
            x = x * scale
        y = x.to(DESTINATION)
        tl.store(places, y, mask=mask)
    if SUMS:
        if destination is not None:
            x = as_float32(y, ASM)
        total = tl.sum(x * x)
        bad = 0
        # A finite sum proves every element finite. Only a sum that is not (large gradients square
        # to more than fp32 holds) makes it necessary to look at the elements.
        if not (total < float("inf")):
            bad = tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1)
    else:
        total = 0.0
        # Of the values before they are rounded, so that none is taken apart again.
        largest = tl.reduce(tl.abs(x), 0, _maximum)
        largest = tl.reduce(tl.reshape(largest, (_THREADS, COLUMNS // _THREADS)), 1, _maximum)
        bad = 1 - (largest < _first_infinite(DESTINATION)).to(tl.int32)
    return total, bad


@triton.jit
def _move_chunk(
    source, destination, start, length, scale,
    SOURCE: tl.constexpr, DESTINATION: tl.constexpr,
    ACCUMULATE: tl.constexpr, SUMS: tl.constexpr, ASM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose between 16-byte and single accesses. Addresses are in bytes, and of element 0."""
    source += start * (SOURCE.primitive_bitwidth // 8)
    alignment = source | (length * 2)  # 8 elements fill whole vectors of any dtype
    if destination is not None:
        destination += start * (DESTINATION.primitive_bitwidth // 8)
        alignment |= destination
    length = length.to(tl.int32)
    if alignment % 16 == 0:
        total, bad = _move_tile(
            source, destination, length, scale, SOURCE, DESTINATION, True,
            ACCUMULATE, SUMS, ASM, BLOCK,
        )  # fmt: skip
    else:
        total, bad = _move_tile(
            source, destination, length, scale, SOURCE, DESTINATION, False,
            ACCUMULATE, SUMS, ASM, BLOCK,
        )  # fmt: skip
    return total, bad


# Alignment that these scalars happen to have must not compile a kernel of its own.
@triton.jit(do_not_specialize_on_alignment=["scale", "found_inf_ptr"])
def walk_kernel(
    table_ptr, addresses_ptr, scale, found_inf_ptr, partials_ptr,
    SOURCE: tl.constexpr, DESTINATION: tl.constexpr, STORE: tl.constexpr,
    LOAD_SCALE: tl.constexpr, SKIP_IF_ONE: tl.constexpr,
    ACCUMULATE: tl.constexpr, SUMS: tl.constexpr, ASM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p moves chunk p. SOURCE and DESTINATION are dtypes, None for the tensor's own.

    `scale` is a number, None, or with LOAD_SCALE a pointer to one. Without SUMS partials_ptr is
    None.
    """
    if LOAD_SCALE:
        scale = tl.load(scale)
    if SKIP_IF_ONE:  # noqa: SIM102 - a condition for the compiler, then one for the GPU
        if scale == 1.0:
            return
    chunk = tl.program_id(0)
    row = table_ptr + 4 * chunk.to(tl.int64)
    addresses = addresses_ptr + 2 * tl.load(row)
    code = tl.load(row + 1)
    start = tl.load(row + 2)
    length = tl.load(row + 3)
    source = tl.load(addresses)
    destination = tl.load(addresses + 1) if STORE else None
    FP32: tl.constexpr = tl.float32
    BF16: tl.constexpr = tl.bfloat16
    FP16: tl.constexpr = tl.float16
    if code == 0:
        total, bad = _move_chunk(
            source, destination, start, length, scale,
            FP32 if SOURCE is None else SOURCE, FP32 if DESTINATION is None else DESTINATION,
            ACCUMULATE, SUMS, ASM, BLOCK,
        )  # fmt: skip
    elif code == 1:
        total, bad = _move_chunk(
            source, destination, start, length, scale,
            BF16 if SOURCE is None else SOURCE, BF16 if DESTINATION is None else DESTINATION,
            ACCUMULATE, SUMS, ASM, BLOCK,
        )  # fmt: skip
    else:
        total, bad = _move_chunk(
            source, destination, start, length, scale,
            FP16 if SOURCE is None else SOURCE, FP16 if DESTINATION is None else DESTINATION,
            ACCUMULATE, SUMS, ASM, BLOCK,
        )  # fmt: skip
    if SUMS:
        tl.store(partials_ptr + chunk, total)
    # Whoever stores here stores the same value, so the order does not matter.
    tl.store(found_inf_ptr + bad * 0, 1.0, mask=bad != 0)


@triton.jit(do_not_specialize=["n"])
def sum_kernel(partials_ptr, n, sum_ptr, BLOCK: tl.constexpr):
    """sum[0] = partials[0] + ... + partials[n - 1], in float64 and in a fixed order."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        mask = start + offsets < n
        total += tl.load(partials_ptr + start + offsets, mask=mask, other=0.0).to(tl.float64)
    tl.store(sum_ptr, tl.sum(total).to(tl.float32))


def run(walk: Walk) -> tuple[Tensor, Tensor]:
    """See Walk.run."""
    device, num_chunks = walk.chunks.device, len(walk.chunks)
    # The first word stays 0: it is the flag, lowered by the copy that brings the addresses. The
    # second keeps the addresses, two to a tensor, aligned.
    host = torch.zeros(
        2 + 2 * len(walk.sources), dtype=torch.int64, pin_memory=device.type == "cuda"
    )
    words = host.numpy()
    words[2::2] = walk.sources
    if walk.destinations is not None:
        words[3::2] = walk.destinations
    uploaded = host.to(device, non_blocking=True)
    found_inf, addresses = uploaded[:1].view(torch.float32)[0], uploaded[2:]
    sum_of_squares = torch.empty((), dtype=torch.float32, device=device)
    partials = None
    if walk.sums:
        partials = torch.empty(num_chunks, dtype=torch.float32, device=device)
    with torch.cuda.device_of(uploaded):
        if num_chunks:
            walk_kernel[(num_chunks,)](
                walk.chunks,
                addresses,
                walk.scale,
                found_inf,
                partials,
                SOURCE=None if walk.source_dtype is None else TL_DTYPES[walk.source_dtype],
                DESTINATION=(
                    None if walk.destination_dtype is None else TL_DTYPES[walk.destination_dtype]
                ),
                STORE=walk.destinations is not None,
                LOAD_SCALE=isinstance(walk.scale, Tensor),
                SKIP_IF_ONE=walk.skip_if_one,
                ACCUMULATE=walk.accumulate,
                SUMS=walk.sums,
                ASM=assembly_of(device),
                BLOCK=CHUNK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
        if walk.sums:
            sum_kernel[(1,)](
                partials,
                num_chunks,
                sum_of_squares,
                BLOCK=1024,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return sum_of_squares, found_inf
