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
        assert len(bucket.slots) == 1 or bucket.size_bytes <= max(capacity_bytes, first)
        assert len(bucket.slots) == 1 or not alone & {slot.parameter for slot in bucket.slots}


def test_exact_fit_stays_and_one_more_does_not() -> None:
    exact = BucketPlan.build([(4, torch.float32)] * 4, capacities_bytes=[32])
    assert [len(bucket.slots) for bucket in exact.buckets] == [2, 2]
    larger = BucketPlan.build([(5, torch.float32), (4, torch.float32)], capacities_bytes=[32])
    assert [len(bucket.slots) for bucket in larger.buckets] == [1, 1]


def test_capacity_must_be_positive() -> None:
    with pytest.raises(ValueError, match="capacity must be positive; received \\[1, 0\\] bytes"):
        BucketPlan.build([], capacities_bytes=[1, 0])
