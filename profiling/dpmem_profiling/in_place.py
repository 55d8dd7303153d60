"""Autograd's work in place, although a mode watches.

Wherever a `TorchDispatchMode` is active, and for tensors of a subclass such as fake ones, autograd
computes some gradients out of place that it otherwise computes in place, so that whoever watches
its memory makes it take more. `InPlaceGradients` puts that right.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_MAKE_ZEROS = {_aten.new_zeros.default, _aten.zeros.default, _aten.zeros_like.default}
_INTO_ZEROS = {
    _aten.scatter_add.default: _aten.scatter_add_.default,
    _aten.scatter.src: _aten.scatter_.src,
    _aten.scatter.value: _aten.scatter_.value,
    _aten.index_put.default: _aten.index_put_.default,
    _aten.index_add.default: _aten.index_add_.default,
    _aten.put.default: _aten.put_.default,
}


def _nothing() -> None:
    return None


class InPlaceGradients(TorchDispatchMode):
    """Enter it above the mode that watches.

    Sums. Where a tensor was used twice, the second gradient is added into the first, if nobody else
    holds it. Source: torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace;
    c10::impl::dispatch_mode_enabled in aten/src/ATen/TensorSubclassLikeUtils.h.

    Lookups. Their gradients are scattered into zeros that were made for them. Source:
    torch/csrc/autograd/FunctionsManual.cpp, gather_backward, index_backward,
    value_selecting_reduction_backward.
    """

    def __init__(self) -> None:
        super().__init__()
        self._zeros: Callable[[], Tensor | None] = _nothing
        self._learning: list[tuple[int, int]] = []
        self._sole: tuple[int, int] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            # Autograd asks each fake tensor, more often than it does all else together: no mode
            # below has anything to say to it.
            return args[0].fake_device
        if func is _aten.add.Tensor and not kwargs and _by_the_engine():
            old, new = args
            for kept, added in ((old, new), (new, old)):
                if self._may_change(kept, added):
                    return kept.add_(added)
        if func in _INTO_ZEROS and args[0] is self._zeros() and _by_the_engine():
            return _INTO_ZEROS[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func in _MAKE_ZEROS:
            self._zeros = weakref.ref(result)
        return result

    def calibrate(self) -> None:
        """Learn how many references a gradient has that nobody else holds, from one.

        The count depends on the modes below: call it with all of them active.
        """
        leaf = torch.empty(2, 2, requires_grad=True)
        twice = leaf * 1.0
        (twice.relu() + twice.tanh()).square().sum().backward()
        assert self._learning, "autograd adds two gradients where a tensor was used twice"
        self._sole = max(self._learning)

    def _may_change(self, kept: Tensor, added: Tensor) -> bool:
        if kept.layout is not torch.strided or added.layout is not torch.strided:
            # Without a storage to hold.
            return False
        holders = (
            kept._use_count(),  # type: ignore[attr-defined]
            torch._C._storage_Use_Count(kept.untyped_storage()._cdata),
        )
        if self._sole is None:
            self._learning.append(holders)
            return False
        return (
            holders[0] <= self._sole[0]
            and holders[1] <= self._sole[1]
            and kept.dtype == added.dtype
            and kept.shape == added.shape
            and _is_dense(kept)
        )


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
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in ("_fn", "inner", "__torch_dispatch__"):
        # torch's own wrappers around a mode, and modes above this one.
        frame = frame.f_back
    # Nobody, in a thread of autograd's own.
    return frame is None or frame.f_code.co_name == "_engine_run_backward"
