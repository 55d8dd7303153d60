"""A recorded run through the allocator model: does the model agree, and what if.

The replay asks the model for what the program asked of PyTorch, in order, and looks whether the
addresses and the device memory taken are the same. What cudaMalloc returned is the one thing
taken from the recording. From the first difference on the model goes its own way.

A what-if begins with the blocks that were live when the recording began, requested anew in order
of address, since under other settings they would lie elsewhere, and with nothing cached. It is
therefore given twice, under the recorded settings and under the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpmem_profiling.allocator import CachingAllocator, OutOfDeviceMemory
from dpmem_profiling.allocator_blocks import Segment, SegmentBlock
from dpmem_profiling.allocator_settings import AllocatorSettings
from dpmem_profiling.recording import RecordedDevice, is_take, steps
from dpmem_profiling.snapshot import DeviceTrace, Snapshot, TraceEvent
from dpmem_profiling.trace_start import TraceStart, trace_start

MAX_POINTS = 400
# A stream that a trace does not name: which streams used a block is not recorded.
_OTHER_STREAM = -1


@dataclass(frozen=True)
class ReplayPoint:
    """Bytes after an event; event 0 is the start."""

    event: int
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class Agreement:
    """The model beside the recording.

    Attributes:
        n_allocations, n_same_address: allocations, and those given the recorded address.
        n_segments, n_same_segment: cudaMallocs and mappings, and those of the recorded size (of
            mappings, address too).
        n_extra_segments: what the model took of the device and the program did not.
        recorded_peak_reserved_bytes: from the recorded segments alone.
        is_same_at_end: whether every segment and block is as in the snapshot after the last event.
        n_unknown_sizes: blocks from before the recording whose size it does not show.
        first_difference: the event, from 1; None if there is none.
    """

    n_allocations: int
    n_same_address: int
    n_segments: int
    n_same_segment: int
    n_extra_segments: int
    recorded_peak_reserved_bytes: int
    is_same_at_end: bool
    n_unknown_sizes: int
    first_difference: int | None

    @property
    def is_complete(self) -> bool:
        """Whether nothing differs."""
        return self.first_difference is None and self.is_same_at_end


@dataclass(frozen=True)
class ReplayRun:
    """One pass of the requests through the model.

    Attributes:
        reserved_at_peak_bytes, inactive_split_at_peak_bytes: when most was allocated: what was
            reserved, and what of it could neither be used by others nor given back.
        n_retries: requests for which everything cached was given back. In a recording, a call of
            empty_cache directly before a request that needs new memory looks the same.
        n_ooms, n_ooms_served: recorded out-of-memory errors, and those that fit here.
        failed_event: the first event, from 1, that was served in the recording and does not fit
            here; nothing after it is replayed.
    """

    settings: AllocatorSettings
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    reserved_at_peak_bytes: int
    inactive_split_at_peak_bytes: int
    n_retries: int
    n_ooms: int
    n_ooms_served: int
    failed_event: int | None
    timeline: tuple[ReplayPoint, ...]


@dataclass(frozen=True)
class WhatIf:
    """The same requests from the same start, under the recorded settings and under others."""

    recorded_settings: ReplayRun
    other_settings: ReplayRun


@dataclass(frozen=True)
class DeviceReplay:
    """One device of a snapshot.

    `capacity_bytes` is what the device was seen to be able to give; None if it never ran out.
    """

    device: int
    n_events: int
    capacity_bytes: int | None
    agreement: Agreement
    run: ReplayRun
    what_if: WhatIf | None


def replay_snapshot(
    snapshot: Snapshot, other_settings: AllocatorSettings | None = None
) -> tuple[DeviceReplay, ...]:
    """Replay every device of a snapshot, and what would be under `other_settings`.

    Raises ValueError for a trace that contradicts itself, and for a memory fraction in
    `other_settings` where the recording does not show the device's capacity.
    """
    return tuple(_replay_device(snapshot, trace, other_settings) for trace in snapshot.devices)


def _replay_device(
    snapshot: Snapshot, trace: DeviceTrace, other_settings: AllocatorSettings | None
) -> DeviceReplay:
    # Of what memory a fraction was is not recorded.
    settings = replace(snapshot.settings, per_process_memory_fraction=1.0)
    start = trace_start(trace, settings)
    peak_reserved_bytes, capacity_bytes = _recorded_peaks(trace, start)
    device = RecordedDevice()
    allocator = CachingAllocator(settings, device=device)
    allocator.restore(start.segments)
    flushes: set[int] = set()
    run = _run(trace, allocator, {address: address for address, _ in _held(start)}, flushes, device)
    agreement = Agreement(
        n_allocations=sum(event.action == "alloc" for event in trace.events),
        n_same_address=device.n_same_address,
        n_segments=sum(map(is_take, trace.events)),
        n_same_segment=device.n_same_segment,
        n_extra_segments=device.n_extra_segments,
        recorded_peak_reserved_bytes=peak_reserved_bytes,
        is_same_at_end=allocator.segments() == sorted(trace.segments, key=_address),
        n_unknown_sizes=start.n_unknown_sizes,
        first_difference=device.first_difference,
    )
    what_if = None
    if other_settings is not None:
        if other_settings.per_process_memory_fraction < 1 and capacity_bytes is None:
            raise ValueError(
                "per_process_memory_fraction must be of a known memory, which a recording without "
                "an out-of-memory error does not show; leave it out"
            )
        what_if = WhatIf(
            _run_anew(trace, start, settings, capacity_bytes, flushes),
            _run_anew(trace, start, other_settings, capacity_bytes, flushes),
        )
    return DeviceReplay(trace.device, len(trace.events), capacity_bytes, agreement, run, what_if)


def _address(segment: Segment) -> int:
    return segment.address


def _held(start: TraceStart) -> list[tuple[int, tuple[SegmentBlock, int]]]:
    """Address of each block in use at the start, and the block with its stream; by address."""
    return [
        (block.address, (block, segment.stream))
        for segment in start.segments
        for block in segment.blocks
        if block.state != "free"
    ]


def _recorded_peaks(trace: DeviceTrace, start: TraceStart) -> tuple[int, int | None]:
    """The most bytes reserved, and the most that the device had when it ran out of memory."""
    reserved_bytes = sum(segment.size_bytes for segment in start.segments)
    peak_bytes = reserved_bytes
    capacities = []
    for event in trace.events:
        if is_take(event):
            reserved_bytes += event.size_bytes
            peak_bytes = max(peak_bytes, reserved_bytes)
        elif event.action in ("segment_free", "segment_unmap"):
            reserved_bytes -= event.size_bytes
        elif event.device_free_bytes is not None:
            capacities.append(reserved_bytes + event.device_free_bytes)
    return peak_bytes, max([peak_bytes, *capacities]) if capacities else None


def _run_anew(
    trace: DeviceTrace,
    start: TraceStart,
    settings: AllocatorSettings,
    capacity_bytes: int | None,
    flushes: set[int],
) -> ReplayRun:
    """Replay with the blocks of the start requested anew."""
    allocator = CachingAllocator(settings, capacity_bytes=capacity_bytes)
    addresses = {}
    for address, (block, stream) in _held(start):
        try:
            addresses[address] = allocator.malloc(block.requested_bytes, stream)
        except OutOfDeviceMemory:
            return _Watch(allocator).run(failed_event=0)
        if block.state == "pending":
            allocator.record_stream(addresses[address], _OTHER_STREAM)
            allocator.free(addresses[address])
    return _run(trace, allocator, addresses, flushes)


def _run(
    trace: DeviceTrace,
    allocator: CachingAllocator,
    addresses: dict[int, int],
    flushes: set[int],
    device: RecordedDevice | None = None,
) -> ReplayRun:
    """Put the recorded requests to `allocator`.

    `addresses` leads from a block's recorded address to the allocator's. `flushes` are the steps
    before which the program called `empty_cache`: found beside the recorded device, then known.
    """
    watch = _Watch(allocator)
    for number, step in enumerate(steps(trace.events)):
        # Asked now: the event may be given the very address.
        completed = [addresses[address] for address in step.completed]
        if not step.waited:
            _complete(allocator, completed)
        if device is not None:
            device.begin(step)
            if step.is_flush(allocator):
                flushes.add(number)
        if number in flushes:
            allocator.empty_cache()
        event, address = step.event, None
        if event is None:
            pass
        elif event.action == "free_requested":
            watch.before_free()
            if step.is_awaited:
                allocator.record_stream(addresses[event.address], _OTHER_STREAM)
            allocator.free(addresses[event.address])
        else:
            address = _try_malloc(allocator, event)
            if event.action == "oom":
                watch.n_ooms += 1
                if address is not None:
                    watch.n_ooms_served += 1
                    allocator.free(address)
            elif address is None:
                return watch.run(failed_event=step.index)
            else:
                addresses[event.address] = address
        _complete(allocator, completed)
        if device is not None:
            device.end(step, address)
        watch.after(step.index)
    return watch.run(failed_event=None)


def _complete(allocator: CachingAllocator, addresses: Sequence[int]) -> None:
    """Free those that are still pending: the allocator may have waited for them itself."""
    for address in addresses:
        if allocator.is_pending(address):
            allocator.complete(address)


def _try_malloc(allocator: CachingAllocator, event: TraceEvent) -> int | None:
    try:
        return allocator.malloc(event.size_bytes, event.stream)
    except OutOfDeviceMemory:
        return None


class _Watch:
    """Looks at an allocator after every event."""

    def __init__(self, allocator: CachingAllocator) -> None:
        self.n_ooms = 0
        self.n_ooms_served = 0
        self._allocator = allocator
        self._points = [ReplayPoint(0, allocator.allocated_bytes, allocator.reserved_bytes)]
        self._peak_bytes = -1
        self._at_peak = (0, 0)

    def before_free(self) -> None:
        """A peak ends where something is freed, so only then is it looked at closely."""
        allocator = self._allocator
        if allocator.allocated_bytes > self._peak_bytes:
            self._peak_bytes = allocator.allocated_bytes
            self._at_peak = (allocator.reserved_bytes, allocator.inactive_split_bytes)

    def after(self, index: int) -> None:
        allocator = self._allocator
        self._points.append(ReplayPoint(index, allocator.allocated_bytes, allocator.reserved_bytes))

    def run(self, *, failed_event: int | None) -> ReplayRun:
        self.before_free()
        allocator = self._allocator
        return ReplayRun(
            settings=allocator.settings,
            peak_allocated_bytes=allocator.peak_allocated_bytes,
            peak_reserved_bytes=allocator.peak_reserved_bytes,
            reserved_at_peak_bytes=self._at_peak[0],
            inactive_split_at_peak_bytes=self._at_peak[1],
            n_retries=allocator.n_retries,
            n_ooms=self.n_ooms,
            n_ooms_served=self.n_ooms_served,
            failed_event=failed_event,
            timeline=_thin(self._points),
        )


def _thin(points: Sequence[ReplayPoint]) -> tuple[ReplayPoint, ...]:
    """The ends, and of each stretch the highest of both curves: about MAX_POINTS."""
    length = -(-2 * len(points) // MAX_POINTS)
    kept = {0, len(points) - 1}
    for first in range(0, len(points), length):
        stretch = range(first, min(first + length, len(points)))
        kept.add(max(stretch, key=lambda i: points[i].allocated_bytes))
        kept.add(max(stretch, key=lambda i: points[i].reserved_bytes))
    return tuple(points[i] for i in sorted(kept))
