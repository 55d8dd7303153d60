"""A trace through the allocator: the peaks of what it allocates, and of what is then reserved."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from dpmem_profiling.allocator import CachingAllocator, OutOfDeviceMemory
from dpmem_profiling.allocator_settings import MIN_BLOCK_BYTES, AllocatorSettings
from dpmem_profiling.timeline import Replay, replay
from dpmem_profiling.trace import Trace
from dpmem_profiling.tracker import Change


@dataclass(frozen=True)
class Peaks:
    """What the allocator's model says of a trace. `retries`: how often it ran dry and gave back
    what it had cached before it could go on; None for the bytes where it ran out for good."""

    reserved_bytes: int | None
    retries: int


def replay_trace(traced: Trace) -> Replay:
    """The allocated peak over everything that was traced, and what is in it."""
    changes = rounded(traced.changes)
    return replay({}, changes, traced.categories.__getitem__, start_s=0.0)


def replay_allocations(
    traced: Trace,
    settings: AllocatorSettings,
    capacity_bytes: int | None,
    *,
    with_possible: bool = False,
) -> Peaks:
    """Run a trace through the caching allocator's model; `capacity_bytes` None has no end.

    with_possible  cuDNN takes every workspace that it may take

    A convolution's workspace that there is no memory for is not taken: cuDNN goes on to its next
    kernel (Conv_v8.cpp, try_plans).
    """
    allocator = CachingAllocator(settings, capacity_bytes=capacity_bytes)
    sizes: dict[int, int] = {}
    addresses: dict[int, int] = {}
    possible = dict(traced.possible) if with_possible else {}
    emptied = set(traced.emptied)
    try:
        for index, change in enumerate(traced.changes):
            if index in emptied:
                allocator.empty_cache()
            if workspace_bytes := possible.get(index):
                allocator.free(allocator.malloc(workspace_bytes))
            number = change.storage
            if number is None:
                continue
            size_bytes = sizes.get(number, 0) + change.delta_bytes
            sizes[number] = size_bytes
            # A storage that is resized moves: the new block is taken before the old one goes.
            old = addresses.pop(number, None)
            if size_bytes:
                try:
                    addresses[number] = allocator.malloc(size_bytes)
                except OutOfDeviceMemory:
                    if not _can_be_spared(traced, number):
                        raise
            if old is not None:
                allocator.free(old)
    except OutOfDeviceMemory:
        return Peaks(None, allocator.n_retries)
    return Peaks(allocator.peak_reserved_bytes, allocator.n_retries)


def _can_be_spared(traced: Trace, number: int) -> bool:
    operator = traced.storages[number].op or ""
    return traced.categories[number] == "workspace" and operator.startswith("aten.convolution")


def rounded(changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """The same changes in the blocks of 512 bytes in which CUDA's allocator counts."""
    sizes: dict[int, int] = {}
    result = []
    for change in changes:
        if change.storage is not None:
            old = sizes.get(change.storage, 0)
            sizes[change.storage] = old + change.delta_bytes
            change = change._replace(delta_bytes=_blocks(sizes[change.storage]) - _blocks(old))
        result.append(change)
    return tuple(result)


def _blocks(size_bytes: int) -> int:
    return -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


def with_workspaces(traced: Trace, workspace_bytes: int) -> Trace:
    """The trace with cuBLAS workspaces of this size: those workspaces that stay."""
    seen = Counter(change.storage for change in traced.changes)
    changes = tuple(
        change._replace(delta_bytes=workspace_bytes)
        if change.storage is not None
        and seen[change.storage] == 1
        and traced.categories[change.storage] == "workspace"
        else change
        for change in traced.changes
    )
    return replace(traced, changes=changes)
