"""A bucket holds the gradients that are there, scaled, and zeros for the others."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpmem.bucket_buffer import BucketBuffer, size_and_dtype
from dpmem.buckets import BucketPlan


def make(numels: list[int], wire_dtype: torch.dtype | None = None) -> BucketBuffer:
    parameters = [nn.Parameter(torch.zeros(numel)) for numel in numels]
    plan = BucketPlan.build(list(map(size_and_dtype, parameters)), capacities_bytes=(2**30,))
    (bucket,) = plan.buckets
    ordered = [parameters[slot.parameter] for slot in bucket.slots]
    return BucketBuffer(bucket, ordered, wire_dtype)


def give(buffer: BucketBuffer, gradients: dict[int, Tensor], *, scale: float) -> Tensor:
    """A backward in which members receive these gradients, in this order."""
    for index, gradient in gradients.items():
        buffer.members[index].parameter.grad = gradient.clone()
    return buffer.pack(scale)


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
@given(
    numels=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    data=st.data(),
)
@settings(deadline=None)
def test_what_is_there_travels(
    wire_dtype: torch.dtype | None, numels: list[int], data: st.DataObject
) -> None:
    """Two backwards, other gradients present in each, in any order."""
    buffer = make(numels, wire_dtype)
    members = range(len(numels))
    counter = itertools.count(1)
    for _ in range(2):
        order = data.draw(st.lists(st.sampled_from(members), unique=True))
        gradients = {
            index: torch.full_like(buffer.members[index].parameter, next(counter))
            for index in order
        }
        travels = give(buffer, gradients, scale=0.5)
        want = torch.zeros(buffer.plan.numel, dtype=travels.dtype)
        for index, gradient in gradients.items():
            member = buffer.members[index]
            want[member.offset : member.offset + member.numel] = 0.5 * gradient
        assert torch.equal(travels, want)
        assert not buffer.has_gradients()
        buffer.arrive(None, take_stats=False)
        buffer.expose(as_views=True)
        for index, member in enumerate(buffer.members):
            if index in gradients:
                assert torch.equal(member.parameter.grad, 0.5 * gradients[index])
            else:
                assert member.parameter.grad is None
            member.parameter.grad = None


def test_a_gradient_without_elements_shares_the_place_of_another() -> None:
    buffer = make([1, 0])
    one, none = buffer.members if buffer.members[0].numel else reversed(buffer.members)
    assert one.offset == none.offset
    for member in (one, none, one):
        give(buffer, {buffer.members.index(member): torch.ones(member.numel)}, scale=1.0)
