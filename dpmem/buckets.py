"""Which gradient lives where in which bucket: a pure plan, the same on every rank.

A bucket is one flat buffer that one kernel launch fills and one collective reduces. Parameters
are placed in reverse order of registration, because backward produces gradients roughly in that
order; a bucket holds one dtype. The plan depends on nothing but its arguments, so ranks that
agree on the parameters agree on the plan without a word.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Vector loads and stores are 16 bytes wide: every slot starts on such a boundary.
SLOT_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Slot:
    """One gradient's place: `numel` elements from element `offset` of the bucket."""

    parameter: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Bucket:
    """A flat buffer of `numel` elements (padding included) and who lives in it."""

    dtype: torch.dtype
    numel: int
    slots: tuple[Slot, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the flat buffer."""
        return self.numel * self.dtype.itemsize

    @property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """The padding, as (first, past the last) elements; empty where sizes divide evenly."""
        starts = [slot.offset + slot.numel for slot in self.slots]
        ends = [*(slot.offset for slot in self.slots[1:]), self.numel]
        return tuple((start, end) for start, end in zip(starts, ends, strict=True) if start < end)


@dataclass(frozen=True)
class BucketPlan:
    """Buckets in the order in which they are reduced."""

    buckets: tuple[Bucket, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all buckets: what the engine will allocate."""
        return sum(bucket.size_bytes for bucket in self.buckets)

    @classmethod
    def build(
        cls,
        parameters: Sequence[tuple[int, torch.dtype]],
        *,
        capacity_bytes: int,
        first_capacity_bytes: int | None = None,
    ) -> "BucketPlan":
        """Plan buckets for `parameters`, given as (numel, dtype) in order of registration.

        A bucket takes gradients while its slots, each padded to 16 bytes, fit `capacity_bytes`;
        one that fills it exactly fits, one larger than it gets a bucket of its own. The first
        bucket may be given a smaller capacity, so that communication starts early.

        Example: capacity 32 bytes, fp32 parameters of 2, 4 and 3 elements give bucket 0 with
        parameter 2 at offset 0 (3 elements, padded to 4) and parameter 1 at offset 4, and
        bucket 1 with parameter 0.

        Raises ValueError for a capacity that is not positive.
        """
        if capacity_bytes <= 0:
            raise ValueError(
                f"a bucket's capacity must be positive; received {capacity_bytes} bytes; "
                "25 MiB is the usual one"
            )
        open_slots: dict[torch.dtype, list[Slot]] = {}
        used: dict[torch.dtype, int] = {}
        closed: list[Bucket] = []

        def close(dtype: torch.dtype) -> None:
            slots = open_slots.pop(dtype)
            closed.append(Bucket(dtype, used.pop(dtype), tuple(slots)))

        for index in reversed(range(len(parameters))):
            numel, dtype = parameters[index]
            step = SLOT_ALIGNMENT_BYTES // dtype.itemsize
            padded = -(-numel // step) * step
            capacity = capacity_bytes
            if not closed and first_capacity_bytes is not None:
                capacity = first_capacity_bytes
            if dtype in open_slots and (used[dtype] + padded) * dtype.itemsize > capacity:
                close(dtype)
            offset = used.get(dtype, 0)
            open_slots.setdefault(dtype, []).append(Slot(index, offset, numel))
            used[dtype] = offset + padded
        for dtype in list(open_slots):
            close(dtype)
        return cls(tuple(closed))
