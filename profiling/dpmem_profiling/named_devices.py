"""Code that names a CUDA device, run where there is none.

A step is traced on fake CPU tensors, whatever device its code asks for: what it would put on "cuda"
is on the device that the trace is of. Left alone, such code ends in torch's errors, or ends the
process; and with a CUDA build of torch its tensors would be somewhere else, and not counted.

Left alone still: modules that are moved within a step, device=0 where a tensor is made (torch asks
for an accelerator before any mode hears of it), and torch.cuda's own functions but `synchronize`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_HERE = torch.device("cpu")


def here(device: Any) -> Any:
    """`device`, or the trace's own where that is a CUDA device; anything else as it is."""
    if isinstance(device, str) and device.partition(":")[0] == "cuda":
        return _HERE
    if isinstance(device, torch.device) and device.type == "cuda":
        return _HERE
    # The number of an accelerator.
    return _HERE if type(device) is int else device


@contextmanager
def cuda_is_here() -> Iterator[None]:
    """Let tensors go to "cuda" inside the block: they are there. Waiting for it takes no time."""
    move = Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return move(tensor, *map(here, args), **{name: here(kwargs[name]) for name in kwargs})

    def cuda(
        tensor: Tensor,
        device: Any = None,
        non_blocking: bool = False,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> Tensor:
        return move(tensor, _HERE, memory_format=memory_format)

    def pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
        # The host's memory, pinned or not, is none of the device's.
        return tensor

    with ExitStack() as undo:
        for function in (to, cuda, pin_memory):
            undo.enter_context(mock.patch.object(Tensor, function.__name__, function))
        undo.enter_context(mock.patch.object(torch.cuda, "synchronize", return_value=None))
        yield
