"""The allocator's state when a trace began, from its state at the end and the events between.

A trace is a ring buffer that keeps the latest events, so it mostly begins in the middle. Going
backwards undoes each event: what was allocated is not there before, what was freed is. One thing
a trace does not say: in the large pool a block may be up to 1 MiB larger than what was asked for
(`should_split` leaves such a rest in the block), and of a block that is freed before the end the
size is not recorded. Where the gap behind such a block is at most 1 MiB, it is the rest, as no
free block of the large pool is that small. Where the gap is larger, the next allocation that
begins at most 1 MiB behind it while it lives shows where it ends, for the same reason. What no
event shows is taken to have no rest, and counted.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dpmem_profiling.allocator_blocks import Segment, SegmentBlock, State
from dpmem_profiling.allocator_settings import (
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
    AllocatorSettings,
)
from dpmem_profiling.snapshot import DeviceTrace, TraceEvent


@dataclass(frozen=True)
class TraceStart:
    """What was there before the first event.

    `n_unknown_sizes`: blocks whose size neither the segments nor the events show.
    """

    segments: tuple[Segment, ...]
    n_unknown_sizes: int


@dataclass(frozen=True)
class _Held:
    """A block in use. `size_bytes` is None where only the request is recorded."""

    requested_bytes: int
    size_bytes: int | None
    state: State


def trace_start(trace: DeviceTrace, settings: AllocatorSettings) -> TraceStart:
    """Undo the events of `trace`.

    Raises ValueError if they contradict each other or the segments, as when actions were left out
    of the recording.
    """
    held = _held_at_start(trace)
    addresses = sorted(held)
    stretches = _stretches(trace, settings.large_segment_size_bytes)
    sizes, unknown = _sizes(trace, settings, held, addresses, stretches)
    segments = []
    for stretch in stretches:
        blocks: list[SegmentBlock] = []
        address, end = stretch.address, stretch.address + stretch.size_bytes
        for start in _inside(addresses, stretch):
            if start > address:
                blocks.append(SegmentBlock(address, start - address, 0, "free"))
            block = held[start]
            blocks.append(SegmentBlock(start, sizes[start], block.requested_bytes, block.state))
            address = start + sizes[start]
        if address < end:
            blocks.append(SegmentBlock(address, end - address, 0, "free"))
        segments.append(replace(stretch, blocks=tuple(blocks)))
    n_placed = sum(block.state != "free" for segment in segments for block in segment.blocks)
    if n_placed != len(held):
        raise ValueError(
            f"the trace of device {trace.device} frees {len(held) - n_placed} blocks outside of "
            "any segment; record it with all actions"
        )
    return TraceStart(tuple(segments), len(unknown))


def _held_at_start(trace: DeviceTrace) -> dict[int, _Held]:
    held = {
        block.address: _Held(block.requested_bytes, block.size_bytes, block.state)
        for segment in trace.segments
        for block in segment.blocks
        if block.state != "free"
    }
    for event in reversed(trace.events):
        if event.action == "free_completed":
            held[event.address] = _Held(event.size_bytes, None, "pending")
        elif event.action == "free_requested":
            if event.address not in held:
                raise _contradiction(trace, event)
            held[event.address] = replace(held[event.address], state="live")
        elif event.action == "alloc" and held.pop(event.address, None) is None:
            raise _contradiction(trace, event)
    return held


def _contradiction(trace: DeviceTrace, event: TraceEvent) -> ValueError:
    return ValueError(
        f"the trace of device {trace.device} has {event.action} of {event.address:#x}, which is "
        "neither freed later nor there at the end; record it with all actions"
    )


def _stretches(trace: DeviceTrace, large_page_bytes: int) -> list[Segment]:
    """The segments at the start, by address and without their blocks."""
    given = {s.address: replace(s, blocks=()) for s in trace.segments if not s.is_expandable}
    mapped = [replace(s, blocks=()) for s in trace.segments if s.is_expandable]
    pools = _Pools(trace.events, mapped)
    pages = {
        (stretch.is_small, stretch.stream, address)
        for stretch in mapped
        for address in _pages(stretch.address, stretch.size_bytes)
    }
    lowest: dict[tuple[bool, int], int] = {}
    for event in reversed(trace.events):
        if event.action == "segment_alloc":
            if given.pop(event.address, None) is None:
                raise _contradiction(trace, event)
        elif event.action == "segment_free":
            given[event.address] = Segment(
                event.address,
                event.size_bytes,
                event.stream,
                (),
                is_small=event.size_bytes == SMALL_SEGMENT_BYTES,
            )
        elif event.action in ("segment_map", "segment_unmap"):
            key = (pools.is_small(event, large_page_bytes), event.stream)
            lowest[key] = min(lowest.get(key, event.address), event.address)
            touched = {(*key, page) for page in _pages(event.address, event.size_bytes)}
            if event.action == "segment_map":
                pages -= touched
            else:
                pages |= touched
    return sorted([*given.values(), *_runs(pages, lowest)], key=lambda s: s.address)


class _Pools:
    """Of which pool pages are that are gone at the end, by what is known of their addresses."""

    def __init__(self, events: Sequence[TraceEvent], mapped: Sequence[Segment]) -> None:
        is_small = {segment.address: segment.is_small for segment in mapped}
        for event in events if any(event.action == "segment_unmap" for event in events) else ():
            if event.action == "segment_map":
                # The large pool maps multiples of more than 10 MiB.
                is_small.setdefault(event.address, event.size_bytes == SMALL_SEGMENT_BYTES)
            elif event.action in ("alloc", "free_requested", "free_completed"):
                is_small[event.address] = event.size_bytes <= SMALL_BYTES
        self._is_small = is_small
        self._addresses = sorted(is_small)

    def is_small(self, event: TraceEvent, large_page_bytes: int) -> bool:
        """What is not whole large pages is small, else as the nearest known.

        The nearest shares an address space with them. Where none is known they are taken as large.
        """
        if event.size_bytes % large_page_bytes:
            return True
        index = bisect_left(self._addresses, event.address)
        nearest = self._addresses[max(index - 1, 0) : index + 1]
        if not nearest:
            return False
        return self._is_small[min(nearest, key=lambda address: abs(address - event.address))]


def _pages(address: int, size_bytes: int) -> range:
    return range(address, address + size_bytes, SMALL_SEGMENT_BYTES)


def _runs(
    pages: set[tuple[bool, int, int]], lowest: dict[tuple[bool, int], int]
) -> Iterator[Segment]:
    """Pages in a row as one stretch; before the first of a pool an empty one at its lowest."""
    first = 0
    found = sorted(pages)
    for index, (is_small, stream, address) in enumerate(found):
        if index == 0 or found[index - 1][:2] != (is_small, stream):
            base = lowest.get((is_small, stream), address)
            if base < address:
                yield Segment(base, 0, stream, (), is_small, is_expandable=True)
        if found[index + 1 : index + 2] != [(is_small, stream, address + SMALL_SEGMENT_BYTES)]:
            start = found[first][2]
            size_bytes = address + SMALL_SEGMENT_BYTES - start
            yield Segment(start, size_bytes, stream, (), is_small, is_expandable=True)
            first = index + 1


def _inside(addresses: Sequence[int], stretch: Segment) -> Sequence[int]:
    end = stretch.address + stretch.size_bytes
    return addresses[bisect_left(addresses, stretch.address) : bisect_left(addresses, end)]


def _sizes(
    trace: DeviceTrace,
    settings: AllocatorSettings,
    held: dict[int, _Held],
    addresses: Sequence[int],
    stretches: Sequence[Segment],
) -> tuple[dict[int, int], set[int]]:
    """The size of each block, and the blocks of which no event shows it."""
    sizes: dict[int, int] = {}
    unknown: set[int] = set()
    for stretch in stretches:
        inside = _inside(addresses, stretch)
        for address, following in zip(
            inside, [*inside[1:], stretch.address + stretch.size_bytes], strict=False
        ):
            block = held[address]
            room_bytes = following - address
            if block.size_bytes is not None:
                sizes[address] = block.size_bytes
                continue
            size_bytes = settings.block_bytes(block.requested_bytes)
            rest_bytes = room_bytes - size_bytes
            if rest_bytes < 0:
                raise ValueError(
                    f"the trace of device {trace.device} has blocks that overlap at "
                    f"{following:#x}; its allocator settings are not those it was recorded under"
                )
            max_split = settings.max_split_size_bytes
            is_whole = max_split is not None and size_bytes >= max_split
            if not stretch.is_small and not stretch.is_expandable:
                if rest_bytes <= SMALL_BYTES or is_whole:
                    size_bytes = room_bytes
                else:
                    unknown.add(address)
            sizes[address] = size_bytes
    _see_ends(trace, sizes, unknown)
    return sizes, unknown


def _see_ends(trace: DeviceTrace, sizes: dict[int, int], unknown: set[int]) -> None:
    """Correct the sizes that a neighbour's allocation shows, and take them out of `unknown`."""
    open_ends = {address + sizes[address]: address for address in unknown}
    ends = sorted(open_ends)

    def close(end: int) -> None:
        del ends[bisect_left(ends, end)]
        del open_ends[end]

    for event in trace.events:
        if event.action == "alloc":
            index = bisect_right(ends, event.address) - 1
            if index >= 0 and event.address - ends[index] <= SMALL_BYTES:
                address = open_ends[ends[index]]
                close(ends[index])
                sizes[address] = event.address - address
                unknown.discard(address)
        elif event.action == "free_requested" and event.address in unknown:
            end = event.address + sizes[event.address]
            if end in open_ends and open_ends[end] == event.address:
                close(end)
