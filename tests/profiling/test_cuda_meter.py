"""The CUDA half of the meter. It never ran on a GPU: recorded figures stand where the driver would
answer, and the CPU allocator's own events, operator scratch included, where CUDA's would come.
"""

import gzip
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dpmem_profiling import Job, cuda_meter, measure, meter, nvml
from dpmem_profiling.cuda_meter import UNTRACKED, AllocatorPoint, CudaMeter, CudaStep
from dpmem_profiling.job import StepContext, build, make_batch, run_step
from dpmem_profiling.timeline import replay
from dpmem_profiling.tracker import Change, MemoryTracker

CUDA = torch.device("cuda", 1)
MIB = 2**20


def step(*history: tuple[float, int, int], **changes: Any) -> CudaStep:
    points = tuple(AllocatorPoint(*point) for point in history)
    fields = {"allocated_bytes": 0, "reserved_bytes": 0, "device_bytes": None, "notes": ()}
    return CudaStep(**{**fields, "history": points, **changes})


def total(start: dict[int, int], changes: list[Change]) -> list[int]:
    return list(accumulate((c.delta_bytes for c in changes), initial=sum(start.values())))


def test_what_no_tensor_explains_is_untracked_at_every_moment() -> None:
    # The allocator starts with a workspace of 8, gives an output of 10 and scratch of 30 at 1 s,
    # takes the scratch back, and the output at 5 s. The tracker sees the output alone.
    watched = step((0, 108, 0), (1, 118, 0), (1.5, 148, 0), (2, 118, 0), (5, 108, 0))
    seen = [
        Change(0.5, "forward", None, 0),
        Change(3, "forward", 7, 10),
        Change(4.5, "backward", 7, -10),
    ]
    start, changes = watched.with_untracked({0: 100}, seen)
    assert start == {0: 100, UNTRACKED: 8}
    assert [(c.storage, c.delta_bytes, c.phase) for c in changes] == [
        (None, 0, "forward"),
        (UNTRACKED, 10, "forward"),
        (UNTRACKED, 30, "forward"),
        (UNTRACKED, -30, "forward"),
        # The output becomes the tracker's: never twice there.
        (UNTRACKED, -10, "forward"),
        (7, 10, "forward"),
        (7, -10, "backward"),
        (UNTRACKED, 10, "backward"),
        (UNTRACKED, -10, "backward"),
    ]
    assert max(total(start, changes)) == 148
    assert total(start, changes)[-1] == 108


def test_the_tracker_may_know_of_more_than_the_allocator() -> None:
    """Rounding, and frees that wait for another stream: nothing is ever negative."""
    start, changes = step((0, 90, 0), (1, 80, 0)).with_untracked({0: 100}, [Change(2, None, 0, -5)])
    assert start == {0: 100, UNTRACKED: 0}
    assert changes == [Change(2, None, 0, -5)]


def test_without_a_history_nothing_is_added() -> None:
    changes = [Change(1, None, 0, 5)]
    assert step().with_untracked({0: 1}, changes) == ({0: 1}, changes)
    replayed = replay({0: 1}, changes, lambda _: "temporary", start_s=0)
    assert step().with_reserved(replayed, 0) == replayed


def test_points_tell_what_the_allocator_held() -> None:
    watched = step((10, 0, 20), (11, 4, 40), (12, 4, 60))
    start, changes = watched.with_untracked({0: 0}, [Change(11.5, None, 0, 4)])
    replayed = replay(
        start, changes, lambda n: "unknown" if n == UNTRACKED else "input", start_s=10
    )
    shown = watched.with_reserved(replayed, 10)
    assert [(p.time_s, p.reserved_bytes) for p in shown.points] == [
        (0, 20),
        (1, 40),
        (1.5, 40),
        (1.5, 40),
    ]
    assert UNTRACKED not in shown.live_at_peak


def wide() -> nn.Module:
    layers = [nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers)


WIDE = Job(
    wide,
    lambda n: torch.randn(n, 3, 32, 32),
    lambda model, batch: model(batch).square().mean(),
    optimizer=lambda parameters: torch.optim.AdamW(parameters),
)


def test_with_a_real_allocators_events_the_total_is_the_allocators() -> None:
    """oneDNN's scratch, half of this job's peak, is in the CPU allocator's events alone."""
    tracker = MemoryTracker(torch.device("cpu"), block_bytes=512, limit_bytes=None)
    started = AllocatorPoint(time.perf_counter(), 0, 0)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities, profile_memory=True) as profiler,
        tracker,
    ):
        built = build(WIDE, torch.device("cpu"))
        for _ in range(2):
            batch = make_batch(WIDE, 8, torch.device("cpu"))
            context = StepContext(built.model, batch, built.optimizer, torch.device("cpu"))
            run_step(WIDE, context)
            del batch, context
    assert profiler.profiler is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    trace = [
        {
            "action": "alloc" if event.nbytes() > 0 else "free_requested",
            "size": abs(event.nbytes()),
            "time_us": event.start_ns() / 1e3,
        }
        for event in events
        if event.name() == "[memory]"
    ]
    history = cuda_meter._history(started, trace, [])
    allocator_bytes = [point.allocated_bytes for point in history]
    tracked_peak_bytes = max(total({}, tracker.changes))
    assert max(allocator_bytes) > 1.3 * tracked_peak_bytes
    start, changes = step(*history).with_untracked({}, tracker.changes)
    totals = total(start, changes)
    # A storage dies a moment before its memory is free, so the sum may pass the peak by one of the
    # small ones, never by more.
    assert max(allocator_bytes) <= max(totals) <= 1.001 * max(allocator_bytes)
    assert totals[-1] == allocator_bytes[-1]


DATA = Path(os.environ.get("DPMEM_DATA", Path(__file__).parents[3] / "shared" / "data"))


def recorded_histories(name: str) -> list[tuple[dict[str, Any], tuple[AllocatorPoint, ...]]]:
    """Each device of a published snapshot, and the history of its trace from nothing."""
    path = DATA / "snapshots" / f"{name}.json.gz"
    if not path.is_file():
        pytest.skip("needs the recorded snapshots: set DPMEM_DATA to the folder that holds them")
    with gzip.open(path) as file:
        devices = [device for device in json.load(file)["devices"] if device["trace"]]
    histories = []
    for device in devices:
        trace = [
            {"action": action, "size": size, "time_us": number}
            for number, (action, _, size, *_) in enumerate(device["trace"])
        ]
        histories.append((device, cuda_meter._history(AllocatorPoint(-1e12, 0, 0), trace, [])))
    return histories


def test_the_history_of_a_real_gpu_ends_where_its_snapshot_does() -> None:
    """Two traces of whole runs, expandable segments mapped and unmapped."""
    for device, history in recorded_histories("expandable_segments"):
        segments = device["segments"]
        assert history[-1].reserved_bytes == sum(s["total_size"] for s in segments)
        assert history[-1].allocated_bytes == sum(s["allocated_size"] for s in segments)


@pytest.mark.parametrize(
    ("name", "peak_bytes"),
    [
        ("gpt_medium_ctx128_training", 7_021_691_392),
        ("gpt_medium_ctx256_training", 9_112_392_188),
        ("gpt_medium_ctx512_training", 12_435_476_996),
        ("gpt_medium_ctx1024_training", 24_211_100_164),
        ("gpt_small_vocab50257_b1_ctx128", 3_857_685_760),
        ("gpt_small_b32_ctx256", 13_927_832_064),
    ],
)
def test_the_history_of_a_real_gpu_peaks_where_torch_said(name: str, peak_bytes: int) -> None:
    """These traces begin amid the run: what was held then is what the end lacks of the snapshot."""
    ((device, history),) = recorded_histories(name)
    held_bytes = sum(s["allocated_size"] for s in device["segments"]) - history[-1].allocated_bytes
    found_bytes = held_bytes + max(point.allocated_bytes for point in history)
    assert abs(found_bytes - peak_bytes) < cuda_meter.MIN_BLOCK_BYTES


class FakeCuda:
    """torch.cuda's answers for a step that allocates 4 MiB and gives 1 back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recording: list[tuple[Any, dict[str, Any]]] = []
        self.enabled = False
        self.backend = "native"
        self.trace: list[dict[str, Any]] = []
        answers = {
            "memory_allocated": 2 * MIB,
            "memory_reserved": 20 * MIB,
            "max_memory_allocated": 7 * MIB,
            "max_memory_reserved": 24 * MIB,
            "reset_peak_memory_stats": None,
            "synchronize": None,
            "get_device_properties": SimpleNamespace(uuid="1234"),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: self.backend)
        memory = torch.cuda.memory
        monkeypatch.setattr(memory, "_record_memory_history", self.record)
        monkeypatch.setattr(memory, "_snapshot", lambda: {"device_traces": [[], self.trace]})
        monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: self.enabled, raising=False)

    def record(self, enabled: str | None, **options: Any) -> None:
        self.recording.append((enabled, options))

    def event(self, action: str, size_bytes: int) -> None:
        now_us = int(time.time() * 1e6)
        self.trace.append({"action": action, "size": size_bytes, "time_us": now_us})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


class FakeSampler:
    """Finds 77 bytes in use, or fails where it is told to."""

    failure = ""

    def __init__(self, uuid: str) -> None:
        assert uuid == "1234"

    def __enter__(self) -> "FakeSampler":
        if self.failure == "at the start":
            raise nvml.NvmlUnavailable("no library")
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    @property
    def peak_bytes(self) -> int:
        if self.failure == "later":
            raise nvml.NvmlUnavailable("GPU is lost")
        return 77


@pytest.fixture(autouse=True)
def sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "Sampler", FakeSampler)


def watch(fake: FakeCuda) -> CudaStep:
    watching = CudaMeter(CUDA)
    with watching.watching():
        fake.event("segment_alloc", 4 * MIB)
        fake.event("alloc", 4 * MIB - 500)
        fake.event("free_requested", MIB)
        fake.event("segment_free", 4 * MIB)
        fake.event("free_completed", MIB)
    assert watching.step is not None
    return watching.step


def test_a_step_is_watched_from_all_sides(fake: FakeCuda) -> None:
    watched = watch(fake)
    # 2 MiB were there before: 7 MiB at the peak are 5 of the job.
    assert (watched.allocated_bytes, watched.reserved_bytes) == (5 * MIB, 24 * MIB)
    assert watched.device_bytes == 77
    # Blocks are of 512 bytes; a free counts when it is asked for.
    assert [(p.allocated_bytes, p.reserved_bytes) for p in watched.history] == [
        (0, 20 * MIB),
        (0, 24 * MIB),
        (4 * MIB, 24 * MIB),
        (3 * MIB, 24 * MIB),
        (3 * MIB, 20 * MIB),
    ]
    times_s = [point.time_s for point in watched.history]
    assert times_s == sorted(times_s)
    assert 0 <= times_s[-1] - times_s[0] < 1
    assert "2.00 MiB were allocated in this process before" in watched.notes[0]
    (on, options), (off, _) = fake.recording
    assert (on, options["context"], off) == ("all", None, None)


def test_recording_ends_where_the_step_fails(fake: FakeCuda) -> None:
    watching = CudaMeter(CUDA)
    with pytest.raises(KeyError), watching.watching():
        raise KeyError
    assert [enabled for enabled, _ in fake.recording] == ["all", None]
    assert watching.step is None


def test_somebody_elses_recording_is_left_alone(fake: FakeCuda) -> None:
    fake.enabled = True
    watched = watch(fake)
    assert (watched.history, fake.recording) == ((), [])
    assert "records the allocator's history itself" in watched.notes[-1]
    assert watched.allocated_bytes == 5 * MIB


def test_an_allocator_without_history_is_not_asked_for_it(fake: FakeCuda) -> None:
    fake.backend = "cudaMallocAsync"
    watched = watch(fake)
    assert (watched.history, fake.recording) == ((), [])
    assert "The allocator cudaMallocAsync keeps no history" in watched.notes[-1]
    assert watched.allocated_bytes == 5 * MIB


def test_a_history_that_was_cut_is_not_used(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_meter, "HISTORY_EVENTS", 5)
    watched = watch(fake)
    assert watched.history == ()
    assert "more than 5 allocator events" in watched.notes[-1]


@pytest.mark.parametrize(
    ("failure", "words"), [("at the start", "no library"), ("later", "GPU is lost")]
)
def test_a_gpu_without_nvml_is_measured_all_the_same(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch, failure: str, words: str
) -> None:
    monkeypatch.setattr(FakeSampler, "failure", failure)
    watched = watch(fake)
    assert (watched.allocated_bytes, watched.device_bytes) == (5 * MIB, None)
    assert watched.notes[-1] == f"Whole-device use is not known: {words}"


def test_the_record_takes_its_totals_from_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole measurement, with a CUDA that holds a workspace of 8,000 bytes all the time."""
    plain = measure(WIDE, 4)

    class Held:
        step: CudaStep | None = None

        @contextmanager
        def watching(self) -> Iterator[None]:
            yield
            held = (0.0, 8000 + sum(plain.persistent_bytes.values()), 64 * MIB)
            peak_bytes = plain.peak_allocated_bytes + 9000
            self.step = step(
                held,
                allocated_bytes=peak_bytes,
                reserved_bytes=64 * MIB,
                device_bytes=99 * MIB,
                notes=("a note",),
            )

    monkeypatch.setattr(meter, "_cuda_meter", lambda device: Held())
    monkeypatch.setattr(meter, "MIN_BLOCK_BYTES", 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Stub GPU")
    record = measure(WIDE, 4)
    assert record.device == "Stub GPU"
    assert record.peak_allocated_bytes == plain.peak_allocated_bytes + 9000
    assert record.persistent_bytes["unknown"] == 8000
    assert record.timeline[0].live_bytes["unknown"] == 8000
    assert {point.reserved_bytes for point in record.timeline} == {64 * MIB}
    assert (record.peak_reserved_bytes, record.device_bytes) == (64 * MIB, 99 * MIB)
    assert record.notes == ("a note",)
    assert [t.category for t in record.tensors_at_peak] == [
        t.category for t in plain.tensors_at_peak
    ]
