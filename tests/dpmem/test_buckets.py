"""BucketPlan: every gradient in one place, no two in the same, within capacity."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpmem.buckets import SLOT_ALIGNMENT_BYTES, BucketPlan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_docstring_example() -> None:
    plan = BucketPlan.build(
        [(2, torch.float32), (4, torch.float32), (3, torch.float32)], capacities_bytes=[32]
    )
    places = [[(s.parameter, s.offset, s.numel) for s in b.slots] for b in plan.buckets]
    assert places == [[(2, 0, 3), (1, 4, 4)], [(0, 0, 2)]]
    assert [bucket.numel for bucket in plan.buckets] == [8, 4]
    assert plan.size_bytes == 48


@given(
    parameters=st.lists(st.tuples(st.integers(0, 400), st.sampled_from(DTYPES)), max_size=40),
    capacity_bytes=st.integers(1, 2000),
    first=st.integers(1, 500),
    seed=st.none() | st.integers(0, 2**16),
    alone=st.sets(st.integers(0, 39), max_size=3),
)
def test_plan_is_a_partition(
    parameters: list[tuple[int, torch.dtype]],
    capacity_bytes: int,
    first: int,
    seed: int | None,
    alone: set[int],
) -> None:
    order = list(range(len(parameters)))[::-1]
    if seed is not None:
        random.Random(seed).shuffle(order)
    plan = BucketPlan.build(
        parameters,
        capacities_bytes=[first, capacity_bytes],
        order=None if seed is None else order,
        alone=alone,
    )
    full = [max(order.index(slot.parameter) for slot in b.slots) for b in plan.buckets]
    assert full == sorted(full)
    placed = sorted(slot.parameter for bucket in plan.buckets for slot in bucket.slots)
    assert placed == list(range(len(parameters)))
    for bucket in plan.buckets:
        end = 0
        for slot in bucket.slots:
            assert (slot.numel, bucket.dtype) == parameters[slot.parameter]
            assert slot.offset >= end
            assert slot.offset * bucket.dtype.itemsize % SLOT_ALIGNMENT_BYTES == 0
            end = slot.offset + slot.numel
        assert end <= bucket.numel
        covered = [i for first, past in bucket.gaps for i in range(first, past)]
        used = [i for s in bucket.slots for i in range(s.offset, s.offset + s.numel)]
        assert sorted(covered + used) == list(range(bucket.numel))
        assert (
            bucket.numel * bucket.dtype.itemsize
            < end * bucket.dtype.itemsize + SLOT_ALIGNMENT_BYTES
        )
        # It was not full before its last gradient came.
        assert bucket.slots[-1].offset * bucket.dtype.itemsize < max(capacity_bytes, first)
        assert len(bucket.slots) == 1 or not alone & {slot.parameter for slot in bucket.slots}


@pytest.mark.parametrize(
    ("numels", "per_bucket"),
    [
        pytest.param([4, 4, 4, 4], [2, 2], id="exactly full"),
        pytest.param([4, 3, 4], [2, 1], id="reaching beyond"),
        pytest.param([1, 100, 1, 1], [2, 2], id="one larger than a bucket"),
        pytest.param([8, 0, 8], [1, 2], id="empty ones wait for the next"),
    ],
)
def test_a_bucket_closes_once_its_capacity_is_filled(
    numels: list[int], per_bucket: list[int]
) -> None:
    arriving = [(numel, torch.float32) for numel in numels]
    order = range(len(numels))
    plan = BucketPlan.build(arriving, capacities_bytes=[32], order=order)
    assert [len(bucket.slots) for bucket in plan.buckets] == per_bucket


@given(
    numels=st.lists(st.integers(1, 400).map(lambda n: 4 * n), min_size=1, max_size=40),
    capacities=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
)
def test_buckets_are_those_of_torch(numels: list[int], capacities: tuple[int, int]) -> None:
    """Where no slot is padded: the rule by which DistributedDataParallel fills its buckets."""
    tensors = [torch.zeros(numel) for numel in numels]
    theirs, _ = torch.distributed._compute_bucket_assignment_by_size(tensors, list(capacities))
    plan = BucketPlan.build(
        [(numel, torch.float32) for numel in numels],
        capacities_bytes=capacities,
        order=range(len(numels)),
    )
    assert [[slot.parameter for slot in bucket.slots] for bucket in plan.buckets] == theirs


def test_capacity_must_be_positive() -> None:
    with pytest.raises(ValueError, match="capacity must be positive; received \\[1, 0\\] bytes"):
        BucketPlan.build([], capacities_bytes=[1, 0])
