"""Bucket packing: between per-parameter gradients and one flat communication buffer.

Math     pack        bucket[offset[t] + i] = round(float32(tensor[t][i]) * scale)
         accumulate  bucket[offset[t] + i] = round(fma(tensor[t][i], scale, bucket[offset[t] + i]))
         unpack      tensor[t][i] = round(float32(bucket[offset[t] + i]) * scale)
         in float32, the fused multiply-add with one rounding, then rounded to nearest even in the
         destination's dtype. found_inf is 1 if a value as written is inf or NaN (a large fp32 value
         on its way into fp16 included), else 0; sum_of_squares adds the squares of the values as
         written.
Shapes   tensors: 1-D contiguous fp32|bf16|fp16, mixed, any sizes; bucket: the same, one tensor;
         offsets: one int per tensor, in elements of the bucket
Traffic  (itemsize(source) + itemsize(destination)) * n bytes, and accumulate reads the destination
         too. One launch for the list (unpack: and one to add its sums). No host synchronization but
         a plan's first use, which uploads its chunk table; later ones upload 16 bytes per tensor.
Error    values bit-exact on every backend (which NaN a NaN becomes is not specified); sums as in
         grad_scale.py
Source   apex amp_C.multi_tensor_scale and multi_tensor_axpby; torch.distributed's Reducer (which
         copies, then divides)

A tensor may be the very part of the bucket that it is packed into; any other overlap is undefined.

Example  plan = PackPlan([2, 1], [torch.float32] * 2, offsets=[0, 3], device=torch.device("cpu"))
         bucket_pack(plan, [[1., 2.], [3.]], bucket of 4 zeros, scale=0.5) leaves [0.5, 1., 0., 1.5]
         in the bucket and returns 0; the same with accumulate=True then leaves [1., 2., 0., 3.]
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter
from typing import cast

import numpy as np
import torch
from torch import Tensor

from .backend import Backend, resolve_backend
from .grad_scale import GradStats
from .quantize import fma_ref
from .tensor_table import (
    Addresses,
    Walk,
    addresses_of,
    are_plain,
    check_dtype,
    check_scale,
    check_tensors,
    chunk_table,
    stats_ref,
)

_LAYOUT = attrgetter("shape", "dtype", "device")


class PackPlan:
    """Where each tensor of a list lies in a bucket: made once, held by the caller, used each step.

    `numels`, `dtypes` and `offsets` (in elements of the bucket) hold one entry per tensor; all
    tensors and the bucket are on `device`. Holds the chunk table there, 32 bytes per 4096 elements.

    Raises TypeError for a dtype, ValueError for lists of different lengths, a negative size or
    offset, or places that overlap.
    """

    def __init__(
        self,
        numels: Sequence[int],
        dtypes: Sequence[torch.dtype],
        offsets: Sequence[int],
        device: torch.device,
    ) -> None:
        if not len(numels) == len(dtypes) == len(offsets):
            raise ValueError(
                "a plan needs one size, dtype and offset per tensor; received "
                f"{len(numels)} sizes, {len(dtypes)} dtypes and {len(offsets)} offsets"
            )
        rows = list(zip(numels, dtypes, offsets, strict=True))
        for position, (numel, dtype, offset) in enumerate(rows):
            check_dtype(position, dtype)
            if numel < 0 or offset < 0:
                raise ValueError(
                    f"sizes and offsets must not be negative; tensors[{position}] takes {numel} "
                    f"elements from offset {offset}; count offsets from the bucket's start"
                )
        places = sorted(
            (offset, offset + numel, position)
            for position, (numel, _, offset) in enumerate(rows)
            if numel
        )
        for (_, end, one), (start, _, other) in pairwise(places):
            if start < end:
                raise ValueError(
                    f"tensors must not overlap in the bucket; tensors[{one}] ends at {end} and "
                    f"tensors[{other}] starts at {start}; move one of them"
                )
        self.numels, self.dtypes, self.offsets = tuple(numels), tuple(dtypes), tuple(offsets)
        self.device = device
        self.bucket_numel = max((offset + numel for numel, _, offset in rows), default=0)
        """Elements that a bucket must have at least."""
        self._layouts = [((numel,), dtype, device) for numel, dtype, _ in rows]
        self._chunks: dict[Backend, Tensor] = {}
        self._offsets = np.asarray(offsets, dtype=np.int64)

    def chunks(self, backend: Backend) -> Tensor:
        """The chunk table, made when it is first needed."""
        if backend not in self._chunks:
            self._chunks[backend] = chunk_table(self.numels, self.dtypes, self.device, backend)
        return self._chunks[backend]

    def check(self, tensors: Sequence[Tensor], bucket: Tensor) -> None:
        """Raises TypeError or ValueError unless this plan is for these tensors and this bucket."""
        check_tensors([bucket], self.device)
        if bucket.numel() < self.bucket_numel:
            raise ValueError(
                f"every tensor must lie inside the bucket; the plan's end at {self.bucket_numel} "
                f"and the bucket has {bucket.numel()} elements; make the bucket larger"
            )
        if len(tensors) != len(self.numels):
            raise ValueError(
                f"the plan is for {len(self.numels)} tensors; received {len(tensors)}; make a plan "
                "for each list"
            )
        if list(map(_LAYOUT, tensors)) == self._layouts and all(map(Tensor.is_contiguous, tensors)):
            return
        for position, (tensor, layout) in enumerate(zip(tensors, self._layouts, strict=True)):
            if _LAYOUT(tensor) != layout or not tensor.is_contiguous():
                raise ValueError(
                    f"the plan's tensors[{position}] is contiguous, with shape, dtype and device "
                    f"{layout}; received {_LAYOUT(tensor)} and strides {tensor.stride()}; pass the "
                    "tensors in the plan's order, or make a plan for this list"
                )

    def places(self, bucket: Tensor) -> list[Tensor]:
        """The tensors' parts of the bucket, as views."""
        return [
            bucket[offset : offset + numel]
            for offset, numel in zip(self.offsets, self.numels, strict=True)
        ]

    def addresses(self, bucket: Tensor) -> Addresses:
        """Of the tensors' first elements in the bucket, int64 [tensors]."""
        return self._offsets * bucket.itemsize + bucket.data_ptr()


@lru_cache(maxsize=64)
def _kept_plan(
    numels: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    offsets: tuple[int, ...],
    device: torch.device,
) -> PackPlan:
    return PackPlan(numels, dtypes, offsets, device)


def _plan_of(tensors: Sequence[Tensor], bucket: Tensor, offsets: Sequence[int]) -> PackPlan:
    """The plan of a call that comes through the dispatcher, which knows no plans."""
    plan = _kept_plan(
        tuple(tensor.numel() for tensor in tensors),
        tuple(tensor.dtype for tensor in tensors),
        tuple(offsets),
        bucket.device,
    )
    plan.check(tensors, bucket)
    return plan


def bucket_pack(
    plan: PackPlan,
    tensors: Sequence[Tensor],
    bucket: Tensor,
    *,
    scale: float = 1.0,
    accumulate: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Cast, multiply and write every tensor to its place in the bucket; returns found_inf.

    With `accumulate` the values are added to what the bucket holds. `scale` is used in fp32.
    Elements of the bucket outside the tensors' places stay as they are. Raises TypeError or
    ValueError where `plan` is not for `tensors` and `bucket`, or a layout or device is not served.
    """
    plan.check(tensors, bucket)
    chosen = resolve_backend(bucket.device, backend)
    if are_plain((bucket, *tensors)):
        torch.autograd.graph.increment_version(bucket)
        return _pack(plan, tensors, bucket, scale, accumulate, chosen)
    return torch.ops.dpmem.bucket_pack(
        list(tensors), bucket, list(plan.offsets), scale, accumulate, chosen
    )


def bucket_unpack(
    plan: PackPlan,
    bucket: Tensor,
    tensors: Sequence[Tensor],
    *,
    scale: Tensor | None = None,
    backend: Backend | None = None,
) -> GradStats:
    """The inverse: write every tensor from its place in the bucket, times an fp32 device scalar.

    Returns the statistics of the values written. Raises what bucket_pack raises, and TypeError or
    ValueError for a `scale` that is not one fp32 number on the bucket's device.
    """
    plan.check(tensors, bucket)
    if scale is not None:
        check_scale("scale", scale, bucket.device)
    chosen = resolve_backend(bucket.device, backend)
    if are_plain((bucket, *tensors)):
        torch.autograd.graph.increment_version(tensors)
        return GradStats(*_unpack(plan, bucket, tensors, scale, chosen))
    return GradStats(
        *torch.ops.dpmem.bucket_unpack(bucket, list(tensors), list(plan.offsets), scale, chosen)
    )


def _pack(
    plan: PackPlan,
    tensors: Sequence[Tensor],
    bucket: Tensor,
    scale: float,
    accumulate: bool,
    backend: Backend,
) -> Tensor:
    if backend == "reference":
        factor = torch.tensor(scale, dtype=torch.float32)
        places = plan.places(bucket)
        for tensor, place in zip(tensors, places, strict=True):
            if accumulate:
                place.copy_(fma_ref(tensor.float(), factor, place.float()))
            else:
                place.copy_(tensor.float() * factor)
        return stats_ref(places, bucket.device)[1]
    walk = Walk(
        chunks=plan.chunks(backend),
        sources=addresses_of(tensors),
        destinations=plan.addresses(bucket),
        destination_dtype=bucket.dtype,
        scale=scale,
        accumulate=accumulate,
        sums=False,
    )
    return walk.run(backend)[1]


def _unpack(
    plan: PackPlan,
    bucket: Tensor,
    tensors: Sequence[Tensor],
    scale: Tensor | None,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        for tensor, place in zip(tensors, plan.places(bucket), strict=True):
            tensor.copy_(place if scale is None else place.float() * scale.reshape(()))
        return stats_ref(tensors, bucket.device)
    walk = Walk(
        chunks=plan.chunks(backend),
        sources=plan.addresses(bucket),
        destinations=addresses_of(tensors),
        source_dtype=bucket.dtype,
        scale=scale,
    )
    return walk.run(backend)


@torch.library.custom_op("dpmem::bucket_pack", mutates_args=("bucket",))
def _bucket_pack(
    tensors: Sequence[Tensor],
    bucket: Tensor,
    offsets: Sequence[int],
    scale: float,
    accumulate: bool,
    backend: str,
) -> Tensor:
    chosen = resolve_backend(bucket.device, cast(Backend, backend))
    return _pack(_plan_of(tensors, bucket, offsets), tensors, bucket, scale, accumulate, chosen)


@torch.library.custom_op("dpmem::bucket_unpack", mutates_args=("tensors",))
def _bucket_unpack(
    bucket: Tensor,
    tensors: Sequence[Tensor],
    offsets: Sequence[int],
    scale: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = resolve_backend(bucket.device, cast(Backend, backend))
    return _unpack(_plan_of(tensors, bucket, offsets), bucket, tensors, scale, chosen)


@_bucket_pack.register_fake
def _(
    tensors: Sequence[Tensor],
    bucket: Tensor,
    offsets: Sequence[int],
    scale: float,
    accumulate: bool,
    backend: str,
) -> Tensor:
    return bucket.new_empty((), dtype=torch.float32)


@_bucket_unpack.register_fake
def _(
    bucket: Tensor,
    tensors: Sequence[Tensor],
    offsets: Sequence[int],
    scale: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    scalar = bucket.new_empty((), dtype=torch.float32)
    return scalar, torch.empty_like(scalar)
