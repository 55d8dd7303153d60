"""Host memory for what waits for backward: copied out behind the forward, back ahead of backward.

On a GPU both ways run on a stream of their own, to and from pinned memory. Events order the
streams, so the host never waits: a tensor that leaves is held until its copy is done or, once more
than `in_flight_bytes` are on their way, until the compute stream has been told to wait for it.
Backward asks for tensors roughly in the reverse order, so whenever one is asked for, those that
left before it are started, as many as fit in `in_flight_bytes`. On the CPU the same steps run with
plain copies.
"""

import weakref
from collections import deque
from typing import NamedTuple

import torch

from dpmem.activations.forms import Tensors

IN_FLIGHT_BYTES = 256 << 20


class _Leaving(NamedTuple):
    tensors: Tensors
    done: torch.Event | None
    size_bytes: int


class OnHost:
    """Tensors that wait in host memory."""

    __slots__ = ("__weakref__", "_arrived", "_arriving", "_host", "_memory", "device", "place")

    def __init__(self, memory: "HostMemory", host: Tensors, device: torch.device) -> None:
        self._memory, self._host, self.device = memory, host, device
        self._arriving: Tensors | None = None
        self._arrived: torch.Event | None = None
        self.place = 0

    def tensors(self) -> Tensors:
        """The copies in host memory."""
        return self._host

    def fetch(self) -> Tensors:
        """The tensors on their device again, and those before them on their way."""
        self.start()
        assert self._arriving is not None
        if self._arrived is not None:
            self._arrived.wait(torch.accelerator.current_stream(self.device))
        arrived, self._arriving, self._arrived = self._arriving, None, None
        self._memory.prefetch_before(self.place)
        return arrived

    def start(self) -> None:
        """Begin to copy back, if that was not begun."""
        if self._arriving is None:
            self._arriving, self._arrived = self._memory.copy_in(self._host, self.device)

    def arriving_bytes(self) -> int:
        """Bytes of device memory that wait here for their use."""
        return sum(tensor.nbytes for tensor in self._arriving or ())


class HostMemory:
    """Takes tensors to host memory, and brings them back. Call it with what is to wait there."""

    def __init__(self, in_flight_bytes: int = IN_FLIGHT_BYTES) -> None:
        self.in_flight_bytes = in_flight_bytes
        self._streams: dict[torch.device, torch.Stream] = {}
        self._leaving: deque[_Leaving] = deque()
        self._order: list[weakref.ref[OnHost]] = []

    def __call__(self, tensors: Tensors) -> OnHost:
        """Begin to copy `tensors` out."""
        device = tensors[0].device
        host, done = self._copy_out(tensors, device)
        waiting = OnHost(self, host, device)
        waiting.place = len(self._order)
        self._order.append(weakref.ref(waiting))
        if done is not None:
            size = sum(tensor.nbytes for tensor in tensors)
            self._leaving.append(_Leaving(tensors, done, size))
            self._let_go(self.in_flight_bytes)
        return waiting

    def end_forward(self) -> None:
        """What has left by now is free for the compute stream's next work."""
        self._let_go(0)

    def begin_forward(self) -> None:
        """Forget what nobody waits for any more."""
        alive = [reference for reference in self._order if reference() is not None]
        for place, reference in enumerate(alive):
            waiting = reference()
            if waiting is not None:
                waiting.place = place
        self._order = alive

    def prefetch_before(self, place: int) -> None:
        """Start what left before `place`, while it fits in flight."""
        budget = self.in_flight_bytes
        for reference in reversed(self._order[:place]):
            waiting = reference()
            if waiting is None:
                continue
            size = sum(tensor.nbytes for tensor in waiting.tensors())
            if size > budget:
                return
            budget -= size
            waiting.start()

    def copy_in(self, host: Tensors, device: torch.device) -> tuple[Tensors, torch.Event | None]:
        """Copies of `host` on `device`, and the event after which they are complete."""
        stream = self._stream(device)
        if stream is None:
            return tuple(tensor.clone() for tensor in host), None
        # Allocated for the compute stream, which alone uses them after the event.
        copies = tuple(torch.empty_like(tensor, device=device) for tensor in host)
        stream.wait_stream(torch.accelerator.current_stream(device))
        with stream:
            for copy, tensor in zip(copies, host, strict=True):
                copy.copy_(tensor, non_blocking=True)
                # Dropped before its use, its memory must wait for the copy all the same.
                copy.record_stream(stream)
        return copies, stream.record_event()

    def _copy_out(
        self, tensors: Tensors, device: torch.device
    ) -> tuple[Tensors, torch.Event | None]:
        stream = self._stream(device)
        if stream is None:
            return tuple(tensor.clone() for tensor in tensors), None
        stream.wait_stream(torch.accelerator.current_stream(device))
        host = tuple(torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors)
        with stream:
            for copy, tensor in zip(host, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
        return host, stream.record_event()

    def _let_go(self, size_bytes: int) -> None:
        """Hold at most so many bytes of what leaves; its memory is reused in stream order."""
        held = sum(leaving.size_bytes for leaving in self._leaving)
        while self._leaving:
            tensors, done, size = self._leaving[0]
            assert done is not None
            if held <= size_bytes and not done.query():
                return
            done.wait(torch.accelerator.current_stream(tensors[0].device))
            self._leaving.popleft()
            held -= size

    def _stream(self, device: torch.device) -> torch.Stream | None:
        """The stream for copies; None on the CPU, which has none."""
        if device.type == "cpu":
            return None
        if device not in self._streams:
            self._streams[device] = torch.Stream(device)
        return self._streams[device]
