"""Reading snapshots: torch's pickle, our JSON, and what is neither."""

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpmem_profiling import AllocatorSettings, read_snapshot, replay_snapshot
from dpmem_profiling.allocator_blocks import Segment, SegmentBlock
from dpmem_profiling.snapshot import DeviceTrace, Snapshot, TraceEvent

MIB = 2**20
BASE = 2**40


def torch_document() -> dict[str, Any]:
    """As torch.cuda.memory._snapshot() has it: 5 MiB from before, then 30 MiB, then no more.

    5 MiB take 20; 30 take 30; 60 do not fit into the 50 that are left.
    """
    frames = [{"filename": "train.py", "line": 3, "name": "step"}]
    return {
        "segments": [
            {
                "device": 1,
                "address": BASE,
                "total_size": 20 * MIB,
                "allocated_size": 5 * MIB,
                "active_size": 5 * MIB,
                "requested_size": 5 * MIB,
                "stream": 0,
                "segment_type": "large",
                "segment_pool_id": (0, 0),
                "is_expandable": False,
                "frames": frames,
                "blocks": [
                    {
                        "address": BASE,
                        "size": 5 * MIB,
                        "requested_size": 5 * MIB - 7,
                        "state": "active_allocated",
                        "frames": frames,
                    },
                    {
                        "address": BASE + 5 * MIB,
                        "size": 15 * MIB,
                        "requested_size": 0,
                        "state": "inactive",
                        "frames": [],
                    },
                ],
            },
        ],
        "device_traces": [
            [],
            [
                {"action": "snapshot", "addr": 0, "size": 0, "stream": 0, "time_us": 1},
                entry("segment_alloc", BASE + 30 * MIB, 30 * MIB),
                entry("alloc", BASE + 30 * MIB, 30 * MIB),
                entry("free_requested", BASE + 30 * MIB, 30 * MIB),
                entry("free_completed", BASE + 30 * MIB, 30 * MIB),
                entry("segment_free", BASE + 30 * MIB, 30 * MIB),
                {"action": "oom", "device_free": 50 * MIB, "size": 60 * MIB, "stream": 0},
            ],
        ],
        "allocator_settings": {
            "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64",
            "expandable_segments": False,
        },
        "external_annotations": [],
    }


def entry(action: str, address: int, size_bytes: int) -> dict[str, Any]:
    return {
        "action": action,
        "addr": address,
        "size": size_bytes,
        "stream": 0,
        "time_us": 2,
        "frames": [],
    }


def json_document() -> dict[str, Any]:
    document = torch_document()
    (segment,) = document["segments"]
    blocks = [[b["address"], b["size"], b["requested_size"], b["state"]] for b in segment["blocks"]]
    trace = [
        ["oom", None, e["size"], 0, e["device_free"]]
        if e["action"] == "oom"
        else [e["action"], e["addr"], e["size"], e["stream"]]
        for e in document["device_traces"][1][1:]
    ]
    return {
        "allocator_settings": document["allocator_settings"],
        "devices": [{"device": 1, "segments": [{**segment, "blocks": blocks}], "trace": trace}],
    }


EXPECTED = Snapshot(
    AllocatorSettings(max_split_size_bytes=64 * MIB),
    (
        DeviceTrace(
            1,
            (
                Segment(
                    BASE,
                    20 * MIB,
                    0,
                    (
                        SegmentBlock(BASE, 5 * MIB, 5 * MIB - 7, "live"),
                        SegmentBlock(BASE + 5 * MIB, 15 * MIB, 0, "free"),
                    ),
                    is_small=False,
                ),
            ),
            (
                TraceEvent("segment_alloc", BASE + 30 * MIB, 30 * MIB, 0),
                TraceEvent("alloc", BASE + 30 * MIB, 30 * MIB, 0),
                TraceEvent("free_requested", BASE + 30 * MIB, 30 * MIB, 0),
                TraceEvent("free_completed", BASE + 30 * MIB, 30 * MIB, 0),
                TraceEvent("segment_free", BASE + 30 * MIB, 30 * MIB, 0),
                TraceEvent("oom", 0, 60 * MIB, 0, 50 * MIB),
            ),
        ),
    ),
)


@pytest.mark.parametrize(
    "written",
    [
        lambda: pickle.dumps(torch_document()),
        lambda: gzip.compress(pickle.dumps(torch_document(), protocol=2)),
        lambda: json.dumps(json_document()).encode(),
        lambda: gzip.compress(json.dumps(json_document()).encode()),
    ],
    ids=["pickle", "pickle.gz", "json", "json.gz"],
)
def test_reads_every_form(tmp_path: Path, written: Callable[[], bytes]) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(written())
    assert read_snapshot(path) == EXPECTED


def test_a_failed_request_is_replayed() -> None:
    (device,) = replay_snapshot(EXPECTED, AllocatorSettings(expandable_segments=True))
    assert device.agreement.is_complete
    assert (device.run.n_ooms, device.run.n_ooms_served, device.run.n_retries) == (1, 0, 1)
    # 20 MiB reserved and 50 free when it failed.
    assert device.capacity_bytes == 70 * MIB
    assert device.what_if is not None
    # 60 MiB behind the 5 need 80 in pages of 20.
    assert device.what_if.other_settings.n_ooms_served == 0
    (device,) = replay_snapshot(
        EXPECTED, AllocatorSettings(expandable_segments=True, large_segment_size_bytes=22 * MIB)
    )
    assert device.what_if is not None
    # In pages of 22, 66.
    assert device.what_if.other_settings.n_ooms_served == 1
    assert device.what_if.other_settings.peak_reserved_bytes == 66 * MIB
    assert device.what_if.recorded_settings.n_ooms_served == 0


class Trap:
    """Would make a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_with_a_class_is_refused_unexecuted(tmp_path: Path) -> None:
    path, sprung = tmp_path / "trap.pickle", tmp_path / "sprung"
    path.write_bytes(pickle.dumps({**torch_document(), "trap": Trap(sprung)}))
    with pytest.raises(ValueError, match=r"names .*, and no class is admitted; make one with"):
        read_snapshot(path)
    assert not sprung.exists()


def changed(**changes: Any) -> bytes:
    document = torch_document()
    document["segments"][0].update(changes)
    return pickle.dumps(document)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (lambda: b"", "not a memory snapshot"),
        (lambda: b"# notes", "not a memory snapshot"),
        (lambda: b'{"devices": ', "not a memory snapshot"),
        (lambda: b'{"devices": [{"device": 0}]}', "not a memory snapshot: KeyError 'segments'"),
        (lambda: b"\x1f\x8bzip", "not a memory snapshot"),
        (lambda: gzip.compress(pickle.dumps({}))[:-12], "not a memory snapshot"),
        (lambda: pickle.dumps([1, 2]), "not a memory snapshot"),
        (lambda: pickle.dumps(torch_document())[:-40], "not a memory snapshot"),
        (lambda: pickle.dumps({"segments": [], "device_traces": [[]]}), "has no device memory"),
        (lambda: changed(segment_pool_id=(0, 1)), "has private memory pools"),
        (lambda: changed(total_size=21 * MIB), "blocks of the segment at 0x10000000000 do not"),
    ],
    ids=range(11),
)
def test_what_is_no_snapshot_is_refused(
    tmp_path: Path, written: Callable[[], bytes], words: str
) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(written())
    with pytest.raises(ValueError, match=words):
        read_snapshot(path)


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([TraceEvent("alloc", BASE + MIB, MIB, 0)], "has alloc of 0x10000100000, which is neither"),
        ([TraceEvent("free_requested", 7, MIB, 0)], "has free_requested of 0x7, which is neither"),
        ([TraceEvent("segment_alloc", 7, MIB, 0)], "has segment_alloc of 0x7, which is neither"),
        (
            [TraceEvent("free_requested", 7, 1, 0), TraceEvent("free_completed", 7, 1, 0)],
            "frees 1 blocks outside of any segment",
        ),
        (
            [
                TraceEvent(action, BASE + offset, 10 * MIB, 0)
                for offset in (6 * MIB, 8 * MIB)
                for action in ("free_requested", "free_completed")
            ],
            "has blocks that overlap at 0x10000800000",
        ),
    ],
)
def test_a_trace_that_contradicts_itself_is_refused(events: list[TraceEvent], words: str) -> None:
    (trace,) = EXPECTED.devices
    broken = DeviceTrace(1, trace.segments, tuple(events))
    with pytest.raises(ValueError, match=words):
        replay_snapshot(Snapshot(EXPECTED.settings, (broken,)))


def test_a_fraction_of_an_unknown_memory_is_refused() -> None:
    (trace,) = EXPECTED.devices
    without_oom = DeviceTrace(1, trace.segments, trace.events[:-1])
    settings = AllocatorSettings(per_process_memory_fraction=0.5)
    with pytest.raises(ValueError, match="per_process_memory_fraction must be of a known memory"):
        replay_snapshot(Snapshot(EXPECTED.settings, (without_oom,)), settings)


def test_what_the_platform_did_not_have_was_not_in_force(tmp_path: Path) -> None:
    document = torch_document()
    document["allocator_settings"] = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "expandable_segments": False,
    }
    path = tmp_path / "snapshot"
    path.write_bytes(pickle.dumps(document))
    assert not read_snapshot(path).settings.expandable_segments
