"""What CUDA knows of a step besides its tensors: the caching allocator's history, NVML's samples.

The tracker sees every tensor; the allocator also sees the workspaces of cuBLAS and cuDNN, and what
an operator allocates and frees within itself. Their difference at every moment is "unknown" here.

Nothing in this file ever ran on a GPU: its tests put recorded figures where the driver would
answer, and the CPU allocator's events where CUDA's would come.

Source: torch/cuda/memory.py, `_record_memory_history` and `_snapshot`; a trace's sizes are those
asked for, the allocator's counters those of its blocks (c10/cuda/CUDACachingAllocator.cpp).
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from dpmem_profiling import nvml
from dpmem_profiling.allocator_settings import MIN_BLOCK_BYTES
from dpmem_profiling.extrapolate import Recorder, Requests
from dpmem_profiling.record import TimelinePoint
from dpmem_profiling.snapshot import snapshot_of
from dpmem_profiling.timeline import Replay
from dpmem_profiling.tracker import Change
from dpmem_profiling.units import format_bytes

# A step of a 7B model makes about a hundred thousand; one takes some hundred bytes of host memory.
HISTORY_EVENTS = 1_000_000
# The number under which replay() meets memory that no tracked storage explains.
UNTRACKED = -1
_LACKS = "the timeline lacks what the allocator held and what no tensor explains."


class AllocatorPoint(NamedTuple):
    """What the allocator held right after an event, `time_s` on the clock of `perf_counter`."""

    time_s: float
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class CudaStep:
    """One step, as CUDA knows it; the bytes allocated before the job was built are left out.

    allocated_bytes  the allocator's own peak
    reserved_bytes   the most it held; with what the process held before
    device_bytes     the most of the whole device in use, by NVML; None where it does not say
    history          the start of the step, then every event; empty where it was not recorded
    notes            sentences a reader needs to judge the figures
    """

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int | None
    history: tuple[AllocatorPoint, ...]
    notes: tuple[str, ...]

    def with_untracked(
        self, live_at_start: Mapping[int, int], changes: Sequence[Change]
    ) -> tuple[dict[int, int], list[Change]]:
        """The tracker's start and changes, completed by storage UNTRACKED from the history.

        Its size is what the allocator has beyond the tracked storages, at every moment of either.
        An operator's output is the allocator's before it is the tracker's: then what leaves
        UNTRACKED goes first, so that no byte counts twice.
        """
        if not self.history:
            return dict(live_at_start), list(changes)
        tracked_bytes = sum(live_at_start.values())
        allocated_bytes = self.history[0].allocated_bytes
        untracked_bytes = max(allocated_bytes - tracked_bytes, 0)
        start = {**live_at_start, UNTRACKED: untracked_bytes}
        completed: list[Change] = []
        phase = None
        events: Iterable[AllocatorPoint | Change] = heapq.merge(
            self.history[1:], changes, key=lambda event: event.time_s
        )
        for event in events:
            if isinstance(event, Change):
                phase = event.phase
                tracked_bytes += event.delta_bytes
            else:
                allocated_bytes = event.allocated_bytes
            delta_bytes = max(allocated_bytes - tracked_bytes, 0) - untracked_bytes
            untracked_bytes += delta_bytes
            own = [Change(event.time_s, phase, UNTRACKED, delta_bytes)] if delta_bytes else []
            seen = [event] if isinstance(event, Change) else []
            completed += own + seen if delta_bytes < 0 else seen + own
        return start, completed

    def with_reserved(self, replayed: Replay, start_s: float) -> Replay:
        """The replay with `reserved_bytes` at its points, and tensors alone in `live_at_peak`."""
        times_s = [point.time_s for point in self.history]

        def reserved(point: TimelinePoint) -> TimelinePoint:
            last = bisect_right(times_s, start_s + point.time_s) - 1
            return replace(point, reserved_bytes=self.history[max(last, 0)].reserved_bytes)

        points = tuple(map(reserved, replayed.points)) if self.history else replayed.points
        tensors = {n: size for n, size in replayed.live_at_peak.items() if n != UNTRACKED}
        return replace(replayed, points=points, live_at_peak=tensors)


class CudaMeter:
    """Made before the job is built, watches one step of it: `with meter.watching(): ...`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.outside_bytes = torch.cuda.memory_allocated(device)
        self.step: CudaStep | None = None
        # Of all within `remembering`, to the end of the step that is watched; None if not known.
        self.requests: Requests | None = None
        self._recorder: Recorder | None = None
        self._is_remembering = False

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Remember what is asked of the allocator inside the block: `requests`, after `watching`.

        The recording is of sizes and addresses alone, no stacks; a step is timed without it. Not
        known where the allocator keeps no history, where somebody else records it, and where the
        process uses private memory pools or settings that the model does not cover.
        """
        with ExitStack() as undo:
            if self._starts_equal() and self._record_history(undo, []):
                self._is_remembering = True
                self.outside_bytes = torch.cuda.memory_allocated(self.device)
                started = snapshot_of(torch.cuda.memory._snapshot())
                held = [of.segments for of in started.devices if of.device == self.device.index]
                self._recorder = Recorder(started.settings, *held)
            yield

    def _starts_equal(self) -> bool:
        """Give up what another batch left behind, as none after this one will find it; False where
        that is not safe, or what is held is not for the model."""
        if torch.cuda.get_allocator_backend() != "native":
            return False
        try:
            snapshot_of(torch.cuda.memory._snapshot())
        except ValueError:
            return False
        # A captured graph may use its workspace for ever; but that is in a private pool.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        return True

    def _remember(self, trace: Sequence[Mapping[str, Any]]) -> None:
        """Add one device's trace to what is remembered."""
        recorder = self._recorder
        if recorder is None or len(trace) >= HISTORY_EVENTS:
            self._recorder = None
            return
        for event in trace:
            action, address = event["action"], event.get("addr", 0)
            if action == "alloc":
                recorder.takes(address, event["size"], event["stream"])
            elif action == "free_completed" and recorder.knows(address):
                # Until then the block serves no other request.
                recorder.gives(address)
            elif action in ("free_completed", "oom", "segment_free", "segment_unmap"):
                # Memory of another thread's, or given back to the device: no batch repeats it.
                self._recorder = None
                break

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what happens inside the block; `step` is there after it."""
        notes = []
        if self.outside_bytes:
            notes.append(
                f"{format_bytes(self.outside_bytes)} were allocated in this process before the "
                "measurement; the allocated peak leaves them out, the reserved peak does not."
            )
        with ExitStack() as undo:
            sampler = self._sampler(undo, notes)
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            start = AllocatorPoint(
                time.perf_counter(),
                torch.cuda.memory_allocated(self.device) - self.outside_bytes,
                torch.cuda.memory_reserved(self.device),
            )
            if self._is_remembering:
                self._remember(self._trace())
            recording = self._record_history(undo, notes)
            yield
            torch.cuda.synchronize(self.device)
            trace = self._trace() if recording else ()
            self._remember(trace)
            if self._recorder is not None:
                self.requests = self._recorder.requests()
        self.step = CudaStep(
            allocated_bytes=torch.cuda.max_memory_allocated(self.device) - self.outside_bytes,
            reserved_bytes=torch.cuda.max_memory_reserved(self.device),
            device_bytes=_sampled_peak(sampler, notes),
            history=_history(start, trace, notes) if recording else (),
            notes=tuple(notes),
        )

    def _trace(self) -> Sequence[Mapping[str, Any]]:
        trace: Sequence[Mapping[str, Any]]
        trace = torch.cuda.memory._snapshot()["device_traces"][self.device.index]
        return trace

    def _sampler(self, undo: ExitStack, notes: list[str]) -> nvml.Sampler | None:
        uuid = str(torch.cuda.get_device_properties(self.device).uuid)
        try:
            return undo.enter_context(nvml.Sampler(uuid))
        except (nvml.NvmlUnavailable, ValueError) as error:
            notes.append(f"Whole-device use is not known: {error}")
            return None

    def _record_history(self, undo: ExitStack, notes: list[str]) -> bool:
        backend = torch.cuda.get_allocator_backend()
        if backend != "native":
            notes.append(f"The allocator {backend} keeps no history, so {_LACKS}")
            return False
        if not self._is_remembering and torch._C._cuda_isHistoryEnabled():
            notes.append(f"This process records the allocator's history itself, so {_LACKS}")
            return False
        record = torch.cuda.memory._record_memory_history
        record("all", context=None, max_entries=HISTORY_EVENTS, clear_history=True)
        undo.callback(record, None, clear_history=True)
        return True


def _sampled_peak(sampler: nvml.Sampler | None, notes: list[str]) -> int | None:
    if sampler is None:
        return None
    try:
        return sampler.peak_bytes
    except nvml.NvmlUnavailable as error:
        notes.append(f"Whole-device use is not known: {error}")
        return None


def _history(
    start: AllocatorPoint, trace: Sequence[Mapping[str, Any]], notes: list[str]
) -> tuple[AllocatorPoint, ...]:
    """`start` and the state after every event of one device's trace."""
    if len(trace) >= HISTORY_EVENTS:
        notes.append(f"The step has more than {HISTORY_EVENTS} allocator events, so {_LACKS}")
        return ()
    # A trace's clock is the time of day.
    day_s = time.time() - time.perf_counter()
    points = [start]
    _, allocated_bytes, reserved_bytes = start
    for event in trace:
        action, size_bytes = event["action"], event["size"]
        if action == "alloc":
            allocated_bytes += _block_bytes(size_bytes)
        elif action == "free_requested":
            allocated_bytes -= _block_bytes(size_bytes)
        elif action in ("segment_alloc", "segment_map"):
            reserved_bytes += size_bytes
        elif action in ("segment_free", "segment_unmap"):
            reserved_bytes -= size_bytes
        else:
            continue
        time_s = max(event["time_us"] / 1e6 - day_s, points[-1].time_s)
        points.append(AllocatorPoint(time_s, allocated_bytes, reserved_bytes))
    return tuple(points)


def _block_bytes(size_bytes: int) -> int:
    return -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
