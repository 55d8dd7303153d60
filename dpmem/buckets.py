"""Which gradient lives where in which bucket: a pure plan, the same on every rank.

A bucket is one flat buffer that one kernel launch fills and one collective reduces; it holds one
dtype. Parameters are placed in the order in which a backward was seen to produce their gradients,
before that in reverse order of registration, which is roughly that. The plan depends on nothing but
its arguments, so ranks that agree on these agree on the plan without a word.
"""

from collections.abc import Collection, Sequence
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
        capacities_bytes: Sequence[int],
        order: Sequence[int] | None = None,
        alone: Collection[int] = (),
    ) -> "BucketPlan":
        """Plan buckets for `parameters`, given as (numel, dtype) in order of registration.

        A bucket takes gradients, each padded to 16 bytes, until they fill its capacity, as
        DistributedDataParallel's do; the last one may reach beyond it. Small gradients never wait
        for a large one that follows them, nor travel alone before it.

        capacities_bytes  of the first bucket to be filled, the second, and so on; the last one
                          holds for all that follow
        order             all parameters, as their gradients arrive; None: the last comes first
        alone             parameters that share a bucket with no other

        Example: capacity 32 bytes, fp32 parameters of 2, 4 and 3 elements give bucket 0 with
        parameter 2 at offset 0 (3 elements, padded to 4) and parameter 1 at offset 4, which fill
        it, and bucket 1 with parameter 0.

        Raises ValueError for a capacity that is not positive.
        """
        if not capacities_bytes or min(capacities_bytes) <= 0:
            raise ValueError(
                f"a bucket's capacity must be positive; received {list(capacities_bytes)} bytes; "
                "25 MiB is the usual one"
            )
        if order is None:
            order = range(len(parameters))[::-1]
        assert sorted(order) == list(range(len(parameters)))
        open_slots: dict[torch.dtype, list[Slot]] = {}
        used: dict[torch.dtype, int] = {}
        # Where in `order` the last parameter of the open bucket, and of each closed one, stands.
        last: dict[torch.dtype, int] = {}
        closed: list[tuple[int, Bucket]] = []

        def close(dtype: torch.dtype) -> None:
            slots = tuple(open_slots.pop(dtype))
            closed.append((last.pop(dtype), Bucket(dtype, used.pop(dtype), slots)))

        for place, index in enumerate(order):
            numel, dtype = parameters[index]
            step = SLOT_ALIGNMENT_BYTES // dtype.itemsize
            padded = -(-numel // step) * step
            if index in alone:
                closed.append((place, Bucket(dtype, padded, (Slot(index, 0, numel),))))
                continue
            offset = used.get(dtype, 0)
            open_slots.setdefault(dtype, []).append(Slot(index, offset, numel))
            used[dtype] = offset + padded
            last[dtype] = place
            capacity = capacities_bytes[min(len(closed), len(capacities_bytes) - 1)]
            if used[dtype] * dtype.itemsize >= capacity:
                close(dtype)
        for dtype in list(open_slots):
            close(dtype)
        # Reduced as they fill up, so that no bucket waits for one that is not full yet.
        closed.sort(key=lambda pair: pair[0])
        return cls(tuple(bucket for _, bucket in closed))
