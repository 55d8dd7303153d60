"""What a step on CUDA asked of the allocator. No GPU took part: the allocator's model answers where
torch.cuda would, and writes the history that torch.cuda.memory would have.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from dpmem_profiling import CachingAllocator, cuda_meter
from dpmem_profiling.cuda_meter import CudaMeter
from dpmem_profiling.extrapolate import Extrapolated, Requests

CUDA = torch.device("cuda", 0)
MIB = 1 << 20


class FakeCuda:
    """torch.cuda over the allocator's model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocator = CachingAllocator()
        self.backend, self.pool = "native", (0, 0)
        # cuBLAS's, that every process takes once.
        self.workspace: int | None = None
        self.trace: list[dict[str, Any]] | None = None
        self.others_recording = False
        self.recorded: list[str | None] = []
        answers = {
            "memory_allocated": lambda device: self.allocator.allocated_bytes,
            "memory_reserved": lambda device: self.allocator.reserved_bytes,
            "max_memory_allocated": lambda device: self.allocator.peak_allocated_bytes,
            "max_memory_reserved": lambda device: self.allocator.peak_reserved_bytes,
            "reset_peak_memory_stats": lambda device: self.allocator.reset_peaks(),
            "synchronize": lambda device: None,
            "empty_cache": self.empty_cache,
            "get_allocator_backend": lambda: self.backend,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", self.record)
        monkeypatch.setattr(torch.cuda.memory, "_snapshot", self.snapshot)
        for name, answer in (
            ("_cuda_isHistoryEnabled", lambda: self.others_recording or self.trace is not None),
            ("_cuda_clearCublasWorkspaces", self.clear_workspaces),
        ):
            monkeypatch.setattr(torch._C, name, answer, raising=False)
        monkeypatch.setattr(CudaMeter, "_sampler", lambda *_: None)

    def record(self, enabled: str | None, **options: Any) -> None:
        self.recorded.append(enabled)
        self.trace = None if enabled is None else []

    def snapshot(self) -> dict[str, Any]:
        states = {"live": "active_allocated", "free": "inactive"}
        segments = [
            {
                "device": 0,
                "address": segment.address,
                "total_size": segment.size_bytes,
                "stream": segment.stream,
                "segment_type": "small" if segment.is_small else "large",
                "segment_pool_id": self.pool,
                "blocks": [
                    {
                        "address": block.address,
                        "size": block.size_bytes,
                        "requested_size": block.requested_bytes,
                        "state": states[block.state],
                    }
                    for block in segment.blocks
                ],
            }
            for segment in self.allocator.segments()
        ]
        settings = {"PYTORCH_CUDA_ALLOC_CONF": "", "expandable_segments": False}
        traces = [list(self.trace or ())]
        return {"segments": segments, "device_traces": traces, "allocator_settings": settings}

    def note(self, action: str, address: int, size_bytes: int) -> None:
        if self.trace is not None:
            event = {"action": action, "addr": address, "size": size_bytes, "stream": 0}
            self.trace.append({**event, "time_us": len(self.trace)})

    def malloc(self, size_bytes: int) -> int:
        reserved_bytes = self.allocator.reserved_bytes
        address = self.allocator.malloc(size_bytes)
        if self.allocator.reserved_bytes > reserved_bytes:
            self.note("segment_alloc", address, self.allocator.reserved_bytes - reserved_bytes)
        self.note("alloc", address, size_bytes)
        return address

    def free(self, address: int) -> None:
        self.allocator.free(address)
        for action in ("free_requested", "free_completed"):
            self.note(action, address, 0)

    def empty_cache(self) -> None:
        reserved_bytes = self.allocator.reserved_bytes
        self.allocator.empty_cache()
        if self.allocator.reserved_bytes < reserved_bytes:
            self.note("segment_free", 0, reserved_bytes - self.allocator.reserved_bytes)

    def clear_workspaces(self) -> None:
        if self.workspace is not None:
            self.free(self.workspace)
            self.workspace = None

    def run(self, batch: int, extra: Any = None) -> tuple[int, Requests | None]:
        """A probe: a model is built, makes two steps, and goes. Reserved bytes, and what was asked
        for. `extra` is called within the second step."""
        meter = CudaMeter(CUDA)
        with meter.remembering():
            weights = [self.malloc(3 * MIB + 5) for _ in range(5)]
            for watched in (nullcontext(), meter.watching()):
                with watched:
                    self.workspace = self.workspace or self.malloc(8 * MIB)
                    kept = [self.malloc(700_001 * batch) for _ in weights]
                    if extra is not None and watched is not None:
                        extra()
                    for address in kept:
                        self.free(self.malloc(1_300_000 * batch))
                        self.free(address)
        for address in weights:
            self.free(address)
        self.empty_cache()
        assert meter.step is not None
        return meter.step.reserved_bytes, meter.requests


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda(monkeypatch)
    yield fake
    # A history that nobody ended would slow all that comes after.
    assert fake.trace is None or fake.others_recording


def test_two_probes_tell_what_a_third_reserves(fake: FakeCuda) -> None:
    # A run that is under way holds memory, with gaps in it.
    held = [fake.malloc(size_mib * MIB) for size_mib in (3, 5, 3, 40)]
    fake.free(held[1])
    # What an earlier batch left in the cache, and cuBLAS's workspace, no later one would find.
    fake.free(fake.malloc(60 * MIB))
    fake.workspace = fake.malloc(8 * MIB)
    (_, low), (_, high) = fake.run(1), fake.run(6)
    assert low is not None
    assert high is not None
    known = Extrapolated(1, 6, low, high)
    for batch in (1, 6, 11, 50, 51):
        reserved_bytes, requests = fake.run(batch)
        assert known(batch) == reserved_bytes
        assert known.foresaw(batch, requests)


def test_the_history_of_the_step_is_as_without(fake: FakeCuda) -> None:
    fake.run(3)
    # On before the model is built, anew for the step, off after it and once more at the end.
    assert fake.recorded == ["all", "all", None, None]
    watched = CudaMeter(CUDA)
    with watched.watching():
        fake.free(fake.malloc(5 * MIB))
    assert watched.step is not None
    # The start, what was taken, and what was given back.
    assert len(watched.step.history) == 3
    assert watched.requests is None


def test_memory_given_back_within_a_step_is_not_repeated(fake: FakeCuda) -> None:
    def empties_the_cache() -> None:
        fake.free(fake.malloc(99 * MIB))
        fake.empty_cache()

    assert fake.run(2, extra=empties_the_cache)[1] is None
    assert fake.run(2)[1] is not None


def test_a_block_from_nowhere_ends_it(fake: FakeCuda) -> None:
    def freed_by_another_thread() -> None:
        fake.note("free_completed", 12345, 0)

    assert fake.run(2, extra=freed_by_another_thread)[1] is None


def test_without_a_history_of_its_own_nothing_is_known(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.others_recording = True
    assert fake.run(2)[1] is None
    assert fake.recorded == []
    fake.others_recording = False
    fake.backend = "cudaMallocAsync"
    assert fake.run(2)[1] is None
    fake.backend = "native"
    monkeypatch.setattr(cuda_meter, "HISTORY_EVENTS", 9)
    assert fake.run(2)[1] is None


def test_a_captured_graphs_memory_is_left_alone(fake: FakeCuda) -> None:
    """It may hold cuBLAS's workspace."""
    fake.workspace = workspace = fake.malloc(8 * MIB)
    fake.pool = (0, 1)
    assert fake.run(2)[1] is None
    assert fake.workspace == workspace


def test_recording_ends_where_building_fails(fake: FakeCuda) -> None:
    meter = CudaMeter(CUDA)
    with pytest.raises(KeyError), meter.remembering():
        raise KeyError
    assert fake.recorded == ["all", None]
