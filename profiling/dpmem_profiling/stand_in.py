"""What fake tensors do otherwise than real ones, put right while a step is traced."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpmem_profiling.tracker import MemoryTracker

_aten = torch.ops.aten


class StandIn(TorchDispatchMode):
    """Enter it last, above the tracker.

    Values. `.item()`, which loops call to log a loss, is answered: 1, or True. `notes` says so.

    Sums of gradients. Where a tensor was used twice, autograd adds the second gradient into the
    first, in place, if nobody else holds it; but never into a tensor of a subclass, which fake ones
    are, so a traced sum would take memory that a real one does not.
    Source: torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace.
    """

    def __init__(self, tracker: MemoryTracker) -> None:
        super().__init__()
        self._tracker = tracker
        self._asked = 0
        self._sole: tuple[int, int] | None = None
        self._learning: list[tuple[int, int]] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            # Asked for very often, and an operator for fake tensors alone.
            return args[0].fake_device
        if func is _aten._local_scalar_dense.default:
            if self._tracker.phase != "step":
                # Optimizers read their own step counters.
                self._asked += 1
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        if _changes_lists_in_place(func):
            # Nothing to compute and nothing to allocate: a third of an optimizer step's time.
            return None
        if func is _aten.add.Tensor and not kwargs and _by_the_engine():
            old, new = args
            for kept, added in ((old, new), (new, old)):
                if self._may_change(kept):
                    return kept.add_(added)
        return func(*args, **(kwargs or {}))

    def calibrate(self) -> None:
        """Learn how many references a gradient has that nobody else holds, from one."""
        leaf = torch.empty(2, 2, requires_grad=True)
        twice = leaf * 1.0
        self._learning = []
        (twice.relu() + twice.tanh()).square().sum().backward()
        assert self._learning, "autograd adds two gradients where a tensor was used twice"
        self._sole = max(self._learning)
        self._learning = None

    def notes(self) -> tuple[str, ...]:
        """What a reader of the trace must know."""
        if not self._asked:
            return ()
        return (
            f"The steps asked {self._asked} times for a tensor's value (.item()) and were told 1 "
            "(True for a bool): if they decide by it, the forecast is of that decision.",
        )

    def _may_change(self, tensor: Tensor) -> bool:
        holders = (
            tensor._use_count(),  # type: ignore[attr-defined]
            torch._C._storage_Use_Count(tensor.untyped_storage()._cdata),
        )
        if self._learning is not None:
            self._learning.append(holders)
            return False
        assert self._sole is not None, "calibrate() comes first"
        return holders[0] <= self._sole[0] and holders[1] <= self._sole[1] and _is_dense(tensor)


@cache
def _changes_lists_in_place(func: Any) -> bool:
    name = func.overloadpacket.__name__
    return name.startswith(("_foreach_", "_fused_")) and name.endswith("_")


def _is_dense(tensor: Tensor) -> bool:
    """True where the elements fill their stretch of memory, each in a place of its own."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _by_the_engine() -> bool:
    """True where autograd itself calls, rather than Python code that it called."""
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
        return False
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in ("_fn", "inner"):
        # torch's own wrappers around __torch_dispatch__.
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"
