"""What fake tensors do otherwise than real ones, put right while a step is traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
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


@contextmanager
def as_with_data() -> Iterator[None]:
    """What decides by a tensor's type or value goes, inside the block, as it does with data.

    f"{loss:.3f}" asks for the value. GradScaler steps: it skips the step where it is told that it
    found an infinity, and then the optimizer's state would be missing.
    """

    def format_(tensor: Tensor, specification: str) -> str:
        if tensor.dim() == 0:
            return format(tensor.item(), specification)
        return object.__format__(tensor, specification)

    def step(scaler: Any, optimizer: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        return optimizer.step(*args, **kwargs)

    with (
        mock.patch.object(FakeTensor, "__format__", format_),
        mock.patch.object(torch.amp.GradScaler, "_maybe_opt_step", step),
    ):
        yield


@cache
def _changes_lists_in_place(func: Any) -> bool:
    name = func.overloadpacket.__name__
    return name.startswith(("_foreach_", "_fused_")) and name.endswith("_")
