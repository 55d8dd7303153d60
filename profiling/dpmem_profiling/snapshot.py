"""What torch.cuda recorded of its allocator: segments at the end, and the events up to there.

Read are the pickle of `torch.cuda.memory._dump_snapshot` and the JSON form of the same, plain or
gzipped: `{"allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF", "expandable_segments"}, "devices":
[{"device", "segments": [{"address", "total_size", "stream", "segment_type", "is_expandable",
"blocks": [[address, size, requested_size, state], …]}], "trace": [[action, addr, size, stream(,
device_free for oom)], …]}]}`.

Sources  torch/csrc/cuda/memory_snapshot.cpp, torch/cuda/_memory_viz.py
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dpmem_profiling.allocator_blocks import Segment, SegmentBlock, State
from dpmem_profiling.allocator_settings import AllocatorSettings

_STATES: Mapping[str, State] = {
    "active_allocated": "live",
    "active_pending_free": "pending",
    "active_awaiting_free": "pending",
    "inactive": "free",
}
ACTIONS = frozenset(
    {
        "alloc",
        "free_requested",
        "free_completed",
        "oom",
        "segment_alloc",
        "segment_free",
        "segment_map",
        "segment_unmap",
    }
)


# What json, gzip and pickle raise for files that are something else.
_UNREADABLE = (
    pickle.UnpicklingError,
    zlib.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    gzip.BadGzipFile,
)


class TraceEvent(NamedTuple):
    """One event. Of an alloc or free, `size_bytes` is what was asked for; of an oom, too."""

    action: str
    address: int
    size_bytes: int
    stream: int
    device_free_bytes: int | None = None


@dataclass(frozen=True)
class DeviceTrace:
    """One device: its events, oldest first, and its segments after the last of them."""

    device: int
    segments: tuple[Segment, ...]
    events: tuple[TraceEvent, ...]


@dataclass(frozen=True)
class Snapshot:
    """A snapshot of all devices that have segments or events."""

    settings: AllocatorSettings
    devices: tuple[DeviceTrace, ...]


class _NoClasses(pickle.Unpickler):
    """A snapshot holds built-in containers and numbers; whatever else a file names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and no class is admitted")


def read_snapshot(path: str | Path) -> Snapshot:
    """Read a snapshot file. Nothing in it is executed.

    Raises OSError if it cannot be read, ValueError if it is not a snapshot, holds a class, or
    uses private memory pools (CUDA graphs, MemPool), which the allocator model does not cover.
    """
    raw = Path(path).read_bytes()
    try:
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        if raw.lstrip()[:1] == b"{":
            document = json.loads(raw)
        else:
            document = _NoClasses(io.BytesIO(raw)).load()
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} is not a memory snapshot: {error}; make one with "
            "torch.cuda.memory._dump_snapshot"
        ) from error
    try:
        snapshot = snapshot_of(document)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path} is not a memory snapshot: {type(error).__name__} {error}; make one with "
            "torch.cuda.memory._dump_snapshot"
        ) from error
    if not snapshot.devices:
        raise ValueError(f"{path} has no device memory in it; record the process that uses the GPU")
    return snapshot


def snapshot_of(document: Mapping[str, Any]) -> Snapshot:
    """What `torch.cuda.memory._snapshot` returned.

    Raises ValueError for private memory pools, and for settings that the model does not cover.
    """
    devices = _devices(document)
    return Snapshot(_settings(document, devices), devices)


def _settings(document: Mapping[str, Any], devices: Sequence[DeviceTrace]) -> AllocatorSettings:
    given = document.get("allocator_settings") or {}
    settings = AllocatorSettings.parse(given.get("PYTORCH_CUDA_ALLOC_CONF") or "")
    # What was in force: a platform may not have what was asked for.
    is_expandable = any(segment.is_expandable for trace in devices for segment in trace.segments)
    return replace(settings, expandable_segments=given.get("expandable_segments", is_expandable))


def _devices(document: Mapping[str, Any]) -> tuple[DeviceTrace, ...]:
    if "devices" in document:
        given = {
            device["device"]: (device["segments"], device["trace"])
            for device in document["devices"]
        }
    else:
        segments: dict[int, list[Any]] = {}
        for segment in document["segments"]:
            segments.setdefault(segment["device"], []).append(segment)
        traces = dict(enumerate(document.get("device_traces", ())))
        given = {
            device: (segments.get(device, []), traces.get(device, []))
            for device in sorted({*segments, *traces})
        }
    return tuple(
        DeviceTrace(
            device=device,
            segments=tuple(_segment(segment) for segment in segments_given),
            events=tuple(_events(trace)),
        )
        for device, (segments_given, trace) in given.items()
        if segments_given or trace
    )


def _segment(given: Mapping[str, Any]) -> Segment:
    if tuple(given.get("segment_pool_id", (0, 0))) != (0, 0):
        raise ValueError(
            "the snapshot has private memory pools (CUDA graphs or torch.cuda.MemPool), which the "
            "allocator model does not cover; record a run without them"
        )
    blocks = []
    address = given["address"]
    for block in given["blocks"]:
        if isinstance(block, Mapping):
            size_bytes, state = block["size"], _STATES[block["state"]]
            requested_bytes = block.get("requested_size", size_bytes)
        else:
            _, size_bytes, requested_bytes, state_name = block
            state = _STATES[state_name]
        requested_bytes = 0 if state == "free" else requested_bytes
        blocks.append(SegmentBlock(address, size_bytes, requested_bytes, state))
        address += size_bytes
    if address != given["address"] + given["total_size"]:
        raise ValueError(f"the blocks of the segment at {given['address']:#x} do not tile it")
    return Segment(
        address=given["address"],
        size_bytes=given["total_size"],
        stream=given["stream"],
        blocks=tuple(blocks),
        is_small=given["segment_type"] == "small",
        is_expandable=given.get("is_expandable", False),
    )


def _events(trace: Sequence[Any]) -> list[TraceEvent]:
    events = []
    for entry in trace:
        if isinstance(entry, Mapping):
            action = entry["action"]
            if action not in ACTIONS:
                # Such as "snapshot" and what users annotate: no memory moves.
                continue
            address = entry["device_free"] if action == "oom" else entry["addr"]
            size_bytes, stream = entry["size"], entry["stream"]
        else:
            action, address, size_bytes, stream = entry[:4]
            if action not in ACTIONS:
                raise ValueError(f"unknown action {action!r} in the trace")
        if action == "oom":
            device_free_bytes = entry[4] if not isinstance(entry, Mapping) else address
            events.append(TraceEvent(action, 0, size_bytes, stream, device_free_bytes))
        else:
            events.append(TraceEvent(action, address, size_bytes, stream))
    return events
