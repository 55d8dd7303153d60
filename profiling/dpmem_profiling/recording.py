"""A recording as requests, each with what it made of the device, and that device once more."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from dpmem_profiling.allocator import CachingAllocator
from dpmem_profiling.allocator_memory import Device
from dpmem_profiling.snapshot import TraceEvent

# Where addresses begin that the recording does not have.
_INVENTED_ADDRESS = 2**60


@dataclass(frozen=True)
class Step:
    """An event of the program, and what was recorded between the one before and it.

    Attributes:
        index: the event's place in the trace, from 1.
        event: an alloc, a free_requested or an oom; None after the last one.
        completed: addresses of blocks that other streams were then done with.
        device_calls: what the device was asked for and given back.
        is_awaited: a free that was not completed at once, since other streams used the block. One
            whose completion is the very next event looks like any other, and is taken for it.
    """

    index: int
    event: TraceEvent | None
    completed: tuple[int, ...]
    device_calls: tuple[TraceEvent, ...]
    is_awaited: bool = False

    @property
    def gives_back(self) -> bool:
        """Whether memory was given back to the device."""
        return not all(map(is_take, self.device_calls))

    @property
    def is_oom(self) -> bool:
        """Whether the request failed."""
        return self.event is not None and self.event.action == "oom"

    @property
    def waited(self) -> bool:
        """Whether the allocator waited for the other streams itself, as it does running short.

        Then its search for a free block came before `completed`.
        """
        return self.is_oom or self.gives_back

    def is_flush(self, allocator: CachingAllocator) -> bool:
        """Whether the program called `empty_cache`, given the allocator as it was before.

        A request that runs short gives memory back, too; but then it takes some or fails, and no
        free block would have served it.
        """
        if not self.gives_back or self.is_oom:
            return False
        if self.event is None or not any(map(is_take, self.device_calls)):
            return True
        return allocator.is_cached(self.event.size_bytes, self.event.stream)


def is_take(event: TraceEvent) -> bool:
    """Whether memory was taken from the device."""
    return event.action in ("segment_alloc", "segment_map")


def steps(events: Sequence[TraceEvent]) -> list[Step]:
    """The events of the program, with the end of the trace as a last step."""
    found: list[Step] = []
    calls: list[TraceEvent] = []
    completed: list[int] = []
    for index, event in enumerate(events, 1):
        if event.action.startswith("segment_"):
            calls.append(event)
        elif event.action == "free_completed":
            completed.append(event.address)
        else:
            is_awaited = event.action == "free_requested" and (
                index == len(events) or events[index][:2] != ("free_completed", event.address)
            )
            found.append(Step(index, event, tuple(completed), tuple(calls), is_awaited))
            calls, completed = [], []
    found.append(Step(len(events), None, tuple(completed), tuple(calls)))
    return found


class RecordedDevice(Device):
    """A device that does for each step what the recorded one did, and compares.

    cudaMalloc returns the recorded address where the size is the recorded one. What the recording
    does not know is given at addresses of its own, without end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._next_address = _INVENTED_ADDRESS
        self._calls: deque[TraceEvent] = deque()
        self._is_exhausted = False
        self._is_different = False
        self.n_allocations = 0
        self.n_same_address = 0
        self.n_same_segment = 0
        self.n_extra_segments = 0
        self.first_difference: int | None = None

    def begin(self, step: Step) -> None:
        """The calls that follow belong to `step`."""
        self._calls = deque(step.device_calls)
        self._is_exhausted = step.is_oom
        self._is_different = False

    def end(self, step: Step, address: int | None = None) -> None:
        """The step is over; `address` is what the model gave, None if it gave none."""
        is_different = self._is_different or bool(self._calls)
        if step.event is not None and step.event.action == "alloc":
            self.n_allocations += 1
            self.n_same_address += address == step.event.address
            is_different |= address != step.event.address
        elif step.is_oom:
            is_different |= address is not None
        if is_different and self.first_difference is None:
            self.first_difference = step.index

    def malloc(self, size_bytes: int) -> int | None:
        if self._calls and self._calls[0].action == "segment_alloc":
            event = self._calls.popleft()
            if event.size_bytes == size_bytes:
                self.n_same_segment += 1
                return event.address
        elif self._calls or self._is_exhausted:
            return None
        self._differ()
        return super().malloc(size_bytes)

    def reserve(self, size_bytes: int) -> int:
        # It may run short before the first page is mapped.
        for event in self._calls:
            if event.action == "segment_map":
                return event.address
        return super().reserve(size_bytes)

    def map(self, address: int, size_bytes: int) -> bool:
        if self._calls and self._calls[0].action == "segment_map":
            event = self._calls.popleft()
            if (event.address, event.size_bytes) == (address, size_bytes):
                self.n_same_segment += 1
                return True
        elif self._calls or self._is_exhausted:
            return False
        self._differ()
        return True

    def free(self, address: int, size_bytes: int) -> None:
        self._give_back("segment_free", address, size_bytes)

    def unmap(self, address: int, size_bytes: int) -> None:
        self._give_back("segment_unmap", address, size_bytes)

    def _give_back(self, action: str, address: int, size_bytes: int) -> None:
        for event in self._calls:
            if event[:3] == (action, address, size_bytes):
                self._calls.remove(event)
                return
        self._is_different = True

    def _differ(self) -> None:
        self._is_different = True
        self.n_extra_segments += 1
