"""What fake tensors do otherwise than real ones, put right while a step is traced."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpmem_profiling.tracker import MemoryTracker

_aten = torch.ops.aten


class StandIn(TorchDispatchMode):
    """Enter it last, above the tracker.

    `.item()`, which loops call to log a loss, is answered: 1, or True; `notes` says so. What only
    changes values and allocates nothing is left out.
    """

    def __init__(self, tracker: MemoryTracker) -> None:
        super().__init__()
        self._tracker = tracker
        self._asked = 0

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
        return func(*args, **(kwargs or {}))

    def notes(self) -> tuple[str, ...]:
        """What a reader of the trace must know."""
        if not self._asked:
            return ()
        return (
            f"The steps asked {self._asked} times for a tensor's value (.item()) and were told 1 "
            "(True for a bool): if they decide by it, the forecast is of that decision.",
        )


@cache
def _changes_lists_in_place(func: Any) -> bool:
    name = func.overloadpacket.__name__
    return name.startswith(("_foreach_", "_fused_")) and name.endswith("_")
