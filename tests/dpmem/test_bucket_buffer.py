"""A bucket that takes its gradients in parts holds what it would hold had it taken them at once."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpmem import bucket_buffer
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
        if buffer.complete(buffer.members[index]):
            buffer.take(scale)
    return buffer.pack(scale)


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
@given(
    numels=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    at_once_bytes=st.integers(1, 400),
    data=st.data(),
)
@settings(deadline=None)
def test_parts_are_the_whole(
    wire_dtype: torch.dtype | None, numels: list[int], at_once_bytes: int, data: st.DataObject
) -> None:
    """Two backwards, other gradients present in each, in any order."""
    buffer = make(numels, wire_dtype)
    members = range(len(numels))
    counter = itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket_buffer, "_AT_ONCE_BYTES", at_once_bytes)
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
            assert len(buffer._pack_plans) <= len(numels)
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


def test_no_more_than_that_exists_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_buffer, "_AT_ONCE_BYTES", 300)
    buffer = make([25] * 12)
    for member in buffer.members:
        member.parameter.grad = torch.ones(25)
        if buffer.complete(member):
            buffer.take(1.0)
        waiting = [m for m in buffer.members if m.parameter.grad is not None]
        assert 100 * len(waiting) < 300
    assert torch.equal(buffer.pack(1.0).sum(), torch.tensor(300.0))


def test_a_backward_that_raised_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had packed is in no later average, nor is its memory kept."""
    monkeypatch.setattr(bucket_buffer, "_AT_ONCE_BYTES", 8)
    buffer = make([2, 2, 2])
    lost = buffer.members[0]
    lost.parameter.grad = torch.full((2,), 7.0)
    assert buffer.complete(lost)
    buffer.take(1.0)
    buffer.release()
    assert buffer.flat is None
    travels = give(buffer, {1: torch.ones(2)}, scale=1.0)
    assert travels.sum() == 2
    buffer.arrive(None, take_stats=False)
    buffer.expose(as_views=True)
    assert [m.parameter.grad is None for m in buffer.members] == [True, False, True]
