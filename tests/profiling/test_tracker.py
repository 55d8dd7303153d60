"""MemoryTracker: storages counted once, from birth to death, and nothing kept alive."""

import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from dpmem_profiling import MemoryLimitExceeded
from dpmem_profiling.tracker import MemoryTracker

CPU = torch.device("cpu")


def make_tracker(*, block_bytes: int = 1, limit_bytes: int | None = None) -> MemoryTracker:
    return MemoryTracker(CPU, block_bytes=block_bytes, limit_bytes=limit_bytes)


def test_a_storage_counts_once_until_it_dies() -> None:
    with make_tracker() as tracker:
        tensor = torch.zeros(100)
        views = [tensor[:10], tensor.view(10, 10), tensor.detach(), nn.Parameter(tensor)]
        tensor.add_(1)
        assert tracker.live_bytes == 400
        del tensor
        assert tracker.live_bytes == 400
        del views
        assert tracker.live_bytes == 0
    assert [change.delta_bytes for change in tracker.changes] == [400, -400]


def test_storages_that_only_autograd_holds_are_alive() -> None:
    weight = torch.ones(100, requires_grad=True)
    with make_tracker() as tracker:
        out = (weight * 2).exp().sum()
        # exp saves its result; the product before it is gone.
        assert tracker.live_bytes == 400 + 4
        out.backward()
        del out
        assert tracker.live_bytes == 400
        assert weight.grad is not None
        weight.grad = None
        assert tracker.live_bytes == 0


def test_an_address_that_is_used_again_is_a_new_storage() -> None:
    with make_tracker() as tracker:
        for _ in range(50):
            torch.zeros(1000)
        assert tracker.live_bytes == 0
    assert len(tracker.storages) == 50
    assert [change.delta_bytes for change in tracker.changes] == [4000, -4000] * 50


def test_resizing_counts() -> None:
    original = torch.UntypedStorage.resize_
    with make_tracker() as tracker:
        tensor = torch.zeros(100)
        tensor.untyped_storage().resize_(0)
        assert tracker.live_bytes == 0
        tensor.untyped_storage().resize_(800)
        assert tracker.live_bytes == 800
        tensor.resize_(300)
        assert tracker.live_bytes == 1200
        del tensor
        assert tracker.live_bytes == 0
    assert torch.UntypedStorage.resize_ is original


def test_sizes_are_rounded_to_blocks() -> None:
    with make_tracker(block_bytes=512) as tracker:
        kept = [torch.zeros(1), torch.zeros(128), torch.zeros(129), torch.zeros(0)]
        assert tracker.live_bytes == 512 + 512 + 1024
    del kept


def test_parts_of_subclasses_and_sparse_tensors_count() -> None:
    with torch.sparse.check_sparse_tensor_invariants(True), make_tracker() as tracker:
        two = TwoTensor(torch.zeros(10), torch.zeros(10))
        double = two + two
        assert tracker.live_bytes == 4 * 40
        del two, double
        # Two int64 coordinates of one entry, and its value.
        sparse = torch.sparse_coo_tensor([[1], [2]], [3.0], (4, 4))
        tracker.see(sparse)
        assert tracker.live_bytes == 16 + 4


def test_other_devices_do_not_count() -> None:
    with make_tracker() as tracker:
        torch.zeros(100, device="meta")
    assert not tracker.storages


def test_a_storage_knows_where_it_was_made() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    with make_tracker() as tracker:
        tracker.module_names = {id(module): name for name, module in model.named_modules()}
        with tracker.in_phase("forward"):
            model(torch.zeros(2, 4))
        torch.zeros(3)
    made = [(info.shape, info.module, info.op, info.phase) for info in tracker.storages]
    assert made == [
        ((2, 4), None, "aten.zeros", "forward"),
        ((2, 8), "0", "aten.addmm", "forward"),
        ((2, 8), "1", "aten.relu", "forward"),
        ((3,), None, "aten.zeros", None),
    ]


def test_a_module_that_raises_is_left() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("no")

    with make_tracker() as tracker:
        with pytest.raises(KeyError):
            Fails()(torch.zeros(1))
        assert tracker._running == []


def test_hooks_are_removed() -> None:
    hooks = torch.nn.modules.module
    before = len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)
    with make_tracker():
        pass
    assert (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)) == before


def test_the_tracker_keeps_nothing_alive() -> None:
    with make_tracker() as tracker:
        tensor = torch.zeros(10)
        gone = weakref.ref(tensor)
        del tensor
        assert gone() is None
    survivor = torch.zeros(10)
    with tracker:
        tracker.see(survivor)
    collected = weakref.ref(tracker)
    del tracker
    gc.collect()
    assert collected() is None


def test_the_limit_is_raised_from_inside_an_operator() -> None:
    with make_tracker(limit_bytes=1000) as tracker:
        tracker.stage = "a test"
        kept = torch.zeros(250)
        with tracker.in_phase("forward"), pytest.raises(MemoryLimitExceeded) as caught:
            torch.zeros(1)
    del kept
    assert (caught.value.limit_bytes, caught.value.live_bytes) == (1000, 1004)
    assert caught.value.during == "a test, forward (aten.zeros)"
    assert "must stay within 1000 B (1000 bytes); got 1004 B" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
