"""Bucket packing: between per-parameter gradients and one flat communication buffer.

Math     pack    bucket[offset[t] + i] = round(float32(tensor[t][i]) * scale)
         unpack  tensor[t][i] = round(float32(bucket[offset[t] + i]) * scale)
         each rounded once, to nearest even, in the destination's dtype. found_inf is 1 if a value
         as written is inf or NaN (a large fp32 value on its way into fp16 included), else 0;
         sum_of_squares adds the squares of the values as written.
Shapes   tensors: 1-D contiguous fp32|bf16|fp16, mixed, any sizes; bucket: the same, one tensor;
         offsets: one int per tensor, in elements of the bucket
Traffic  (itemsize(source) + itemsize(destination)) * n bytes, one launch for the list. No host
         synchronization: only the first call for a list of sizes uploads its chunk table.
Error    values bit-exact on every backend (which NaN a NaN becomes is not specified); sums as in
         grad_scale.py
Source   apex amp_C.multi_tensor_scale, torch.distributed's Reducer (which copies, then divides)

A tensor may be the very part of the bucket it is packed into; any other overlap is undefined.

Example  bucket_pack([[1., 2.], [3.]], bucket of 4 zeros, offsets [0, 3], scale=0.5) leaves
         [0.5, 1., 0., 1.5] in the bucket and returns 0.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .backend import Backend, resolve_backend
from .grad_scale import GradStats
from .tensor_table import Walk, check_scale, check_tensors, stats_ref


def bucket_pack(
    tensors: Sequence[Tensor],
    bucket: Tensor,
    offsets: Sequence[int],
    *,
    scale: float = 1.0,
    backend: Backend | None = None,
) -> Tensor:
    """Cast, multiply and write every tensor to its place in the bucket; returns found_inf.

    `scale` is used in fp32. Elements of the bucket outside the tensors' places stay as they are.
    Raises TypeError for a dtype, ValueError for a shape, layout, device, or an offset that leaves
    the bucket.
    """
    return _bucket_pack(list(tensors), bucket, list(offsets), scale, backend)


def bucket_unpack(
    bucket: Tensor,
    tensors: Sequence[Tensor],
    offsets: Sequence[int],
    *,
    scale: Tensor | None = None,
    backend: Backend | None = None,
) -> GradStats:
    """The inverse: write every tensor from its place in the bucket, times an fp32 device scalar.

    Returns the statistics of the values written. Raises what bucket_pack raises.
    """
    return GradStats(*_bucket_unpack(bucket, list(tensors), list(offsets), scale, backend))


def _check(tensors: Sequence[Tensor], bucket: Tensor, offsets: Sequence[int]) -> None:
    check_tensors([bucket], bucket.device)
    check_tensors(tensors, bucket.device)
    if len(offsets) != len(tensors):
        raise ValueError(
            f"bucket ops need one offset per tensor; received {len(offsets)} offsets for "
            f"{len(tensors)} tensors"
        )
    room = bucket.numel()
    for position, (tensor, offset) in enumerate(zip(tensors, offsets, strict=True)):
        if offset < 0 or offset + tensor.numel() > room:
            raise ValueError(
                f"every tensor must lie inside the bucket of {room} elements; tensors[{position}] "
                f"takes {tensor.numel()} from offset {offset}; make the bucket larger"
            )


def _places(tensors: Sequence[Tensor], bucket: Tensor, offsets: Sequence[int]) -> list[Tensor]:
    return [
        bucket[offset : offset + tensor.numel()]
        for tensor, offset in zip(tensors, offsets, strict=True)
    ]


def _addresses(bucket: Tensor, offsets: Sequence[int]) -> list[int]:
    start, item_bytes = bucket.data_ptr(), bucket.itemsize
    return [start + offset * item_bytes for offset in offsets]


@torch.library.custom_op("dpmem::bucket_pack", mutates_args=("bucket",))
def _bucket_pack(
    tensors: Sequence[Tensor],
    bucket: Tensor,
    offsets: Sequence[int],
    scale: float,
    backend: str | None,
) -> Tensor:
    _check(tensors, bucket, offsets)
    chosen = resolve_backend(bucket.device, cast(Backend | None, backend))
    if chosen == "reference":
        factor = torch.tensor(scale, dtype=torch.float32)
        places = _places(tensors, bucket, offsets)
        for tensor, place in zip(tensors, places, strict=True):
            place.copy_(tensor.float() * factor)
        return stats_ref(places, bucket.device)[1]
    walk = Walk(
        device=bucket.device,
        numels=tuple(tensor.numel() for tensor in tensors),
        dtypes=tuple(tensor.dtype for tensor in tensors),
        sources=[tensor.data_ptr() for tensor in tensors],
        destinations=_addresses(bucket, offsets),
        destination_dtype=bucket.dtype,
        scale=scale,
    )
    return walk.run(chosen)[1]


@torch.library.custom_op("dpmem::bucket_unpack", mutates_args=("tensors",))
def _bucket_unpack(
    bucket: Tensor,
    tensors: Sequence[Tensor],
    offsets: Sequence[int],
    scale: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    _check(tensors, bucket, offsets)
    if scale is not None:
        check_scale("scale", scale, bucket.device)
    chosen = resolve_backend(bucket.device, cast(Backend | None, backend))
    if chosen == "reference":
        for tensor, place in zip(tensors, _places(tensors, bucket, offsets), strict=True):
            tensor.copy_(place if scale is None else place.float() * scale.reshape(()))
        return stats_ref(tensors, bucket.device)
    walk = Walk(
        device=bucket.device,
        numels=tuple(tensor.numel() for tensor in tensors),
        dtypes=tuple(tensor.dtype for tensor in tensors),
        sources=_addresses(bucket, offsets),
        destinations=[tensor.data_ptr() for tensor in tensors],
        source_dtype=bucket.dtype,
        scale=scale,
    )
    return walk.run(chosen)


@_bucket_pack.register_fake
def _(
    tensors: Sequence[Tensor],
    bucket: Tensor,
    offsets: Sequence[int],
    scale: float,
    backend: str | None,
) -> Tensor:
    return bucket.new_empty((), dtype=torch.float32)


@_bucket_unpack.register_fake
def _(
    bucket: Tensor,
    tensors: Sequence[Tensor],
    offsets: Sequence[int],
    scale: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    scalar = bucket.new_empty((), dtype=torch.float32)
    return scalar, torch.empty_like(scalar)
