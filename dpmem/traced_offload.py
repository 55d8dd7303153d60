"""Offloaded activations in a forecast: on the host, where they take nothing of the GPU's memory.

A step is traced on fake CPU tensors, among which a copy in host memory would be one like any other.
Here such copies are on the device "meta", which the trace does not count. How fast they leave is
not known: as many as may be are taken to be on their way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from dpmem.activations.forms import Tensors
from dpmem.activations.offload import HostMemory


class _NotUntilAskedFor:
    """The end of a copy that takes until somebody waits for it."""

    def query(self) -> bool:
        return False

    def wait(self, stream: None) -> None:
        pass


def _copy_out(
    memory: HostMemory, tensors: Tensors, device: torch.device
) -> tuple[Tensors, _NotUntilAskedFor]:
    return tuple(torch.empty_like(t, device="meta") for t in tensors), _NotUntilAskedFor()


def _copy_in(memory: HostMemory, host: Tensors, device: torch.device) -> tuple[Tensors, None]:
    return tuple(torch.empty_like(t, device=device) for t in host), None


@contextmanager
def host_is_elsewhere() -> Iterator[None]:
    """Inside the block, what waits in host memory is not on the traced device."""
    with (
        mock.patch.object(HostMemory, "_copy_out", _copy_out),
        mock.patch.object(HostMemory, "copy_in", _copy_in),
        # The CPU has no streams to wait on, and here nobody needs one.
        mock.patch.object(torch.accelerator, "current_stream", return_value=None),
    ):
        yield
